"""Distances between two sets of images by their features: features in, numbers out. Pure.

Three layers: features [N, D] come from an extractor (`features.py`), `moments` makes their statistics, `frechet` and
`kid` the distance.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 1024  # rows of a kernel matrix that are held at once


class Moments(NamedTuple):
    """Of N features of D dimensions: N, the mean [D] and the unbiased covariance [D, D], float64."""

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
    """Fréchet distance of two Gaussians, squared as FID is (Dowson and Landau 1982; Heusel et al. 2017, eq. 6):

    |mean_a - mean_b|² + tr(A) + tr(B) - 2 tr((A B)^½)

    A B has the eigenvalues of the symmetric A^½ B A^½, so the last trace is the sum of their roots. Eigenvalues that
    rounding has put below zero are zero, which covariances of fewer features than dimensions need.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = root @ b.covariance @ root
    root_trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    return max(0.0, float(distance))


def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """The sum of (x_i · y_j / D + 1)³ over all i and j, in blocks of rows: the cubic kernel of KID."""
    dimensions = x.shape[1]
    return sum(
        float(((x[start : start + BLOCK] @ y.T / dimensions + 1) ** 3).sum()) for start in range(0, len(x), BLOCK)
    )


def kid(x: np.ndarray, y: np.ndarray, *, paired: bool = False) -> float:
    """Kernel Inception Distance of features [N, D] and [M, D], over all of them and not over subsets: the unbiased
    estimate of MMD² with the cubic kernel (Bińkowski et al. 2018, arXiv 1801.01401, eq. 4), which sets of one
    distribution may put below zero.

    It takes the two sets for independent. With `paired`, row i of both comes from one seed, and i beside i is left out
    of the sum between them, too (Gretton et al. 2012, eq. 4): with it the distance would be too small.
    Raises ValueError for fewer than two features in either, or pairs of unequal sets.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError("an unbiased estimate needs two features or more of each set")
    if paired and n != m:
        raise ValueError(f"{n} features and {m} are no pairs")

    def row_by_row(a: np.ndarray, b: np.ndarray) -> float:
        return float((((a * b).sum(axis=1) / a.shape[1] + 1) ** 3).sum())

    within = sum((kernel_sum(z, z) - row_by_row(z, z)) / (len(z) * (len(z) - 1)) for z in (x, y))
    if paired:
        return within - 2 * (kernel_sum(x, y) - row_by_row(x, y)) / (n * (n - 1))
    return within - 2 * kernel_sum(x, y) / (n * m)
