"""Storage in fewer bits: what each format keeps of a weight."""

import gc

import pytest
import torch

from salun_sd.attacks.round_trip import RoundTrip, rounded

FLOATS = {"float16": 2**-11, "bfloat16": 2**-8, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}  # largest share lost


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", FLOATS)
def test_a_float_loses_a_share_of_its_value_at_most(format):
    weights = drawn(40, 30).sign() * (0.1 + drawn(40, 30).abs())
    lost = ((rounded(weights, format) - weights) / weights).abs().max().item()
    assert FLOATS[format] / 2 < lost <= FLOATS[format]


def test_a_float_out_of_range_becomes_the_nearest():
    far = torch.tensor([[1e6, -1e6]])
    assert rounded(far, "float8_e4m3fn").tolist() == [[448, -448]] and rounded(far, "float16").isfinite().all()


def test_int8_has_255_steps_for_each_channel():
    kernel = drawn(8, 4, 3, 3) * torch.arange(1, 9)[:, None, None, None]
    kernel[0, 0, 0, 0] = 0
    stored, steps = rounded(kernel, "int8"), kernel.flatten(1).abs().amax(1)[:, None, None, None] / 127
    assert ((stored - kernel).abs() <= 0.501 * steps).all() and not torch.equal(stored, kernel)
    assert torch.allclose(stored / steps, (stored / steps).round(), atol=1e-4) and stored[0, 0, 0, 0] == 0
    assert torch.allclose(stored.flatten(1).abs().amax(1), kernel.flatten(1).abs().amax(1))
    assert not rounded(torch.zeros(2, 3), "int8").any()


def test_a_change_smaller_than_a_step_is_rounded_away():
    base = rounded(drawn(16, 16), "int8")
    step = base.abs().amax(1, keepdim=True) / 127
    change = drawn(16, 16).sign() * step * (base.abs() < base.abs().amax(1, keepdim=True))  # the scale stays
    assert torch.allclose(rounded(base + 0.4 * change, "int8"), base, atol=1e-6)
    assert not torch.allclose(rounded(base + 0.6 * change, "int8"), base, atol=1e-3)


def test_the_first_weights_are_kept_once(tiny):
    """What the memory plan counts."""
    weights = sum(p.nbytes for p in tiny.target.unet.parameters())

    def held() -> int:
        tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    gc.collect()
    before = held()
    for _ in RoundTrip(("int8",)).stages(tiny):
        assert 0.9 * weights < held() - before < 1.1 * weights


def test_small_formats_round_matrices_and_half_precision_everything(tiny):
    unet = tiny.target.unet
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    attack = RoundTrip()
    for stage in attack.stages(tiny):
        format = attack.labels()[stage]
        for name, p in unet.named_parameters():
            is_rounded = p.ndim > 1 or format in ("float16", "bfloat16")
            assert torch.equal(p, rounded(before[name], format) if is_rounded else before[name])
