import pytest
import torch

from salun_sd.runtime.finite import NotFinite, finite

FLOATS = [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_given_as_they_are_unless_one_is_nan_or_infinite(dtype):
    values = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0], dtype=dtype)
    assert finite(values, "it") is values
    for wrong in ("nan", "inf", "-inf"):
        values[2] = float(wrong)
        with pytest.raises(NotFinite, match=f"^conv.bias .* {str(dtype).removeprefix('torch.')}"):
            finite(values, "conv.bias")


def test_a_dtype_without_infinity_may_have_nan():
    values = torch.tensor([448.0, float("nan")]).to(torch.float8_e4m3fn)
    assert finite(values[:1], "it").item() == 448
    with pytest.raises(NotFinite, match="float8_e4m3fn"):
        finite(values, "it")


def test_no_values_are_finite():
    assert finite(torch.empty(0), "it").numel() == 0
