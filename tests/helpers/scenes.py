"""An attack on the bundled checkpoint: prompts that ask for a thing, where the concept is a sneaker."""

from functools import cache
from pathlib import Path

import torch

from salun_sd.attacks.attack import Attack, Scene, Try
from salun_sd.attacks.run import Run
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.find import find
from salun_sd.draw import prompts
from salun_sd.draw.encode import encode_image, pixels
from salun_sd.draw.generate import row_of
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Sampler

NAME = "sneaker"


@cache
def target() -> Target:
    return Target(find("pocket"))


@cache
def named(count: int = 3) -> list[Prompt]:
    return prompts.read("pocket", [f"class={NAME}"], count)


@cache
def pictures() -> dict[int, torch.Tensor]:
    rows = [row_of(prompt, 0, (32, 32)) for prompt in named()]
    images = Sampler(target().pipeline, 5).draw(rows, len(rows))
    latents = [encode_image(target().pipeline, pixels(image, 32)[0])[None] for image in images]
    return {prompt.case: latent for prompt, latent in zip(named(), latents, strict=True)}


def scene(count: int = 1, **changes) -> Scene:
    """The base under attack, with the concept's name taken away."""
    nameless = [prompt._replace(text=prompt.text.replace(NAME, "thing")) for prompt in named()[:count]]
    settings = {"prompts": nameless, "picture": lambda prompt: pictures()[prompt.case], "base": target()} | changes
    return Scene(target(), f"a photo of a {NAME}", **settings)


def searched(attack: Attack, scene: Scene) -> list[Try]:
    """The tries of the scene's first prompt."""
    return attack.tries(scene, scene.prompts[0], attack.prepare(scene))


def run(attack: Attack, scene: Scene, out: Path, steps: int = 10) -> Run:
    return Run("attack", attack, scene, out, scheduler="DDIMScheduler", steps=steps)
