"""The rows of a prompt set in a random but fixed order, and divided into shards: both by the hash of their cases."""

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from salun_sd.draw.prompts import Prompt
from salun_sd.errors import UsageError


class Shard(NamedTuple):
    """One of `of` parts of a prompt set: the rows whose `hash_of` leaves the remainder `number` - 1."""

    number: int  # from 1
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def rows(self, rows: Iterable[Prompt]) -> list[Prompt]:
        return [p for p in rows if hash_of(p.case) % self.of == self.number - 1]


def hash_of(case: int) -> int:
    """The first 8 bytes of the SHA-256 of a case in decimal digits, as a big-endian number: the same on any machine and
    in any version of Python, and no neighbour of the next case's."""
    return int.from_bytes(hashlib.sha256(b"%d" % case).digest()[:8], "big")


def mixed(rows: Iterable[Prompt]) -> list[Prompt]:
    """The rows by the hash of their cases. The first of them, however many, are a random sample of all."""
    return sorted(rows, key=lambda p: hash_of(p.case))


def parse(text: str) -> Shard:
    """ "3/8" => the shard. Raises UsageError for any other text, and for a number outside 1 to 8."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text} is not a shard: give its number and how many there are, from 1/8 to 8/8.")
    return Shard(int(match[1]), int(match[2]))


def own(rows: list[Prompt], shard: Shard | None) -> list[Prompt]:
    """The `mixed` rows of a shard, or all of them. Raises UsageError for a shard without any."""
    if shard is None:
        return mixed(rows)
    if not (inside := shard.rows(rows)):
        raise UsageError(f"--shard {shard} has none of these {len(rows):,} prompts, and salun-sd merge needs none of "
                         "it: give another shard, or fewer of them.")  # fmt: skip
    return mixed(inside)
