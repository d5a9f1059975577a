"""How far apart two models are, from what they draw and predict, and how sure that is. Pure."""

from collections.abc import Callable

import numpy as np

BLOCKS = 10


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """The Jensen-Shannon divergence of two distributions [K] in bits: 0 if they are the same, 1 if they share nothing.
    Lin 1991, IEEE Transactions on Information Theory 37:145, eq. 4.2, with weights of one half."""

    def entropy(x: np.ndarray) -> float:
        x = x[x > 0]
        return float(-(x * np.log2(x)).sum())

    return max(0.0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def per_timestep(predictions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Predictions [T, N, ...] of two models of the same T x N examples => ‖a - b‖² / ‖b‖² of each, [T, N]."""
    a, b = (x.reshape(*x.shape[:2], -1).astype(np.float64) for x in (predictions, reference))
    return ((a - b) ** 2).sum(axis=-1) / (b**2).sum(axis=-1)


def jackknife(statistic: Callable[[np.ndarray], float], rows: np.ndarray) -> tuple[float, float]:
    """A statistic of rows, given by their indices, and its standard error: row i is in block i mod 10, and each block
    is left out once (Künsch 1989, Annals of Statistics 17:1217). Raises ValueError for fewer rows than blocks."""
    if len(rows) < BLOCKS:
        raise ValueError(f"{len(rows)} rows do not make {BLOCKS} blocks")
    block = np.arange(len(rows)) % BLOCKS
    without = np.array([statistic(rows[block != i]) for i in range(BLOCKS)])
    error = np.sqrt((BLOCKS - 1) / BLOCKS * ((without - without.mean()) ** 2).sum())
    return float(statistic(rows)), float(error)
