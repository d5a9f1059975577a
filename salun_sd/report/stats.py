"""Intervals of rates and the test of paired rates: numbers in, numbers out.

A cluster is a prompt with its images. The images of one prompt are alike, so they are not independent observations.
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

BLOCK = 2**20  # most numbers of a bootstrap that are held at once


def wilson(n: float, of: float) -> tuple[float, float]:
    """95 % Wilson score interval of the rate n / of, without continuity correction (Wilson 1927); (0, 1) if `of` is
    0."""
    if of == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.975) ** 2
    rate = n / of
    centre = (rate + z2 / (2 * of)) / (1 + z2 / of)
    half = (z2 * rate * (1 - rate) / of + z2 * z2 / (4 * of * of)) ** 0.5 / (1 + z2 / of)
    return (0.0 if n == 0 else centre - half), (1.0 if n == of else centre + half)


def cluster_interval(clusters: Sequence[tuple[float, int]], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over images (Efron 1979); a cluster is the sum of a prompt's values
    and the number of its images.

    A draw takes as many prompts as there are, with replacement, each with all of its images. Equal prompts are one
    kind: a multinomial draw says how often each kind is taken. The table (draws, kinds) is made in blocks of at most
    BLOCK numbers. The order of the prompts does not matter.
    """
    sums, images = _drawn(clusters, seed, draws).T
    low, high = np.quantile(sums / images, [0.025, 0.975])
    return float(low), float(high)


