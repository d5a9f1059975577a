"""Texts, names and paths that a person gave: refused where they are empty or cannot be written as UTF-8."""

import re
from collections.abc import Iterable
from pathlib import Path

from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.documents import is_unicode

ARGUMENTS = ("model", "patch", "audits", "shards", "repo")  # parameters that are no options


def listed(value: str | Iterable[str] | None) -> list[str]:
    """The texts of an option that may be given several times, or once as it is, or not."""
    return [value] if isinstance(value, str) else list(value or ())


def is_hub_id(name: str) -> bool:
    """Whether a model's name has the form of a hub id, and is no path of this disk."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()


def checked_text(text: str, name: str, error: type[SalunError] = UsageError) -> str:
    """The text. Raises `error`, which calls it `name`, where it is no valid Unicode: Python reads a byte that is no
    UTF-8 as half of a surrogate pair, which can be written nowhere."""
    if not is_unicode(text):
        shown = text.encode(errors="backslashreplace").decode()
        raise error(f"{name} is '{shown}', which is no valid Unicode: type it in UTF-8, or rename the file or folder.")
    return text


def check_given(**options: object) -> None:
    """Raise UsageError for an option, by its parameter's name, with a text or path that is blank or no valid Unicode: a
    blank path would be the current folder. An option may have several; what is no text is passed over."""
    for name, value in options.items():
        option = name.upper() if name in ARGUMENTS else f"--{name.replace('_', '-')}"
        for text in value if isinstance(value, Iterable) and not isinstance(value, str) else [value]:
            if isinstance(text, str) and not text.strip():
                raise UsageError(f"{option} is empty: give a value.")
            if hasattr(text, "__fspath__") or isinstance(text, str):
                checked_text(str(text), option)
