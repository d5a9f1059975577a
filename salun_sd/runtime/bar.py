"""How far a long pass has come: a bar on a terminal, elsewhere a log line now and then."""

import io
import logging
import os
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

AFTER = 1.0  # seconds; a pass that is over sooner shows nothing
_way = {"bars": True, "seconds": 60.0}


def show(*, bars: bool = True, seconds: float = 60.0) -> None:
    """How every Bar shows from now on: with `bars`, drawn where stderr is a terminal; else as a log line every so many
    seconds."""
    _way.update(bars=bars, seconds=seconds)


def is_drawn() -> bool:
    """Whether a Bar is drawn on stderr."""
    return _way["bars"] and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def in_time(seconds: float) -> str:
    """A time in two units at most, as in "3 h 20 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


class Bar(tqdm):
    """tqdm's bar, with its parameters; the total is known. Where it is not drawn, it logs how much is done and the time
    left; the log record has the numbers as its `fields`."""

    def __init__(self, iterable=None, **options):
        self.drawn, self.told_at, self.told = is_drawn(), time.monotonic(), None
        elsewhere = {} if self.drawn else {"file": io.StringIO(), "miniters": 0}
        super().__init__(iterable, delay=AFTER, **elsewhere, **options)

    def display(self, msg=None, pos=None):
        if self.format_dict["elapsed"] < AFTER:  # `reset` asks for it at once
            return False
        if self.drawn:
            return super().display(msg, pos)
        now, ends = time.monotonic(), self.told is not None and self.n == self.total
        if self.n != self.told and (ends or now - self.told_at >= _way["seconds"]):
            self.told_at, self.told = now, self.n
            self._log()
        return True

    def _log(self) -> None:
        of = self.format_dict
        rate = of["rate"] or (self.n - self.initial) / of["elapsed"]
        left = (self.total - self.n) / rate if rate and self.total else None
        fields = {"event": "progress", "what": self.desc, "done": int(self.n), "of": self.total,
                  "unit": self.unit, "left": left and round(left, 1)}  # fmt: skip
        time_left = "" if left is None else f", {self.format_interval(left)} left"
        values = f" ({self.postfix})" if self.postfix else ""
        logger.info(f"{self.desc}: {fields['done']:,} of {self.total:,}{time_left}{values}", extra={"fields": fields})
