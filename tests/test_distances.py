"""The distances of benchmarks/distances.py, which have no command and are used by benchmarks/exact.py."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from distances import jackknife, jensen_shannon, per_timestep


@pytest.mark.parametrize("seed", range(5))
def test_jensen_shannon_is_the_mean_divergence_from_the_middle_from_0_to_1(seed):
    p, q = np.random.default_rng(seed).dirichlet(np.ones(10), 2)
    m = (p + q) / 2
    kl = [(x * np.log2(x / m)).sum() for x in (p, q)]
    assert jensen_shannon(p, q) == pytest.approx(sum(kl) / 2) == pytest.approx(jensen_shannon(q, p))
    assert jensen_shannon(p, p) == pytest.approx(0, abs=1e-12) and 0 < jensen_shannon(p, q) < 1
    assert jensen_shannon(np.array([1.0, 0, 0]), np.array([0, 0.5, 0.5])) == 1


def test_a_prediction_is_as_far_as_its_error_is_large_beside_the_reference():
    reference = np.random.default_rng(0).normal(size=(3, 4, 2, 2))
    scale = np.linspace(0, 2, 12).reshape(3, 4)
    far = per_timestep(reference * (1 + scale[..., None, None]), reference)
    np.testing.assert_allclose(far, scale**2, atol=1e-12)


def test_the_jackknifes_error_of_a_mean_is_that_of_the_means_of_its_blocks():
    values = np.random.default_rng(0).normal(5, 2, 400)
    value, error = jackknife(lambda i: values[i].mean(), np.arange(400))
    of_blocks = [values[block::10].mean() for block in range(10)]
    assert value == values.mean() and error == pytest.approx(np.std(of_blocks, ddof=1) / 10**0.5)
    with pytest.raises(ValueError, match="10"):
        jackknife(np.mean, np.arange(9))