def _drawn(clusters: Sequence[tuple[float, ...]], seed: int, draws: int) -> np.ndarray:
    """The sums over the prompts of each draw of a bootstrap, [draws, numbers of a cluster]."""
    kinds, times = np.unique(np.asarray(clusters), axis=0, return_counts=True)  # (kinds, numbers), (kinds,)
    rng, block = np.random.default_rng(seed), max(1, BLOCK // len(kinds))
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    drawn = [rng.multinomial(len(clusters), times / len(clusters), size=size) @ kinds for size in sizes]
    return np.concatenate(drawn)


def kappa(
    clusters: Sequence[tuple[int, int, int, int]], seed: int = 0, draws: int = 2000
) -> tuple[float | None, tuple[float, float] | None]:  # fmt: skip
    """Cohen's kappa of two yes-or-no judges (Cohen 1960, Educational and Psychological Measurement 20:37), and its 95 %
    percentile bootstrap interval over prompts; a cluster is a prompt's numbers of images that both judges say yes to,
    only the first, only the second, and neither.

    Kappa is None where both judges say the same of every image: chance would agree as well. Draws in which they do are
    left out of the interval. It is None for a single prompt, and where one judge says the same of every image: then
    kappa is 0 whatever the other one says.
    """
    both, first, second, neither = counts = np.asarray(clusters).sum(axis=0)
    of_all = _kappas(counts[None])
    if not len(of_all):
        return None, None
    if len(clusters) == 1 or 0 in (both + first, second + neither, both + second, first + neither):
        return float(of_all[0]), None
    low, high = np.quantile(_kappas(_drawn(clusters, seed, draws)), [0.025, 0.975])
    return float(of_all[0]), (float(low), float(high))


def _kappas(counts: np.ndarray) -> np.ndarray:
    """The kappa of each 2 x 2 table [n, 4] that has one."""
    both, first, second, neither = (counts / counts.sum(axis=1, keepdims=True)).T
    by_chance = (both + first) * (both + second) + (neither + first) * (neither + second)
    has_one = by_chance < 1
    return (both + neither - by_chance)[has_one] / (1 - by_chance)[has_one]


def effective_size(clusters: Sequence[tuple[int, int]]) -> float:
    """The number of independent images that would estimate a rate as precisely; a cluster is (n, of) of a prompt.

    With m_i images of prompt i, M in all, it is M / (1 + rho (sum of m_i^2 / M - 1)) (Donner, Birkett & Buck 1981,
    American Journal of Epidemiology 114:906): from M, where images of a prompt are no more alike than others, down to
    M^2 / sum of m_i^2, where they are the same. So one prompt with most of the images counts for little more than one.
    """
    hits, images = np.asarray(clusters, dtype=float).T  # (prompts,)
    of = images.sum()
    return float(of / (1 + _alikeness(hits, images) * ((images**2).sum() / of - 1)))


def _alikeness(hits: np.ndarray, images: np.ndarray) -> float:
    """rho, the correlation of two images of a prompt, 0 to 1, by analysis of variance (Donner 1986, International
    Statistical Review 54:67). hits, images: of each prompt.

    Two prompts with the mean number of images are added, one with only hits and one with none: so there always is a
    variance between prompts, and the result is cautious where they are few or all rates are equal.
    """
    mean = images.mean()
    hits, images = np.append(hits, [mean, 0]), np.append(images, [mean, mean])
    prompts, of, rates = len(images), images.sum(), hits / images
    between = (images * (rates - hits.sum() / of) ** 2).sum() / (prompts - 1)
    within = (images * rates * (1 - rates)).sum() / (of - prompts) if of > prompts else 0
    usual = (of - (images**2).sum() / of) / (prompts - 1)  # images of a prompt
    return float(np.clip((between - within) / (between + (usual - 1) * within), 0, 1))


def interval(clusters: Sequence[tuple[int, int]]) -> tuple[str, tuple[float, float]]:
    """Kind and ends of the 95 % interval of a rate; a cluster is (n, of) of a prompt.

    With several images per prompt, it is Wilson's at the effective size (Franco, Little, Louis & Slud 2019, Journal of
    Survey Statistics and Methodology 7:334). Its upper end is never below that of no hits, and its lower end is never
    above that of hits only.
    """
    n, of = map(sum, zip(*clusters, strict=True))
    if of == len(clusters):
        return "wilson", wilson(n, of)
    size, least = effective_size(clusters), of**2 / sum(images**2 for _, images in clusters)
    low, high = wilson(n / of * size, size)
    return "wilson with effective size", (min(low, wilson(least, least)[0]), max(high, wilson(0, least)[1]))


def difference_interval(clusters: Sequence[tuple[int, int, int, int]]) -> tuple[str, tuple[float, float]]:
    """Kind and ends of the 95 % interval of rate b - rate a of paired yes-or-no data; a cluster is a prompt's numbers
    of pairs (both, only a, only b, neither).

    Newcombe 1998, Statistics in Medicine 17:2635, method 10. The distances of both rates to the ends of their own
    intervals are squared and added, with the correlation phi of the pairs; a continuity correction reduces a positive
    phi. With one image per prompt, all is as published. With several, the intervals are at the effective sizes, phi is
    that of the prompts, and the correction is as large as for that many pairs.
    """
    pairs = np.asarray(clusters)
    of = pairs.sum(axis=1)  # (prompts,)
    sides = [np.stack([pairs[:, 0] + pairs[:, only], of], axis=1) for only in (1, 2)]  # (prompts, 2)
    rate_a, rate_b = (float(side[:, 0].sum() / of.sum()) for side in sides)
    (kind, (low_a, high_a)), (_, (low_b, high_b)) = (interval(side.tolist()) for side in sides)
    a, b = sides[0][:, 0] - rate_a * of, sides[1][:, 0] - rate_b * of
    covariance, spread = float(a @ b), float(a @ a * (b @ b)) ** 0.5
    if covariance > 0:
        weight = of.sum() ** 2 / (effective_size(sides[0]) * effective_size(sides[1]))  # of an independent pair
        covariance = max(covariance - float(weight) / 2, 0)
    phi = covariance / spread if spread else 0.0

    def half(of_a: float, of_b: float) -> float:
        return max(0.0, of_a * of_a - 2 * phi * of_a * of_b + of_b * of_b) ** 0.5

    low, high = half(high_a - rate_a, rate_b - low_b), half(rate_a - low_a, high_b - rate_b)
    return kind.replace("wilson", "newcombe"), (rate_b - rate_a - low, rate_b - rate_a + high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of paired yes-or-no data (McNemar 1947): each pair that differs is as likely to be either way.

    All numbers are whole until one division at the end, so thousands of pairs lose no precision.
    """
    pairs = only_a + only_b
    ways = tail = 1  # pairs over i, and its sum from 0 to i
    for i in range(min(only_a, only_b)):
        ways = ways * (pairs - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**pairs)
