"""The order of the rows, and their shards: both by the hash of a case."""

import random

import pytest

from salun_sd.draw import shards
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.shards import Shard
from salun_sd.errors import UsageError

ROWS = [Prompt(case, "a bag", case, 7.5) for case in range(1000)]


def test_a_hash_is_the_same_everywhere_and_for_ever():
    """The first half of `printf 0 | sha256sum`, and of others."""
    assert shards.hash_of(0) == 0x5FECEB66FFC86F38
    assert shards.hash_of(4702) == 0xBBE814C133FF5912
    assert shards.hash_of(10**17) != shards.hash_of(10**17 + 1)


@pytest.mark.parametrize("of", [1, 3, 8])
def test_shards_are_disjoint_make_the_whole_and_are_about_as_large(of):
    parts = [Shard(n, of).rows(ROWS) for n in range(1, of + 1)]
    assert sorted(sum(parts, [])) == ROWS
    assert all(abs(len(part) - len(ROWS) / of) < 5 * (len(ROWS) / of) ** 0.5 for part in parts)


def test_the_order_is_that_of_no_file_and_that_of_every_shard():
    mixed, turned = shards.mixed(ROWS), random.Random(0).sample(ROWS, len(ROWS))
    assert mixed != ROWS and sorted(mixed) == ROWS and shards.mixed(turned) == mixed
    own = shards.own(turned, Shard(2, 3))
    assert own == [p for p in mixed if p in own] and 200 < len(own) < 500


def test_the_first_of_them_are_a_random_sample_of_the_whole():
    """Of the cases in order, and of every k-th, as classes and categories often stand in a file."""
    first = [p.case for p in shards.mixed(ROWS)[:200]]
    assert abs(sum(first) / 200 - 499.5) < 3 * 1000 / (12 * 200) ** 0.5
    for k in (2, 3, 10):
        share = sum(case % k == 0 for case in first) / 200
        assert abs(share - 1 / k) < 3 * (1 / k * (1 - 1 / k) / 200) ** 0.5


@pytest.mark.parametrize("text", ["0/8", "9/8", "3/0", "3", "/", "3/8/2", "-1/8", "1.5/3", "a/b", "3 of 8", "³/8"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UsageError, match=f"--shard {text}"):
        shards.parse(text)


def test_a_shard_without_rows_is_refused():
    with pytest.raises(UsageError, match="--shard 1/1000000 .* 1,000 prompts"):
        shards.own(ROWS, shards.parse("1/1000000"))
    assert str(shards.parse("03/8")) == "3/8"
