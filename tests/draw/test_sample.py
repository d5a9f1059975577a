import diffusers
import numpy as np
import pytest
import torch
from helpers.models import damage, write_pipeline

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.draw import sample
from salun_sd.draw.sample import Given, Row, Sampler
from salun_sd.errors import UsageError
from salun_sd.runtime.finite import NotFinite

TEXTS = ["a photo of a bag", "a sneaker", "a coat"]


def rows(guidance: float, size: tuple[int, int]) -> list[Row]:
    return [Row(text, 7 + i, guidance, size) for i, text in enumerate(TEXTS)]


def of_diffusers(pipeline, rows, steps):
    """The pipeline's own images, of one size and guidance."""
    width, height = rows[0].size
    return pipeline(
        [row.text for row in rows], generator=[torch.Generator().manual_seed(row.seed) for row in rows], width=width,
        height=height, guidance_scale=rows[0].guidance, num_inference_steps=steps,
    ).images  # fmt: skip


def levels(some, others) -> int:
    """The largest difference between images, in 8-bit steps."""
    return max(int(np.abs(np.int16(a) - np.int16(b)).max()) for a, b in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def pipelines(pocket, tmp_path_factory):
    """Each family, with the schedulers PNDM, DDIM on v, Euler."""
    folder, of_family = tmp_path_factory.mktemp("families"), {"pocket": pocket}
    for family, prediction in (("sd1", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")):
        write_pipeline(folder / family, family, prediction=prediction)
        of_family[family] = load_pipeline(find(str(folder / family)))
    return of_family


@pytest.mark.parametrize("family", ["pocket", "sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_images_are_those_of_diffusers_pipeline(pipelines, family, guidance):
    """Bit for bit; with SDXL to a grey level, whose second text encoder rounds a text by those beside it."""
    for size in ((32, 32), (40, 24)):  # the second cannot be halved as often as the UNet does
        wanted = rows(guidance, size)
        ours = Sampler(pipelines[family], 4).draw(wanted, len(wanted))
        assert [image.size for image in ours] == [size] * 3
        far = levels(ours, of_diffusers(pipelines[family], wanted, 4))
        assert far <= (family == "sdxl")
    assert levels(ours[:1], ours[1:2]) > 10


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_drawing_goes_on_from_any_step(pipelines, family):
    row = rows(5.0, (32, 32))[:1]
    whole, part = (Sampler(pipelines[family], 4, "DDIMScheduler").latents(row, 1, ends=ends) for ends in (None, 3))
    rest = Sampler(pipelines[family], 4, "DDIMScheduler", lambda _: Given(None, part, 3)).latents(row, 1)
    assert torch.equal(rest, whole) and not torch.equal(part, whole)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_pass_holds_rows_of_any_guidance_each_to_rounding_as_by_itself(pipelines, family):
    sampler = Sampler(pipelines[family], 4)
    mixed = [row._replace(guidance=g) for row, g in zip(rows(2.0, (32, 32)), (1.5, 7.5, 20.0), strict=True)]
    assert sampler.passes(mixed) == [[0, 1, 2]]
    alone = [of_diffusers(pipelines[family], [row], 4)[0] for row in mixed]
    assert levels(sampler.draw(mixed), alone) <= 1


@pytest.mark.parametrize(("dtype", "bound"), [
    ("bfloat16", 0.003),
    pytest.param("float16", 0.0004, marks=pytest.mark.slow),  # which few CPUs compute in
])  # fmt: skip
def test_images_in_half_are_those_of_float32_but_for_a_small_difference(pocket, dtype, bound):
    """The mean of it over pixels, of 1; two seeds of a prompt differ by 0.1."""
    wanted = [row._replace(seed=seed) for seed in range(3) for row in rows(3.0, (32, 32))]
    half = load_pipeline(find("pocket"), dtype=getattr(torch, dtype))
    one, other = (
        np.stack([np.asarray(image, np.float32) for image in Sampler(pipeline, 6).draw(wanted, len(wanted))]) / 255
        for pipeline in (pocket, half)
    )
    assert 0 < np.abs(one - other).mean() < bound < 0.1 * np.abs(one[:3] - one[3:6]).mean()


def test_a_pass_has_the_same_shape_however_few_its_rows(pipelines):
    """Kernels round by the shape of the whole batch."""
    shapes, wanted = set(), rows(2.0, (32, 32))
    hook = pipelines["sd1"].unet.register_forward_pre_hook(lambda _, args: shapes.add(tuple(args[0].shape)))
    try:
        assert [len(Sampler(pipelines["sd1"], 1).draw(wanted[:n])) for n in (1, 3)] == [1, 3]
    finally:
        hook.remove()
    assert shapes == {(2 * sample.images_per_pass(8, 8), 4, 8, 8)}  # with the texts, and without


@pytest.mark.parametrize("name", sample.SCHEDULERS)
def test_every_scheduler_draws_the_same_image_twice_and_as_diffusers_does(pipelines, name):
    kind, settings = sample.SCHEDULERS[name]
    pipeline = pipelines["sd1"]
    sampler = Sampler(pipeline, 3, sample.scheduler_class(name))
    original, wanted = pipeline.scheduler, rows(3.0, (32, 32))
    torch.manual_seed(1)
    shares: list[float] = []
    first = sampler.draw(wanted, 3, shares.append)
    assert len(shares) >= 3 and sum(shares) == pytest.approx(1)  # some take more steps than they are asked for
    torch.manual_seed(2)
    assert levels(first, sampler.draw(wanted, 3)) == 0
    settings = {} if kind == type(original).__name__ else settings  # the checkpoint's own is taken as it is
    try:
        pipeline.scheduler = getattr(diffusers, kind).from_config(original.config, **settings)
        assert levels(first, of_diffusers(pipeline, wanted, 3)) == 0
    finally:
        pipeline.scheduler = original


def test_a_scheduler_that_draws_noise_draws_a_rows_from_the_rows_own_seed(pipelines):
    sampler = Sampler(pipelines["sd1"], 3, "EulerAncestralDiscreteScheduler")
    wanted = rows(3.0, (32, 32))
    torch.manual_seed(1)
    first = sampler.draw(wanted, 3)
    torch.manual_seed(2)
    assert levels(first, sampler.draw(wanted[::-1], 3)[::-1]) == 0


def test_a_scheduler_without_a_name_is_refused_with_those_that_have_one():
    with pytest.raises(UsageError, match="--scheduler heun.* ddim, dpm\\+\\+, euler, lms, pndm"):
        sample.scheduler_class("heun")


def test_passes_have_one_size_of_image_and_one_number_of_rows_for_it(pocket):
    small, wide = rows(3.0, (32, 32)), rows(3.0, (512, 256))
    free = [row._replace(guidance=1.0) for row in small]
    assert Sampler(pocket, 2).passes([small[0], wide[0], free[0], wide[1], wide[2], small[1]]) == [
        [0, 5], [1, 3], [2], [4]
    ]  # fmt: skip
    assert [sample.images_per_pass(side, side) for side in (8, 32, 64, 96, 128, 256)] == [32, 16, 4, 1, 1, 1]


@pytest.mark.parametrize(("part", "name", "words"), [
    ("unet", "conv_out.weight", "UNet"),
    ("vae", "decoder.conv_out.weight", "VAE"),
    ("text_encoder", "final_layer_norm.weight", "text encoder"),
])  # fmt: skip
def test_what_overflows_though_its_weights_are_finite_is_named_and_not_drawn(tmp_path, part, name, words):
    folder = write_pipeline(tmp_path / "sd1", "sd1")
    damage(folder, part, name, 3e38)
    with pytest.raises(NotFinite) as caught:
        Sampler(load_pipeline(find(str(folder))), 1).draw(rows(3.0, (32, 32)))
    assert words in str(caught.value) and str(folder) in str(caught.value)
