"""A VAE in half: what overflows is decoded again in float32; above 768 pixels it takes tiles."""

import json

import pytest
import torch
from helpers.models import damage, write_pipeline

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.draw import vae
from salun_sd.draw.images import is_blank
from salun_sd.draw.sample import Row, Sampler
from salun_sd.runtime.finite import NotFinite


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose VAE may be in half, as that of SD 1.x."""
    folder = write_pipeline(tmp_path_factory.mktemp("half") / "sd1", "sd1", dtype=torch.float16)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    return folder


def loaded(folder, dtype="float16"):
    return load_pipeline(find(str(folder)), dtype=getattr(torch, dtype))


def test_text_encoders_and_a_vae_that_overflows_in_half_are_in_float32(folder, pocket):
    for dtype in ("float16", "bfloat16"):
        half = getattr(torch, dtype)
        pipeline, upcast = loaded(folder, dtype), load_pipeline(find("pocket"), dtype=half)
        assert (pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype) == (half, half, torch.float32)
        assert (upcast.unet.dtype, upcast.vae.dtype) == (half, torch.float32) and upcast.vae.config.force_upcast


@pytest.mark.parametrize(("way", "shape"), [(vae.encode, (3, 32, 32)), (vae.decode, (4, 8, 8))])
def test_only_the_rows_that_overflow_in_half_are_computed_again_in_float32(folder, way, shape):
    half, wide = loaded(folder), loaded(folder, "float32")
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    usual, large = way(half, x), x.clone()
    large[1] *= 1e6
    rows = way(half, large)
    assert torch.equal(rows[1], way(wide, large)[1]) and torch.equal(rows[[0, 2]], usual[[0, 2]])
    assert not torch.equal(usual, way(wide, x)) and half.vae.dtype == torch.float16


def test_a_vae_that_overflows_draws_what_it_draws_in_float32_and_nothing_black(folder, tmp_path):
    broken = tmp_path / "broken"
    write_pipeline(broken, "sd1", dtype=torch.float16)
    (broken / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text())
    damage(broken, "vae", "decoder.conv_norm_out.weight", 6e4)
    row = [Row("a bag", 7, 1.0, (32, 32))]
    half = loaded(broken)
    [image] = Sampler(half, 1).draw(row, 1)
    half.vae.to(torch.float32)
    assert image.tobytes() == Sampler(half, 1).draw(row, 1)[0].tobytes() and not is_blank(image)


def test_a_unet_that_overflows_in_half_is_named_with_the_option(folder, tmp_path):
    broken = write_pipeline(tmp_path / "broken", "sd1", dtype=torch.float16)
    damage(broken, "unet", "conv_norm_out.weight", 6e4)
    row = [Row("a bag", 7, 1.0, (32, 32))]
    assert not is_blank(Sampler(loaded(broken, "float32"), 1).draw(row, 1)[0])
    with pytest.raises(NotFinite, match=f"UNet of {broken}.*float16.*--dtype float32"):
        Sampler(loaded(broken), 1).draw(row, 1)


def test_above_768_pixels_an_image_is_tiled_and_depends_on_its_own_size_alone(folder):
    pipeline = loaded(folder, "float32")
    sampler, drawn = Sampler(pipeline, 1), []
    for side in (768, 800, 768):
        rows = [Row(text, i, 1.0, (side, 16)) for i, text in enumerate(("a bag", "a coat"))]
        drawn.append([image.tobytes() for image in sampler.draw(rows, 2)])
        turned = [image.tobytes() for image in sampler.draw(rows[::-1], 2)]
        alone = [image.tobytes() for image in sampler.draw(rows[1:], 2)]
        assert turned[::-1] == drawn[-1] and alone == drawn[-1][1:]
        assert pipeline.vae.use_tiling is pipeline.vae.use_slicing is (side > 768)
    assert drawn[0] == drawn[2]
