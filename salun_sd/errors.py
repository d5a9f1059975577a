"""Failures as sentences: a person reads the text, and no traceback."""

import re
from collections.abc import Sequence


class SalunError(Exception):
    """A failure, as one sentence that names it and, where it helps, the next command to type. Exit code 1."""

    exit_code = 1


class UsageError(SalunError):
    """An argument of the command is invalid, or two cannot go together. Exit code 2."""

    exit_code = 2


class TrainingError(SalunError):
    """A training came to nothing by its own settings and data: the same command comes to the same again."""


class OutOfTime(SalunError):
    """What ends before it has a result, because its time is over; the same command goes on."""

    exit_code = 4


def some(names: Sequence[str], count: int = 5) -> str:
    """The first `count` names, and how many more there are."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def cut(text: str, most: int = 200) -> str:
    """A text that a person gave, at most so many characters of it."""
    return text if len(text) <= most else f"{text[:most]}..."


def first_line(e: Exception) -> str:
    """The first sentence of another library's message, without its full stop."""
    return re.split(r"\n|\. ", str(e).strip())[0].rstrip(".") or type(e).__name__


def reason(e: Exception) -> str:
    """Why something failed, in words, without a full stop."""
    if isinstance(e, OSError):
        name = e.filename2 or e.filename  # of a copy or a move, the second is the one that is written
        return f"cannot read or write{f' {name}' if name else ''}: {e.strerror or first_line(e)}"
    if isinstance(e, ImportError):
        return f"a package is missing, or does not fit the others: {first_line(e)}"
    return f"{type(e).__name__}: {first_line(e)}" if is_bug(e) and str(e) else first_line(e)


def is_out_of_memory(e: BaseException) -> bool:
    texts = ("out of memory", "can't allocate memory")
    return isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and any(text in str(e) for text in texts))


def is_bug(e: BaseException) -> bool:
    """Whether a failure is a fault of salun-sd: not of what it was given, and not of the machine."""
    if isinstance(e, ImportError):
        return (e.name or "").startswith("salun_sd")
    return not isinstance(e, SalunError | OSError) and not is_out_of_memory(e)
