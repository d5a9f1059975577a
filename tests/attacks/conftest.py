"""A small random pipeline under attack, for attacks on the weights: what they do does not depend on what it draws."""

import pytest
import torch
from helpers.models import write_pipeline

from salun_sd.attacks.attack import Scene
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.find import find
from salun_sd.core.mask import random_bits
from salun_sd.draw import prompts


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory):
    return Target(find(str(write_pipeline(tmp_path_factory.mktemp("attacked") / "sd1", "sd1"))))


@pytest.fixture
def tiny(tiny_target):
    """A scene of two prompts; each picture is random latents. The mask has a fifth of the weights."""
    rows, latents = prompts.read("pocket", ["class=sneaker"], 2), torch.randn(4, 4, 8, 8)
    shapes = {name: p.shape for name, p in tiny_target.unet.named_parameters()}
    return Scene(
        tiny_target, "a photo of a sneaker", rows, lambda prompt: latents[rows.index(prompt)][None],
        others=lambda: (latents[2:], ["a bag", "a coat"]), mask=random_bits(shapes, 0.2, seed=0),
    )  # fmt: skip
