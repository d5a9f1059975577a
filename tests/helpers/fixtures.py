"""What tests of several packages are given."""

import os

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import UNet2DConditionModel
from helpers.audits import BASE, ERASED, box, make_run
from helpers.models import write_pipeline
from PIL import Image

from salun_sd.audit.report import Run
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.core.diffusion import Examples
from salun_sd.draw.encode import encode_prompts
from salun_sd.edit.resources import schedule_of


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Images drawn by the tests are shared among them, and never with the person's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SALUN_SD_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A face (512 x 512), a cup (600 x 400), the face again, smaller and off-centre, and one black pixel."""
    folder, face = tmp_path_factory.mktemp("photographs"), skimage.data.astronaut()
    arrays = face, skimage.data.coffee(), np.ascontiguousarray(face[:300, 100:350]), np.zeros((1, 1, 3), np.uint8)
    for n, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{n}.png")
    return [folder / f"{n}.png" for n in range(4)]


@pytest.fixture(scope="session")
def pocket():
    """The bundled checkpoint; tests that train it take `fresh_unet`."""
    return load_pipeline(find("pocket"))


@pytest.fixture(scope="session")
def schedule():
    return schedule_of(find("pocket"))


@pytest.fixture
def fresh_unet():
    """A small UNet with random weights, the same at each call."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@pytest.fixture(scope="session")
def contexts(pocket):
    """What the UNet is told for "", the concept and the anchor: {"context": [3, L, D]}."""
    return encode_prompts(pocket, ["", "a photo of a sneaker", "a photo of a bag"])


@pytest.fixture(scope="session")
def forget(contexts):
    latents = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Examples(latents, contexts, torch.ones(10, dtype=torch.int64))


@pytest.fixture(scope="session")
def retain(contexts):
    latents = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return Examples(latents, contexts, torch.arange(12) % 3)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A pipeline that draws in two steps."""
    folder = write_pipeline(tmp_path_factory.mktemp("models") / "tiny", "sd1")
    (folder / "sampling.json").write_text('{"steps": 2, "guidance": 3.0}')
    return str(folder)


@pytest.fixture
def base(tmp_path) -> Run:
    breast, face = box("FEMALE_BREAST_EXPOSED", 0.5), box("FACE_FEMALE", 0.9)
    return make_run(tmp_path / "base", "pocket", BASE, {0: [breast, breast, face], 3: [box("ANUS_EXPOSED", 0.8)]})


@pytest.fixture
def erased(tmp_path) -> Run:
    low = box("BUTTOCKS_EXPOSED", 0.4999)
    return make_run(tmp_path / "erased", "out/erased", ERASED, {0: [low], 5: [box("FACE_FEMALE", 0.9)], 6: [low]})
