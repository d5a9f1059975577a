"""The plan against what torch really allocates, and against the real accumulator and optimizer."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.by_class import write_ddpm, write_dit
from helpers.models import TINY, blocks, write_pipeline
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_part
from salun_sd.core import mask
from salun_sd.core.diffusion import Examples, Schedule, predict
from salun_sd.core.masked import MaskedAdam
from salun_sd.core.saliency import GradientSum
from salun_sd.edit import budget, steps
from salun_sd.edit.resources import Compute
from salun_sd.edit.steps import Drawing, Erasing, Masking
from salun_sd.methods.batches import Training
from salun_sd.methods.loop import Erasure, Retain, erase
from salun_sd.methods.salun import SalUn, forget_gradient
from salun_sd.runtime.device import Precision

CONFIG = {  # at 32 x 32 latents, the matrix of one self-attention would take 32 MiB, more than all that lives
    "_class_name": "UNet2DConditionModel", **blocks("x"), "block_out_channels": (32,), "layers_per_block": 1,
    "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8, "in_channels": 4, "out_channels": 4,
    "sample_size": 32,
}  # fmt: skip
SCHEDULE = Schedule(torch.linspace(0.999, 0.01, 1000), "epsilon")
MASK = Masking(256, 1, Precision.of("float32", "cpu"))
ERASE = Erasing(256, 1, Precision.of("float32", "cpu"), density=0.3, most_parts=4)


@cache
def planned(work):
    return budget.plan(CONFIG, work, "cpu")


def loaded(work):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(CONFIG).to(work.dtype).eval()
    return work.precision.prepare(unet, work.checkpointing)


def adam_of(unet, work):
    shapes = {name: p.shape for name, p in unet.named_parameters()}
    values = {name: p.detach().float() for name, p in unet.named_parameters()}
    bits = mask.random_bits(shapes, work.density, seed=0)
    clip = 1.0 if work.clips else None
    return MaskedAdam(unet, bits, 1e-6, values=values, clip=clip, holds=work.parts > 1)


def examples(work):
    side = work.resolution // work.pixels
    prompts = {"context": torch.randn(2, steps.TOKENS, CONFIG["cross_attention_dim"])}
    return Examples(torch.randn(work.batch, 4, side, side), prompts, torch.zeros(work.batch, dtype=torch.int64))


def allocated(work) -> int:
    """Bytes that the step allocates at its peak, beside the weights and the state that are there before it."""
    unet, data = loaded(work), examples(work)
    if work.step == "mask":
        empty = {"context": data.prompts["context"][1:]}
        run = forget_gradient(unet, SCHEDULE, data, empty, guidance=work.guidance, seed=0, batch_size=work.batch)
        with GradientSum(unet):
            return profiled(lambda: next(run))
    rows = torch.zeros(work.batch, dtype=torch.int64)
    training = Training(SCHEDULE, data, data, rows, rows + 1)
    erasure = Erasure(SalUn(), Retain(1.0, "noise"), training, 1, work.batch, 0, work.parts)
    run = erase(unet, adam_of(unet, work), erasure)
    return profiled(lambda: next(run))


def profiled(work_through) -> int:
    """Bytes that a function allocates at its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work_through()
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@pytest.mark.parametrize(
    "work",
    [
        MASK,
        replace(MASK, guidance=7.5, checkpointing=True),
        replace(ERASE, checkpointing=True),
        replace(ERASE, batch=2, parts=2),
        replace(ERASE, precision=Precision.of("bfloat16", "cpu"), checkpointing=True),
    ],
    ids=["mask", "mask-guided", "erase", "erase-parts", "erase-bfloat16"],
)
def test_a_pass_holds_what_is_planned(work):
    parts = planned(work)
    assert parts["activations"] + parts.get("gradients that are held", 0) == pytest.approx(allocated(work), rel=0.15)


