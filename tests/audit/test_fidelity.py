"""FID and KID against independent computations."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from salun_sd.audit.fidelity import BLOCK, frechet, kernel_sum, kid, moments


def drawn(seed: int, n: int, dimensions: int, shift: float = 0.0) -> np.ndarray:
    """Correlated features far from zero, as a network's are."""
    g = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dimensions, dimensions))
    return g.normal(size=(n, dimensions)) @ mix + 100 + shift


def test_moments_are_numpys_and_lose_nothing_to_a_large_mean():
    x = drawn(0, 300, 5)
    n, mean, covariance = moments(x + 1e7)
    assert n == 300 and np.allclose(mean, x.mean(axis=0) + 1e7, rtol=1e-13)
    centred = x - x.mean(axis=0)
    assert np.allclose(covariance, centred.T @ centred / 299, rtol=1e-6)
    assert moments(x[:, :1]).covariance.shape == (1, 1)
    with pytest.raises(ValueError, match=r"\b1\b"):
        moments(x[:1])


@pytest.mark.parametrize("n, dimensions", [(400, 16), (400, 1), (90, 64)])
def test_frechet_is_the_one_with_scipys_matrix_root(n, dimensions):
    a, b = moments(drawn(1, n, dimensions)), moments(drawn(2, n + 50, dimensions, 0.5))
    root = sqrtm(np.atleast_2d(a.covariance @ b.covariance)).real
    shift = a.mean - b.mean
    reference = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet(a, b) == pytest.approx(float(reference), rel=1e-8)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6) and frechet(a, b) > 0.1


def test_frechet_of_a_shift_and_of_a_stretch_is_known():
    a = moments(drawn(3, 200, 8))
    assert frechet(a, a._replace(mean=a.mean + 3)) == pytest.approx(9 * 8)
    assert frechet(a, a._replace(covariance=4 * a.covariance)) == pytest.approx(np.trace(a.covariance))


def test_frechet_stands_fewer_features_than_dimensions():
    few = [moments(drawn(seed, 10, 50)) for seed in (4, 5)]
    assert np.linalg.matrix_rank(few[0].covariance) == 9
    roots = np.sqrt(np.linalg.eigvals(few[0].covariance @ few[1].covariance).real.clip(0)).sum()
    shift = few[0].mean - few[1].mean
    traces = np.trace(few[0].covariance) + np.trace(few[1].covariance)
    assert frechet(*few) == pytest.approx(shift @ shift + traces - 2 * roots, rel=1e-6)


def naive_kid(x, y, paired=False):
    def k(a, b):
        return (a @ b / x.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within = sum(
        k(z[i], z[j]) / (len(z) * (len(z) - 1)) for z in (x, y) for i in range(len(z)) for j in range(len(z)) if i != j
    )
    between = [k(x[i], y[j]) for i in range(n) for j in range(m) if not (paired and i == j)]
    return within - 2 * sum(between) / len(between)


def test_kid_is_the_double_sum():
    x, y = (drawn(seed, n, 6) / 50 for seed, n in ((6, 30), (7, 21)))
    assert kid(x, y) == pytest.approx(naive_kid(x, y), rel=1e-9)
    assert kid(x[:21], y, paired=True) == pytest.approx(naive_kid(x[:21], y, paired=True), rel=1e-9)
    with pytest.raises(ValueError, match="two"):
        kid(x, y[:1])
    with pytest.raises(ValueError, match="30.*21"):
        kid(x, y, paired=True)


def test_kid_is_unbiased_where_few_features_are():
    """Of one distribution its mean is zero, with five features as with fifty; of two it is not."""
    g = np.random.default_rng(0)

    def mean(n, shift=0.0):
        values = [kid(g.normal(size=(n, 4)), g.normal(size=(n, 4)) + shift) for _ in range(800)]
        return np.mean(values), np.std(values) / 800**0.5

    for n in (5, 50):
        value, error = mean(n)
        assert abs(value) < 4 * error
    assert mean(5, 1.0)[0] > 1


def test_kid_of_images_of_the_same_seeds_is_not_too_small():
    x = drawn(8, 40, 6) / 50
    assert kid(x, x) < -1e-3 and kid(x, x, paired=True) == pytest.approx(0, abs=1e-9)
    g, values = np.random.default_rng(1), []
    for _ in range(800):  # pairs that are alike, of one distribution
        common = g.normal(size=(10, 4))
        values.append(kid(*(common + 0.3 * g.normal(size=(10, 4)) for _ in range(2)), paired=True))
    assert abs(np.mean(values)) < 4 * np.std(values) / 800**0.5


def test_the_kernel_is_summed_in_blocks():
    x, y = np.random.default_rng(2).normal(size=(2, BLOCK + 5, 3))
    assert kernel_sum(x, y) == pytest.approx(((x @ y.T / 3 + 1) ** 3).sum(), rel=1e-12)
