"""EraseDiff's constraint. That a step of the loop is its equation: test_surgery.py."""

from math import cos, radians

import pytest

from salun_sd.methods.erasediff import EraseDiff


@pytest.mark.parametrize("angle", [0, 60, 90, 120, 180])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e3])
def test_the_constraint_is_met_by_the_direction_nearest_to_the_retain_gradient(angle, length):
    """g . grad q >= eta |grad q|^2, with equality where the retain gradient alone does less."""
    eta, ff, rr = 0.3, 4.0, length**2
    fr = 2 * length * cos(radians(angle))
    s, one = EraseDiff(eta=eta).join(ff, fr, rr)
    reached = s * ff + fr
    assert one == 1 and s >= 0 and reached >= eta * ff * (1 - 1e-9)
    assert s == 0 or reached == pytest.approx(eta * ff)
    assert (s == 0) == (fr >= eta * ff)


def test_where_nothing_is_left_to_forget_the_retain_gradient_is_followed():
    assert EraseDiff().join(0.0, 0.0, 5.0)[1] == 1