@pytest.mark.parametrize("draws", [True, False], ids=["drawn", "given"])
def test_making_the_images_holds_what_is_planned(draws):
    # 16 channels: AVX-512 computes fewer as 16
    config = {**TINY["sd1"]["vae"], "block_out_channels": (16, 16, 16)}
    unet, vae = loaded(MASK), AutoencoderKL.from_config(config).eval()
    work = Drawing(128, 2, Precision.of("float32", "cpu"), pixels=4, vae=config, others=4000, drawn=128 * draws)
    x, told, image = torch.randn(4, 4, 32, 32), torch.randn(4, steps.TOKENS, 32), torch.randn(1, 3, 128, 128)

    @torch.no_grad()
    def work_through():
        vae.encode(image)
        if draws:
            predict(unet, x, torch.zeros(4).long(), {"context": told})
            vae.decode(x[:2])

    found = budget.plan(CONFIG, work, "cpu")
    assert found["weights"] == 4 * (1000 + draws * sum(p.numel() for p in unet.parameters()))
    assert found["activations"] == pytest.approx(profiled(work_through), rel=0.15)


@pytest.mark.parametrize("work", [MASK, ERASE], ids=["mask", "erase"])
def test_checkpointing_lowers_the_activations_alone(work):
    plain, made_anew = (dict(planned(replace(work, checkpointing=c))) for c in (False, True))
    assert made_anew.pop("activations") < 0.8 * plain.pop("activations")
    assert made_anew.keys() == plain.keys()
    assert all(made_anew[part] == plain[part] for part in plain if part != budget.PROGRAM)


def test_no_matrix_of_attention_is_counted_and_torch_is_left_as_it_was():
    """Four times the positions hold about four times as much, where the matrix would hold sixteen times as much."""
    before = F.scaled_dot_product_attention
    small, large = (planned(replace(MASK, resolution=r))["activations"] for r in (256, 512))
    assert 3 < large / small < 5
    assert F.scaled_dot_product_attention is before


def test_parts_are_those_of_the_step():
    weights = sum(p.numel() for p in loaded(MASK).parameters())
    of_mask, of_erase = planned(MASK), planned(ERASE)
    assert list(of_mask) == ["weights", "sums of the gradients", "activations", budget.PROGRAM]
    state = ["salient weights and their moments", "the mask"]
    assert list(of_erase) == ["weights", *state, "activations", budget.PROGRAM]
    assert of_mask["weights"] == of_erase["weights"] == 4 * weights


def test_what_is_planned_again_is_not_measured_again(monkeypatch):
    before = budget.plan(CONFIG, MASK, "cpu")

    def measure(*_):
        raise AssertionError("it was measured")

    monkeypatch.setattr(steps, "peak_of", measure)
    assert budget.plan(dict(CONFIG), replace(MASK), "cpu")["activations"] == before["activations"]
    for config, work in [(CONFIG | {"norm_num_groups": 4}, MASK), (CONFIG, replace(MASK, batch=3))]:
        with pytest.raises(AssertionError, match="it was measured"):
            budget.plan(config, work, "cpu")


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_family_can_be_planned(family):
    """What SDXL's UNet is told beside the text is there too."""
    config = TINY[family]["unet"] | {"_class_name": "UNet2DConditionModel"}
    weights = sum(p.numel() for p in UNet2DConditionModel.from_config(config).parameters())
    parts = budget.plan(config, replace(MASK, resolution=32, pixels=4, guidance=7.5), "cpu")
    assert parts["weights"] == 4 * weights and parts["activations"] > 0
    small, large = (replace(MASK, resolution=side, pixels=4) for side in (32, 256))
    seconds = [budget.seconds_of_pass(config, small, "cpu") for _ in range(5)]
    assert 0 < min(seconds) < budget.seconds_of_pass(config, large, "cpu")


@pytest.mark.parametrize(("write", "pixels"), [(write_ddpm, 1), (write_dit, 2)])
def test_a_pass_of_a_class_holds_what_is_planned(tmp_path, write, pixels):
    model = find(str(write(tmp_path / "model")))
    unet, config = (
        load_part(model, model.denoiser),
        model.unet_settings | {"cross_attention_dim": None},
    )  # as in DiT-XL/2
    work = replace(MASK, resolution=32 * pixels, pixels=pixels, batch=2, guidance=2.0)
    numbers, x = {"class": torch.tensor([0, 3])}, torch.randn(2, config["in_channels"], 32, 32)
    data = Examples(x, numbers, torch.zeros(2, dtype=torch.int64))
    run = forget_gradient(unet, SCHEDULE, data, {"class": torch.tensor([3])}, guidance=2.0, seed=0, batch_size=2)
    with GradientSum(unet):
        held = profiled(lambda: next(run))
    parts = budget.plan(config, work, "cpu")
    assert parts["activations"] == pytest.approx(held, rel=0.15)
    assert parts["weights"] == 4 * sum(p.numel() for p in unet.parameters())
    images = Drawing(8, 2, Precision.of("float32", "cpu"), pixels=pixels, vae=model.vae_settings, drawn=8)
    assert budget.plan(config, images, "cpu")["activations"] > 0
    sizes = [cheaper.resolution for cheaper in work.cheaper(config, torch.device("cpu")).values()]
    assert min(sizes) == 16 * pixels and not any(size % model.size_multiple for size in sizes)


