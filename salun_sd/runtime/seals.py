"""Seals: the digest that a JSON object carries of the rest of itself, so that damage on the disk is noticed."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from salun_sd.errors import SalunError, some
from salun_sd.runtime.documents import Shape, parse_json, read_json

logger = logging.getLogger(__name__)

KEY = "digest"  # SHA-256, in hex, of the other keys as JSON: in the order of their names, in ASCII, without blanks


def sealed(value: dict) -> dict:
    """The object with its digest, in place of one that it has."""
    content = {key: v for key, v in value.items() if key != KEY}
    return content | {KEY: _digest(json.loads(json.dumps(content)))}


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unsealed(value: dict, name: str, advice: str = "") -> dict:
    """The object without its digest. Raises SalunError if it has none, or if the rest is not what was sealed; the error
    calls it `name` and ends in `advice`."""
    content = {key: v for key, v in value.items() if key != KEY}
    if value.get(KEY) != _digest(content):
        raise advising(advice)(f"{name} is damaged: its {KEY} is not that of its content.")
    return content


def read(file: Path, shape: Shape = dict, advice: str = "") -> dict:
    """The object in a JSON file, as `unsealed` gives it. Raises SalunError for a damaged file or another shape."""
    return unsealed(read_json(file, shape, advising(advice)), str(file), advice)


def advising(advice: str) -> Callable[[str], SalunError]:
    """An error for `parse_json`, whose text ends in what to do."""
    return lambda text: SalunError(f"{text} {advice}".rstrip())


def line(value: dict) -> str:
    """The object with its digest, as a line of a .jsonl file."""
    return json.dumps(sealed(value), ensure_ascii=False) + "\n"


def read_lines(file: Path, shape: Shape = dict, advice: str = "", skip: bool = False) -> Iterator[dict]:
    """The objects in a .jsonl file, as `read` gives each. Raises SalunError, which names file and line, for a damaged
    one; or, with `skip`, leaves it out with a log line."""
    damaged = []
    with file.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if skip and not text.strip():
                continue
            name = f"{file}, line {number},"
            try:
                value = unsealed(parse_json(text, name, shape, advising(advice)), name, advice)
            except SalunError:
                if not skip:
                    raise
                damaged.append(str(number))
            else:
                yield value
    if damaged:
        logger.warning(f"{file} has damaged lines, which are not used: {some(damaged)}.")
