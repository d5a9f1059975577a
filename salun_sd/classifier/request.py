"""What a run is asked for, checked before the first long step."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

from salun_sd.classifier.measure import METRICS, OTHERS
from salun_sd.classifier.settings import DEFAULT, MASKED, METHODS, label
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.report import gate

NUMBERS = (*METRICS, *OTHERS, "gap", "seconds")  # of --fail-if, with .METHOD
EXACT, ORIGINAL = "retrain", "original"  # names of rows with a part of their own
ABSENT = {"against": "has no meaning here: compare with retrain, as in 'ua.salun < ua.retrain - 2'"}


class Row(NamedTuple):
    """A method in the table, and its density if it has one."""

    label: str
    method: str
    density: float | None = None

    def with_density(self, settings: Mapping[str, float]) -> dict[str, float]:
        """A method's settings, and the density of this row."""
        return dict(settings) | ({"density": self.density} if self.density else {})


class Job(NamedTuple):
    """One model to make and to measure: a row and a seed."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.label}-seed-{self.seed}"


def rows(methods: Sequence[str], densities: Sequence[float]) -> list[Row]:
    """A row for each method, and for each density of those that have one. Raises UsageError for an unknown method, one
    that is named twice, a density outside (0, 1], and one that no method uses."""
    methods, asked = list(methods) or list(DEFAULT), list(densities)
    densities = asked or [0.5]
    if unknown := [name for name in methods if name not in METHODS]:
        raise UsageError(f"--method {unknown[0]} is unknown: the methods are {', '.join(METHODS)}.")
    for density in densities:
        if not 0 < density <= 1:
            raise UsageError(f"--density {density} is outside (0, 1]: give a share of the weights, such as 0.5.")
    if asked and not set(methods) & set(MASKED):
        raise UsageError(f"--density is for {' and '.join(MASKED)}: add --method {MASKED[0]}, or leave --density out.")
    found = [Row(label(m, d), m, d if m in MASKED else None)
             for m in methods for d in (densities if m in MASKED else [0.5])]  # fmt: skip
    if doubled := [name for name, n in Counter(row.label for row in found).items() if n > 1]:
        raise UsageError(f"{doubled[0]} is asked for twice: give each --method and --density once.")
    return found


def given(settings: Iterable[str]) -> dict[str, dict[str, float]]:
    """METHOD.NAME=VALUE, by method. Raises UsageError for what is no such text, method, setting or number."""
    values: dict[str, dict[str, float]] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        method, _, key = name.rpartition(".")
        if not equals or method not in METHODS:
            raise UsageError(f"--setting {text} is no METHOD.NAME=VALUE, such as salun.lr=0.01.")
        published = METHODS[method]
        if key not in (known := [*published.settings, *published.searched]):
            raise UsageError(
                f"--setting {text}: {method} has the settings {', '.join(known) or 'of --epochs and --lr'}."
            )
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf or (key in ("epochs", "samples") and (number < 1 or number % 1)):
            raise UsageError(f"--setting {text}: {value} is no number that {key} can be.")
        values.setdefault(method, {})[key] = int(number) if key in ("epochs", "samples") else number
    return values


def tried(method: str, own: Mapping[str, float], tune: str) -> list[dict[str, float]]:
    """The settings that a search of a method tries, or the only ones there are: its published ones, those of `own`, and
    each combination of the values that are searched. tune: "none", "unpublished" or "all"."""
    published = METHODS[method]
    grid = published.searched | (published.tuned if tune == "all" else {})
    grid = {name: values for name, values in grid.items() if name not in own}
    if tune == "none":
        grid = {name: values[:1] for name, values in grid.items()}
    fixed = published.settings | dict(own)
    return [fixed | dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def check_attack() -> None:
    """Raise SalunError where scikit-learn, which the attack on membership needs, is not installed."""
    if find_spec("sklearn") is None:
        raise SalunError("The attack on membership needs scikit-learn: type pip install 'salun-sd[classifier]'.")


def bounds(texts: Sequence[str], labels: Sequence[str]) -> list[gate.Bound]:
    """The bounds of --fail-if. Raises UsageError for what is no bound, and for numbers that will not be measured."""
    known = [f"{number}.{name}" for name in (*labels, ORIGINAL) for number in NUMBERS]
    parsed = [gate.parse(text, known, ABSENT) for text in texts]
    for bound in parsed:
        if EXACT not in labels and (gaps := [name for name in bound.terms if name.startswith("gap.")]):
            raise UsageError(
                f"--fail-if {bound.text!r}: {some(gaps)} is the distance to Retrain: add --method retrain."
            )
    return parsed