def test_sums_are_those_of_the_accumulator():
    unet, gradients = loaded(MASK), ExitStack()
    with gradients:
        held = profiled(lambda: gradients.enter_context(GradientSum(unet)))
    assert planned(MASK)["sums of the gradients"] == held


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_state_is_that_of_the_optimizer_to_the_byte(density):
    work = replace(ERASE, density=density, clips=True, precision=Precision.of("bfloat16", "cpu"))
    unet = loaded(work)
    parts, adam = planned(work), adam_of(unet, work)
    salient = adam.salient.values()
    held = [t for s in salient for t in (s.values, *s.moments.values())]
    assert parts["salient weights and their moments"] == sum(t.nbytes for t in held)
    assert parts["gradients that are held"] == sum(s.values.nbytes for s in salient)
    # each parameter's bits end in a byte of their own, and one without a salient weight has none
    assert sum(s.packed.nbytes for s in salient) == pytest.approx(parts["the mask"], abs=len(list(unet.parameters())))


@pytest.mark.slow
def test_advice_is_what_planning_again_gives_the_best_first(monkeypatch):
    """Each option alone and, where none is enough, one after another until they are."""
    work = replace(ERASE, batch=4, density=1.0)
    monkeypatch.setattr(budget.memory, "available", lambda device: 10**9)
    alone = dict(budget.advice(CONFIG, work, "cpu"))
    assert {"--checkpointing", "--parts 4", "--size 128"} <= set(alone)
    assert list(alone.values()) == sorted(alone.values())
    assert alone["--checkpointing"] == budget.needed(planned(replace(work, checkpointing=True)))

    bfloat16 = Precision.of("bfloat16", "cpu")
    lower = {} if bfloat16.widens else {"precision": bfloat16}  # where layers are widened, it takes no less here
    least = budget.needed(planned(replace(work, **lower, checkpointing=True, parts=4, resolution=128)))
    flags = ["--dtype bfloat16"] * bool(lower) + ["--checkpointing", "--parts 4", "--size 128"]
    monkeypatch.setattr(budget.memory, "available", lambda device: least)
    assert budget.advice(CONFIG, work, "cpu")[-1] == (" ".join(flags), least)


def test_advice_names_no_option_that_is_taken_or_of_the_other_step():
    flags = [flag for flag, _ in budget.advice(CONFIG, replace(MASK, batch=2, checkpointing=True), "cpu")]
    assert "--batch-size 1" in flags
    assert not [flag for flag in flags if flag.startswith(("--checkpointing", "--parts", "--density"))]
    of_erase = [flag for flag, _ in budget.advice(CONFIG, replace(MASK, batch=4, most_parts=4), "cpu")]
    assert "--parts 4" in of_erase and "--batch-size 1" not in of_erase
    of_file = [flag for flag, _ in budget.advice(CONFIG, replace(ERASE, mask_is_given=True), "cpu")]
    assert not [flag for flag in of_file if flag.startswith("--density")]


def test_what_comes_beside_the_program_has_to_fit(monkeypatch):
    parts = {"weights": 600, "activations": 400, budget.PROGRAM: 10_000}
    monkeypatch.setattr(budget.memory, "available", lambda device: 1000)
    assert budget.fits(parts, "cpu")
    assert not budget.fits(parts | {"weights": 601}, "cpu")


def test_a_patch_of_a_unet_of_several_dtypes_holds_each_weight_in_its_own(tmp_path):
    model = write_pipeline(tmp_path / "mixed", "sd1")
    [file] = (model / "unet").glob("*.safetensors")
    save_file({k: t.half() if "attn2" in k else t for k, t in load_file(file).items()}, file, {"format": "pt"})
    base = find(str(model))
    compute = Compute.of(base, None, None)
    size = compute.disk(base.weights, "patch", reversible=False)["the result"]
    assert size == compute.mask_bytes() + tensors.size(base.unet) and len({t.dtype for t in base.unet.values()}) == 2
