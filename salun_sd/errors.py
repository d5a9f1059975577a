"""What goes wrong in words: the text is shown to the person, without a traceback."""

import re
from collections.abc import Sequence


class SalunError(Exception):
    """Something failed; one sentence that names it, and the next command to type. Exit code 1."""

    exit_code = 1


class UsageError(SalunError):
    """The command's own arguments are wrong or cannot go together. Exit code 2."""

    exit_code = 2


def some(names: Sequence[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def first_line(e: Exception) -> str:
    """The first sentence of what a library says."""
    return re.split(r"\n|\. ", str(e).strip())[0].rstrip(".") or type(e).__name__
