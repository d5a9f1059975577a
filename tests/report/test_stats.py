import random
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats

from salun_sd.report.stats import (
    BLOCK,
    cluster_interval,
    difference_interval,
    effective_size,
    interval,
    kappa,
    mcnemar,
    wilson,
)


@pytest.mark.parametrize("of", [1, 2, 7, 100, 4703])
def test_wilson_equals_scipy(of):
    for n in {0, 1, of // 3, of - 1, of}:
        theirs = scipy.stats.binomtest(n, of).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson(n, of) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 9)[0] == 0.0 and wilson(9, 9)[1] == 1.0


@pytest.mark.parametrize("a, b", [(0, 1), (1, 0), (3, 3), (2, 9), (40, 61), (700, 812), (2300, 2400), (1, 900)])
def test_mcnemar_is_the_two_sided_binomial_test_of_the_pairs_that_differ(a, b):
    assert mcnemar(a, b) == pytest.approx(scipy.stats.binomtest(a, a + b).pvalue, rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_of_no_difference_and_of_a_whole_benchmark():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == 2 / 64
    assert mcnemar(0, 4703) == 0.0 < mcnemar(0, 1000)  # below the least float, and not


def width(ends: tuple[float, float]) -> float:
    return ends[1] - ends[0]


def test_bootstrap_of_one_image_a_prompt_is_close_to_wilson():
    for n, of in ((30, 100), (500, 1000), (300, 4703)):
        assert cluster_interval([(1, 1)] * n + [(0, 1)] * (of - n)) == pytest.approx(wilson(n, of), abs=0.2 / of**0.5)


def test_bootstrap_of_alike_images_is_wider_than_wilson_and_as_wide_as_of_their_prompts():
    alike = [(10, 10)] * 30 + [(0, 10)] * 70
    assert width(cluster_interval(alike)) > 2.5 * width(wilson(300, 1000))
    assert cluster_interval(alike) == cluster_interval([(1, 1)] * 30 + [(0, 1)] * 70)


def test_bootstrap_is_the_one_that_draws_prompt_by_prompt():
    """Beside the plain loop, on prompts with unequal numbers of images."""
    chance = random.Random(0)
    clusters = [(chance.randint(0, of), of) for of in (chance.randint(1, 5) for _ in range(60))]
    rates = []
    for _ in range(4000):
        n, of = map(sum, zip(*chance.choices(clusters, k=60), strict=True))
        rates.append(n / of)
    assert cluster_interval(clusters, draws=4000) == pytest.approx(np.quantile(rates, [0.025, 0.975]), abs=0.01)


def test_bootstrap_is_the_same_each_time_in_any_order():
    clusters = [(i % 4, 3 + i % 2) for i in range(50)]
    assert cluster_interval(clusters) == cluster_interval(clusters[::-1])
    assert cluster_interval(clusters) != cluster_interval(clusters, seed=1)


def test_a_bootstrap_holds_a_bounded_table_and_gives_the_numbers_of_a_whole_one():
    rng = np.random.default_rng(0)
    clusters = [(float(x), 2) for x in rng.random(3000)]
    tracemalloc.start()
    ends = cluster_interval(clusters)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 8 * BLOCK < 8 * 2000 * 3000 / 2
    kinds = np.unique(np.asarray(clusters), axis=0)
    sums, images = (np.random.default_rng(0).multinomial(3000, [1 / 3000] * 3000, size=2000) @ kinds).T
    assert ends == pytest.approx(np.quantile(sums / images, [0.025, 0.975]), abs=1e-12)


def spread(prompts: int, images: int, hits: int) -> list[tuple[int, int]]:
    """Hits one by one over the prompts, and round again."""
    return [(hits // prompts + (i < hits % prompts), images) for i in range(prompts)]


def filled(prompts: int, images: int, hits: int) -> list[tuple[int, int]]:
    """Hits prompt by prompt."""
    return [(min(images, max(0, hits - i * images)), images) for i in range(prompts)]


def test_one_image_a_prompt_is_wilson_of_the_images():
    for n, of in ((0, 1), (1, 3), (7, 90), (4703, 4703)):
        assert interval(spread(of, 1, n)) == ("wilson", wilson(n, of))
        assert effective_size(spread(of, 1, n)) == pytest.approx(of, rel=1e-12)


def test_effective_size_worked_out_by_hand():
    """Four prompts of 2 images with 2, 1, 0 and 0 hits, and those added: 5 of 12. Between prompts 2 x 174/144 / 5 =
    29/60, within them 2 x 1/4 / 6 = 5/60: rho is 24/34, and 8 images count as 8 / (1 + 12/17)."""
    assert effective_size([(2, 2), (1, 2), (0, 2), (0, 2)]) == pytest.approx(8 * 17 / 29)
    assert effective_size([(2, 2), (2, 2), (0, 2), (0, 2)]) == 4  # as many as prompts
    assert effective_size([(100, 100), *[(0, 1)] * 20]) == pytest.approx(120**2 / 10_020)  # little more than one
    assert effective_size(spread(50, 4, 100)) > 150


@pytest.mark.parametrize("prompts, images", [(8, 3), (30, 2), (5, 10), (20, 10), (100, 4), (1, 4)])
@pytest.mark.parametrize("arranged", [spread, filled])
def test_one_more_hit_never_lowers_an_end_and_no_interval_leaves_its_bounds(prompts, images, arranged):
    found = []
    for hits in range(prompts * images + 1):
        clusters = arranged(prompts, images, hits)
        kind, (low, high) = interval(clusters)
        assert kind == "wilson with effective size" and interval(clusters) == (kind, (low, high))
        turned = interval([(of - n, of) for n, of in clusters])[1]
        assert (1 - high, 1 - low) == pytest.approx(turned, abs=1e-12)
        rate = hits / (prompts * images)
        (low_most, high_most), (low_least, high_least) = wilson(rate * prompts, prompts), wilson(hits, prompts * images)
        assert low_most - 1e-12 <= low <= low_least + 1e-12 and high_least - 1e-12 <= high <= high_most + 1e-12
        found.append((low, high))
    for (low, high), (next_low, next_high) in pairwise(found):
        assert low <= next_low + 1e-12 and high <= next_high + 1e-12


def test_images_that_are_alike_are_as_many_as_their_prompts_in_rates_and_in_differences():
    assert interval([(4, 4)] * 30 + [(0, 4)] * 70)[1] == pytest.approx(wilson(30, 100), abs=1e-12)
    assert interval([(0, 4)] * 10)[1] == wilson(0, 10) and interval([(4, 4)] * 10)[1] == wilson(10, 10)
    one, ten = ([tuple(k * n for n in pair) for pair in pairs_of(20, 12, 2, 16)] for k in (1, 10))
    assert difference_interval(one)[1] == pytest.approx(difference_interval(ten)[1], abs=1e-12)


def drawn(rng, rate: float, correlation: float, images: list[int]) -> np.ndarray:
    """Hits of each prompt, beta-binomial, by the correlation of its images."""
    a = (1 - correlation) / correlation
    return rng.binomial(images, rng.beta(rate * a, (1 - rate) * a, size=len(images)))


@pytest.mark.parametrize("rate, correlation", [(0.02, 0.3), (0.02, 0.9), (0.1, 0.3), (0.5, 0.9)])
def test_intervals_cover_what_they_say_where_images_of_a_prompt_are_alike(rate, correlation):
    rng, held, of_images = np.random.default_rng(0), [], []
    for _ in range(600):
        hits = drawn(rng, rate, correlation, [4] * 100).tolist()
        low, high = interval([(n, 4) for n in hits])[1]
        held.append(low <= rate <= high)
        low, high = wilson(sum(hits), 400)
        of_images.append(low <= rate <= high)
    assert np.mean(of_images) < 0.9 < 0.93 <= np.mean(held)


@pytest.mark.parametrize("images", [[20] * 5 + [1] * 50, [100] + [1] * 20, [30, 10, 5, 3, 2] + [1] * 30])
@pytest.mark.parametrize("rate, correlation", [(0.1, 0.3), (0.5, 0.6), (0.5, 0.999)])
def test_intervals_cover_nearly_what_they_say_where_some_prompts_have_most_of_the_images(images, rate, correlation):
    rng, held = np.random.default_rng(0), []
    for _ in range(400):
        hits = drawn(rng, rate, correlation, images).tolist()
        low, high = interval(list(zip(hits, images, strict=True)))[1]
        held.append(low <= rate <= high)
    assert np.mean(held) > 0.85


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_differences_cover_what_they_say_where_prompts_are_alike_and_where_seeds_are(shared):
    """`shared` of the prompts that hit in one model are those of the other; each image's own luck is the same in
    both."""
    rng, held = np.random.default_rng(0), []
    for _ in range(600):
        first, other = rng.beta(1.2, 1.2, size=(2, 100))  # chances around a half, the images' correlation 0.29
        second = np.where(rng.random(100) < shared, first, other)
        luck = rng.random((100, 4))
        a, b = luck < first[:, None], luck < second[:, None]
        low, high = difference_interval(np.stack([(a & b).sum(1), (a & ~b).sum(1), (~a & b).sum(1),
                                                  (~a & ~b).sum(1)], axis=1))[1]  # fmt: skip
        held.append(low <= 0 <= high)
    assert np.mean(held) >= 0.93


def pairs_of(both: int, only_a: int, only_b: int, neither: int) -> list[tuple[int, int, int, int]]:
    """So many prompts of one pair each."""
    return [(1, 0, 0, 0)] * both + [(0, 1, 0, 0)] * only_a + [(0, 0, 1, 0)] * only_b + [(0, 0, 0, 1)] * neither


# Rows of Newcombe's table III, method 10: both, only b, only a, neither => the ends of b - a.
PUBLISHED = {
    (36, 12, 2, 0): (0.0569, 0.3404), (20, 12, 2, 16): (0.0562, 0.3292), (18, 12, 2, 18): (0.0562, 0.3290),
    (36, 14, 0, 0): (0.1528, 0.4167), (2, 97, 1, 0): (0.8721, 0.9854), (0, 30, 0, 0): (0.8395, 1.0),
    (54, 0, 0, 0): (-0.0664, 0.0664), (27, 0, 0, 27): (-0.0351, 0.0351),
}  # fmt: skip


@pytest.mark.parametrize("both, only_b, only_a, neither", PUBLISHED)
def test_newcombe_gives_the_published_intervals(both, only_b, only_a, neither):
    kind, (low, high) = difference_interval(pairs_of(both, only_a, only_b, neither))
    assert kind == "newcombe"
    assert (low, high) == pytest.approx(PUBLISHED[both, only_b, only_a, neither], abs=6e-5)
    turned = difference_interval(pairs_of(both, only_b, only_a, neither))[1]
    assert turned == pytest.approx((-high, -low))


def test_newcombe_covers_what_it_says():
    """Over draws of 100 pairs, of rates that are far from a half and correlated."""
    chances, rng = np.array([0.85, 0.06, 0.03, 0.06]), np.random.default_rng(0)
    drawn = rng.multinomial(100, chances, size=2000)
    ends = [difference_interval(pairs_of(*counts))[1] for counts in drawn]
    assert 0.94 < np.mean([low <= -0.03 <= high for low, high in ends]) < 0.985


def test_pairs_that_agree_say_more_than_two_separate_rates():
    together, apart = (difference_interval(pairs_of(*n))[1] for n in ((40, 5, 5, 50), (20, 25, 25, 30)))
    assert width(together) < 0.6 * width(apart)


def test_intervals_of_several_images_a_prompt_say_so():
    assert interval([(1, 2), (0, 1), (2, 2)])[0] == "wilson with effective size"
    assert difference_interval([(1, 1, 0, 0), (0, 0, 2, 0), (2, 0, 0, 1)])[0] == "newcombe with effective size"


def test_kappa_is_scikit_learns_and_its_interval_that_of_large_samples():
    """Fleiss, Cohen and Everitt 1969: for one image per prompt, the standard error of a kappa from many."""
    from sklearn.metrics import cohen_kappa_score

    both, first, second, neither = counts = (90, 30, 50, 430)
    clusters = [kind for kind, n in zip(np.eye(4, dtype=int).tolist(), counts, strict=True) for _ in range(n)]
    judges = np.repeat([(1, 1), (1, 0), (0, 1), (0, 0)], counts, axis=0).T
    value, ends = kappa(clusters)
    assert value == pytest.approx(cohen_kappa_score(*judges), abs=1e-12)
    n = sum(counts)
    a, b, agree = (both + first) / n, (both + second) / n, (both + neither) / n
    chance = a * b + (1 - a) * (1 - b)
    cells = {(1, 1): both, (1, 0): first, (0, 1): second, (0, 0): neither}
    row, column = {1: a, 0: 1 - a}, {1: b, 0: 1 - b}
    inside = sum(cells[i, i] / n * ((1 - chance) - (row[i] + column[i]) * (1 - agree)) ** 2 for i in (0, 1))
    outside = (1 - agree) ** 2 * sum(cells[i, j] / n * (column[i] + row[j]) ** 2 for i, j in ((0, 1), (1, 0)))
    error = ((inside + outside - (agree * chance - 2 * chance + agree) ** 2) / n) ** 0.5 / (1 - chance) ** 2
    assert ends == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.2 * error)
    assert kappa(clusters[::-1]) == (value, ends)
    wide = kappa([tuple(10 * n for n in cluster) for cluster in clusters[::10]])[1]  # ten alike images per prompt
    assert wide[1] - wide[0] > 2.5 * (ends[1] - ends[0])


def test_judges_who_say_the_same_of_all_have_no_kappa():
    assert kappa([(0, 0, 0, 1)] * 9) == kappa([(1, 0, 0, 0)] * 9) == (None, None)
    assert kappa([(1, 0, 0, 0)] * 5 + [(0, 0, 0, 1)] * 5)[0] == 1 and kappa([(2, 1, 1, 2)])[1] is None
    assert kappa([(0, 0, 1, 0)] * 3 + [(0, 0, 0, 1)] * 3) == (0, None)
