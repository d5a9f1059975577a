"""Intervals of rates and the test of paired ones: numbers in, numbers out."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson(n: float, of: float) -> tuple[float, float]:
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
    An n may be below zero: then it is a difference of rates.
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


def newcombe(both: float, only_a: float, only_b: float, neither: float) -> tuple[float, float]:
    """95 % interval of rate b - rate a of paired yes-or-no data, from the four counts of pairs.

    Newcombe 1998, Statistics in Medicine 17:2635, method 10: the distances of both rates to their Wilson ends, squared
    and added with the pairs' correlation phi, of which a positive one is made smaller by a continuity correction.
    """
    of = both + only_a + only_b + neither
    if of == 0:
        return -1.0, 1.0
    a, b = both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = wilson(a, of), wilson(b, of)
    covariance = both * neither - only_a * only_b
    spread = (a * b * (of - a) * (of - b)) ** 0.5
    phi = (max(covariance - of / 2, 0) if covariance > 0 else covariance) / spread if spread else 0.0

    def half(of_a: float, of_b: float) -> float:
        return max(0.0, of_a * of_a - 2 * phi * of_a * of_b + of_b * of_b) ** 0.5

    difference = (b - a) / of
    return difference - half(high_a - a / of, b / of - low_b), difference + half(a / of - low_a, high_b - b / of)


def difference_interval(clusters: Sequence[tuple[int, int, int, int]]) -> tuple[str, tuple[float, float]]:
    """The kind and ends of the 95 % interval of rate b - rate a, each prompt being its pairs (both, only a, only b,
    neither); the kinds are those of `interval`, Newcombe's standing for Wilson's."""
    counts = [sum(pairs) for pairs in zip(*clusters, strict=True)]
    images, prompts = sum(counts), len(clusters)
    if images == prompts:
        return "newcombe", newcombe(*counts)
    differences = [(only_b - only_a, both + only_a + only_b + neither) for both, only_a, only_b, neither in clusters]
    if len({n / of for n, of in differences}) == 1:
        return "newcombe over prompts", newcombe(*(n * prompts / images for n in counts))
    return "bootstrap over prompts", cluster_interval(differences)


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
