"""FID and KID: the distance between two sets of images, from their features. Pure.

Three layers: an extractor gives features [N, D] (`features.py`), `moments` their statistics, `frechet` and `kid` the
distance.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 1024  # most rows of a kernel matrix that are held at once


class Moments(NamedTuple):
    """Of features [N, D]: N, the mean [D] and the unbiased covariance [D, D], float64."""

    n: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Features [N, D] => their moments. Raises ValueError for fewer than two features."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs two features or more, not {len(features)}")
    features = np.asarray(features, np.float64)
    return Moments(len(features), features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians, which is FID (Dowson and Landau 1982; Heusel et al. 2017, eq. 6):

    |mean_a - mean_b|² + tr(A) + tr(B) - 2 tr((A B)^½)

    A B has the eigenvalues of the symmetric A^½ B A^½, so the last trace is the sum of their square roots. Rounding can
    put eigenvalues below zero if there are fewer features than dimensions; they count as zero.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ b.covariance @ root
    root_trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    return max(0.0, float(distance))


def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """The sum of KID's cubic kernel, (x_i · y_j / D + 1)³, over all i and j."""
    dimensions = x.shape[1]
    return sum(
        float(((x[start : start + BLOCK] @ y.T / dimensions + 1) ** 3).sum()) for start in range(0, len(x), BLOCK)
    )


def kid(x: np.ndarray, y: np.ndarray, *, paired: bool = False) -> float:
    """Kernel Inception Distance of features [N, D] and [M, D]: the unbiased estimate of MMD² with the cubic kernel
    (Bińkowski et al. 2018, arXiv 1801.01401, eq. 4), of all features and not of subsets. It may be below zero.

    The estimate takes the two sets as independent. With `paired`, row i of both comes from one seed: then the pairs
    (i, i) are left out of the sum between the sets, too (Gretton et al. 2012, eq. 4), because with them the distance
    would be too small. Raises ValueError for fewer than two features in a set, or for pairs of unequal sets.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError("an unbiased estimate needs two features or more of each set")
    if paired and n != m:
        raise ValueError(f"{n} and {m} features do not make pairs")

    def row_by_row(a: np.ndarray, b: np.ndarray) -> float:
        return float((((a * b).sum(axis=1) / a.shape[1] + 1) ** 3).sum())

    within = sum((kernel_sum(z, z) - row_by_row(z, z)) / (len(z) * (len(z) - 1)) for z in (x, y))
    if paired:
        return within - 2 * (kernel_sum(x, y) - row_by_row(x, y)) / (n * (n - 1))
    return within - 2 * kernel_sum(x, y) / (n * m)
