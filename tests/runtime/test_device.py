"""Weights held in bfloat16: what is computed from them, and what is saved."""

from copy import deepcopy

import pytest
import torch
from helpers import models
from helpers.commands import ERASE

from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.core import mask
from salun_sd.edit import maskfile
from salun_sd.errors import UsageError
from salun_sd.runtime.device import DTYPES, Precision, check_dtype, dtype_name


def test_a_widened_unet_computes_in_float32_from_its_rounded_weights(fresh_unet, contexts):
    """Output and gradients are those of the float32 UNet whose weights were rounded."""
    rounded = deepcopy(fresh_unet).to(torch.bfloat16)
    plain = deepcopy(rounded).float()
    wide = Precision(torch.bfloat16, True, "").prepare(rounded, checkpointing=False)
    x, context = torch.randn(2, 4, 8, 8).bfloat16(), contexts["context"][1:3].bfloat16()
    for unet, to in ((wide, torch.bfloat16), (plain, torch.float32)):
        unet.requires_grad_(True)
        unet(x.to(to), 7, context.to(to)).sample.float().pow(2).mean().backward()
    with torch.no_grad():
        a, b = wide(x, 7, context).sample, plain(x.float(), 7, context.float()).sample
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)  # the timestep's embedding is rounded once
    for (name, p), q in zip(wide.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.bfloat16
        torch.testing.assert_close(p.grad.float(), q.grad, rtol=0.05, atol=0.02 * q.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_saved_file_has_the_bases_dtype_and_outside_the_mask_its_bytes(tmp_path, dtype):
    base = models.write_pipeline(tmp_path / "base", "sd1", dtype=dtype)
    (base / "sampling.json").write_text('{"steps": 2, "guidance": 3.0}')
    cli.run(["erase", str(base), *ERASE[2:], "--density", "0.1", "--dtype", "bfloat16", "--out", str(tmp_path / "e")])
    bits = maskfile.read(tmp_path / "e.run" / "mask.safetensors").bits
    before, after = (find(str(folder)).unet for folder in (base, tmp_path / "e"))
    moved = 0
    for name, t in before.items():
        old, new = t.read(), after[name].read()
        assert new.dtype == dtype and torch.equal(old[~bits[name]], new[~bits[name]]), name
        moved += int((old != new)[bits[name]].sum())
    assert moved > 0.8 * mask.kept(bits)[0]
    finest = torch.cat([after[name].read()[bits[name]] for name in bits])
    assert (
        finest != finest.bfloat16().to(dtype)
    ).float().mean() > 0.5  # trained in float32, rounded to the file's dtype


@pytest.mark.parametrize(("requested", "has_bfloat16", "drawn_in", "trained_in"), [
    (None, True, "bfloat16", "bfloat16"),
    (None, False, "float16", "float32"),
    ("float16", True, "float16", "float32"),
    ("float32", True, "float32", "float32"),
    ("bfloat16", False, "float32", "bfloat16"),
])  # fmt: skip
def test_a_gpu_draws_in_half_and_trains_in_what_holds_gradients(
    monkeypatch, requested, has_bfloat16, drawn_in, trained_in
):  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    chosen = [of(requested, "cuda") for of in (Precision.to_draw, Precision.of)]
    assert [dtype_name(precision.dtype) for precision in chosen] == [drawn_in, trained_in]
    assert chosen[1].widens is (trained_in == "bfloat16" and not has_bfloat16)


def test_a_cpu_draws_in_float32_and_in_half_only_where_it_computes_in_it(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert Precision.to_draw(None, "cpu").dtype == torch.float32
    for name in ("bfloat16", "float16"):
        precision = Precision.to_draw(name, "cpu")
        assert precision.dtype == torch.float32 and name in precision.reason
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert Precision.to_draw("bfloat16", "cpu").dtype == torch.bfloat16


def test_a_dtype_that_there_is_not_is_refused_with_those_that_there_are():
    for name in DTYPES:
        check_dtype(name)
    with pytest.raises(UsageError, match="--dtype is 'half'.*float32, bfloat16, float16"):
        check_dtype("half")
