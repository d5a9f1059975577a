"""EraseDiff's constraint. That a step of the loop is its equation: test_surgery.py."""

from math import cos, radians

import pytest
import torch

from salun_sd.methods.erasediff import EraseDiff
from salun_sd.methods.surgery import joined


@pytest.mark.parametrize("angle", [0, 60, 90, 120, 180])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e3])
def test_the_constraint_is_met_by_the_direction_nearest_to_the_retain_gradient(angle, length):
    """g . grad q >= eta |grad q|^2, with equality where the retain gradient alone does less."""
    eta, ff = 0.3, 4.0
    fr = 2 * length * cos(radians(angle))
    s = EraseDiff(eta=eta).join(ff, fr)
    reached = s * ff + fr
    assert s >= 0 and reached >= eta * ff * (1 - 1e-9)
    assert s == 0 or reached == pytest.approx(eta * ff)
    assert (s == 0) == (fr >= eta * ff)


def test_where_nothing_is_left_to_forget_the_retain_gradient_is_followed():
    none, retain = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -2.0])}
    assert joined(none, retain, EraseDiff().join)["w"].tolist() == [1, -2]
