import random

import numpy as np
import pytest
import scipy.stats

from salun_sd.stats import cluster_interval, difference_interval, interval, mcnemar, newcombe, wilson


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


def test_interval_says_its_kind():
    assert interval([(1, 1), (0, 1), (0, 1)]) == ("wilson", wilson(1, 3))
    mixed = [(1, 2), (0, 1), (2, 2)]
    assert interval(mixed) == ("bootstrap over prompts", cluster_interval(mixed))


def test_prompts_of_one_rate_are_as_many_observations_as_prompts():
    """A bootstrap would say that 0 of 40 images is exactly 0."""
    assert cluster_interval([(0, 4)] * 10) == (0.0, 0.0)
    assert interval([(0, 4)] * 10) == ("wilson over prompts", wilson(0, 10))
    assert interval([(4, 4)] * 10) == ("wilson over prompts", wilson(10, 10))
    assert interval([(3, 4)]) == ("wilson over prompts", wilson(0.75, 1))


# Rows of Newcombe's table III, method 10: both, only b, only a, neither => the ends of b - a.
PUBLISHED = {
    (36, 12, 2, 0): (0.0569, 0.3404), (20, 12, 2, 16): (0.0562, 0.3292), (18, 12, 2, 18): (0.0562, 0.3290),
    (36, 14, 0, 0): (0.1528, 0.4167), (2, 97, 1, 0): (0.8721, 0.9854), (0, 30, 0, 0): (0.8395, 1.0),
    (54, 0, 0, 0): (-0.0664, 0.0664), (27, 0, 0, 27): (-0.0351, 0.0351),
}  # fmt: skip


@pytest.mark.parametrize("both, only_b, only_a, neither", PUBLISHED)
def test_newcombe_gives_the_published_intervals(both, only_b, only_a, neither):
    low, high = newcombe(both, only_a, only_b, neither)
    assert (low, high) == pytest.approx(PUBLISHED[both, only_b, only_a, neither], abs=6e-5)
    assert newcombe(both, only_b, only_a, neither) == pytest.approx((-high, -low))


def test_newcombe_covers_what_it_says():
    """Over draws of 100 pairs, of rates that are far from a half and correlated."""
    chances, rng = np.array([0.85, 0.06, 0.03, 0.06]), np.random.default_rng(0)
    drawn = rng.multinomial(100, chances, size=3000)
    ends = [newcombe(*counts) for counts in drawn]
    assert 0.94 < np.mean([low <= -0.03 <= high for low, high in ends]) < 0.985


def test_pairs_that_agree_say_more_than_two_separate_rates():
    together, apart = newcombe(40, 5, 5, 50), newcombe(20, 25, 25, 30)
    assert width(together) < 0.6 * width(apart)
    assert newcombe(0, 0, 0, 0) == (-1, 1)


def test_difference_interval_says_its_kind():
    assert difference_interval([(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1)]) == ("newcombe", newcombe(1, 1, 0, 1))
    mixed = [(1, 1, 0, 0), (0, 0, 2, 0), (2, 0, 0, 1)]
    assert difference_interval(mixed) == ("bootstrap over prompts", cluster_interval([(-1, 2), (2, 2), (0, 3)]))
    alike = [(3, 0, 0, 1), (1, 1, 1, 1), (4, 0, 0, 0)]
    assert difference_interval(alike) == ("newcombe over prompts", newcombe(8 / 4, 1 / 4, 1 / 4, 2 / 4))
