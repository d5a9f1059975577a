"""Prompt sets: CSV files in the columns of I2P, and the ones that ship with the package."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from salun_sd.errors import SalunError, UsageError

# In a wheel the sets are beside this file; in a source tree they are the top-level folder.
FOLDER = next(p for p in (Path(__file__).parent / "prompt_sets", Path(__file__).parents[1] / "prompts") if p.is_dir())
COLUMNS = ["case_number", "prompt", "evaluation_seed", "evaluation_guidance"]


class Prompt(NamedTuple):
    """A row of a prompt set: what to draw, from which seed, at which classifier-free guidance scale (diffusers')."""

    case: int
    text: str
    seed: int
    guidance: float
    label: str | None = None  # the column `class`: what the image has to show


def builtin() -> list[str]:
    """Names of the prompt sets that ship with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.csv"))


def read(name_or_path: str) -> list[Prompt]:
    """A prompt set by name or from a CSV file with the columns of COLUMNS, and `class` where there is one.

    Raises UsageError when it is not there, SalunError naming the line when its content is wrong.
    """
    path = FOLDER / f"{name_or_path}.csv" if name_or_path in builtin() else Path(name_or_path)
    if not path.is_file():
        raise UsageError(f"There is no prompt set or file {name_or_path}; built in are {', '.join(builtin())}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            absent = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
            if absent:
                raise SalunError(f"{path} has no column {', '.join(absent)}; it needs {', '.join(COLUMNS)}.")
            prompts = [_prompt(row, f"{path}, line {reader.line_num}") for row in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise SalunError(f"{path} is no CSV file in UTF-8: {e}.") from e
    if not prompts:
        raise SalunError(f"{path} has no prompts: a header alone, or nothing.")
    seen: set[int] = set()
    for p in prompts:
        if p.case in seen:
            raise SalunError(f"{path} has case_number {p.case} twice: every prompt needs its own.")
        seen.add(p.case)
    return prompts


def _prompt(row: dict, where: str) -> Prompt:
    def number(column: str, kind: type):
        try:
            value = kind(row[column])
        except (TypeError, ValueError) as e:
            raise SalunError(f"{where}: {column} is {row[column]!r}, not a number.") from e
        if not 0 <= value < 2**63:
            raise SalunError(f"{where}: {column} is {row[column]}, which is negative or too large.")
        return value

    if not row["prompt"]:
        raise SalunError(f"{where}: the prompt is empty.")
    return Prompt(
        number("case_number", int),
        row["prompt"],
        number("evaluation_seed", int),
        number("evaluation_guidance", float),
        row.get("class") or None,
    )


def write(prompts: Iterable[Prompt]) -> str:
    """The text of a CSV file that `read` takes."""
    lines = [[*COLUMNS, "class"], *([p.case, p.text, p.seed, f"{p.guidance:g}", p.label or ""] for p in prompts)]
    return "".join(",".join(_quote(str(v)) for v in line) + "\n" for line in lines)


def _quote(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if re.search(r'[",\r\n]', value) else value


def class_in(text: str, classes: Iterable[str | None]) -> str | None:
    """The class that a concept's text names as a whole word, the longest if several ("t-shirt", not "shirt")."""

    def named(label: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE) is not None

    return max((c for c in set(classes) if c and named(c)), key=lambda c: (len(c), c), default=None)
