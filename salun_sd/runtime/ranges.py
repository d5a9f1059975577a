"""Numbers that a person gave, checked; and the table of what `mask` and `erase` take, for options, plans and Python."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import NamedTuple

from salun_sd.errors import UsageError


class Range(NamedTuple):
    """The numbers from `low` to `high`, which may be infinite; without `low` itself if it `is_open`."""

    low: float
    high: float = math.inf
    is_whole: bool = False
    is_open: bool = False

    @property
    def words(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        if self.is_open:
            return f"{kind} above {self.low}" + (f", at most {self.high}" if self.high < math.inf else "")
        return f"{kind} from {self.low} " + (f"to {self.high}" if self.high < math.inf else "on")

    def holds(self, value: object) -> bool:
        """Whether a value is a finite number of this range. True and False are none."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.is_whole else Real):
            return False
        return self.low <= value <= self.high and value < math.inf and not (self.is_open and value == self.low)


WHOLE = 2**31 - 1  # the largest whole number
RANGES = {
    **dict.fromkeys(("samples", "steps", "batch_size", "parts"), Range(1, WHOLE, is_whole=True)),
    "size": Range(1, 8192, is_whole=True),  # pixels of a side
    **dict.fromkeys(("sample_every", "probe_every", "seed"), Range(0, WHOLE, is_whole=True)),
    **dict.fromkeys(("density", "until"), Range(0, 1, is_open=True)),
    # Adam moves a weight by about lr at each step, whatever the gradient. No weight of a UNet is as large as 1; and in
    # float32, one of 0.01 cannot move by less than 1e-10.
    "lr": Range(1e-10, 1),
    "clip_norm": Range(0, is_open=True),
    # A loss times its weight, and the square of a prediction times w, stay far from the largest number of float32.
    **dict.fromkeys(("saliency_guidance", "retain_weight"), Range(0, 10**6)),
    "save_every": Range(0),  # minutes
}


def check_numbers(ranges: Mapping[str, Range] = RANGES, /, **values: float | None) -> None:
    """Raise UsageError for an option, by its parameter's name, whose value is out of range. None: it was not given."""
    for name, value in values.items():
        if value is not None and not ranges[name].holds(value):
            raise UsageError(f"--{name.replace('_', '-')} is {value}: give {ranges[name].words}.")
