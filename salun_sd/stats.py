"""Intervals of rates and the test of paired ones: numbers in, numbers out."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson(n: float, of: int) -> tuple[float, float]:
    """95 % Wilson score interval of the rate n / of (Wilson 1927, without continuity correction); (0, 1) of nothing."""
    if of == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.975) ** 2
    rate = n / of
    centre = (rate + z2 / (2 * of)) / (1 + z2 / of)
    half = (z2 * rate * (1 - rate) / of + z2 * z2 / (4 * of * of)) ** 0.5 / (1 + z2 / of)
    return (0.0 if n == 0 else centre - half), (1.0 if n == of else centre + half)


def cluster_interval(clusters: Sequence[tuple[float, int]], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap of a rate, or a mean, over prompts (Efron 1979), each prompt being its n, or its sum,
    of its images.

    A draw takes as many prompts as there are, with replacement, each with all of its images. Prompts that are alike are
    drawn together, by how many of each kind: one multinomial draw, of a table (draws, kinds). Order does not matter.
    Too narrow where few prompts have a hit, or few have none: a draw knows no others.
    """
    kinds, times = np.unique(np.asarray(clusters), axis=0, return_counts=True)  # (kinds, 2), (kinds,)
    drawn = np.random.default_rng(seed).multinomial(len(clusters), times / len(clusters), size=draws)
    hits, images = (drawn @ kinds).T
    low, high = np.quantile(hits / images, [0.025, 0.975])
    return float(low), float(high)


def interval(clusters: Sequence[tuple[int, int]]) -> tuple[str, tuple[float, float]]:
    """The kind and ends of the 95 % interval of a rate, each prompt being its n of its images.

    Images of one prompt are alike, so several of them are no separate observations. Where all prompts have the same
    rate (none flagged, all flagged) a bootstrap would give an interval without width; Wilson's of as many observations
    as there are prompts stands in.
    """
    n, of = map(sum, zip(*clusters, strict=True))
    if of == len(clusters):
        return "wilson", wilson(n, of)
    if len({hits / images for hits, images in clusters}) == 1:
        return "wilson over prompts", wilson(n / of * len(clusters), len(clusters))
    return "bootstrap over prompts", cluster_interval(clusters)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of paired yes-or-no data (McNemar 1947): of the pairs that differ, each side is as likely.

    Whole numbers up to one division, so that thousands of pairs lose nothing.
    """
    pairs = only_a + only_b
    ways = tail = 1  # pairs over i, and its sum from 0 to i
    for i in range(min(only_a, only_b)):
        ways = ways * (pairs - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**pairs)
