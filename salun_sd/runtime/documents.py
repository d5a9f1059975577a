"""JSON that this run did not just write: read whole, of a known shape, or refused with the name of file and key."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salun_sd.errors import SalunError
from salun_sd.runtime.contents import content_of, gone

MOST_BYTES, MOST_LEVELS = 64 * 2**20, 64
KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", dict: "an object",
         list: "a list", None: "null", object: "anything"}  # fmt: skip

# A shape says what a value must be: one of KINDS; [shape], a list of such values; {"key": shape, "other?": shape}, an
# object that has `key`, may have `other`, and may have any others; {str: shape}, an object of such values, whatever
# their keys; (shape, shape), one of several, the usual one first.
Shape = Any
Error = Callable[[str], SalunError]  # from the sentence that says what is wrong


def read_json(file: Path, shape: Shape = object, error: Error = SalunError, most: int = MOST_BYTES) -> Any:
    """The value in a JSON file. Raises `error` as `parse_json` does, for a file that cannot be read and for one of more
    than `most` bytes; FileNotFoundError where there is none."""
    try:
        content = content_of(file, most)
    except FileNotFoundError as e:
        if sentence := gone(file):
            raise error(sentence) from e
        raise
    except OSError as e:
        raise error(f"{file} cannot be read: {e.strerror}.") from e
    return parse_json(content, str(file), shape, error)


def parse_json(text: str | bytes, name: str, shape: Shape = object, error: Error = SalunError) -> Any:
    """The value of a JSON text, which errors call `name`.

    Raises `error`, which names the key, for text that is no JSON or no valid Unicode, is nested deeper than MOST_LEVELS
    or has not this shape.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text)
        if fault := (None if _is_plain(text) else _limits(value)) or _fault(value, shape, ""):
            raise ValueError(fault)
    except UnicodeDecodeError as e:
        raise error(f"{name} is damaged: it is no UTF-8 text.") from e
    except RecursionError as e:
        raise error(f"{name} is damaged: it is nested too deeply.") from e
    except ValueError as e:  # a JSONDecodeError too
        raise error(f"{name} is damaged: {e}.") from e
    return value


def _is_plain(text: str) -> bool:
    """Whether no value of a JSON text can be beyond the limits: it has few brackets, and no half of a surrogate pair,
    escaped or not. Seen at a glance, where `_limits` looks at each text."""
    return text.count("{") + text.count("[") < MOST_LEVELS and "\\u" not in text and is_unicode(text)


def _limits(value: Any) -> str | None:
    """What is wrong with the depth of a value or with its texts."""
    level = [value]
    for _ in range(MOST_LEVELS):
        texts = [v for v in level if isinstance(v, str)]
        deeper = []
        for v in level:
            if isinstance(v, dict):
                texts += v
                deeper += v.values()
            elif isinstance(v, list):
                deeper += v
        if odd := next((text for text in texts if not is_unicode(text)), None):
            return f"{ascii(odd)} is no valid Unicode"
        level = deeper
    return "it is nested too deeply" if level else None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault(value: Any, shape: Shape, key: str) -> str | None:
    """Where a value has not this shape, in words; `key` is its place."""
    if isinstance(shape, tuple):
        faults = [_fault(value, s, key) for s in shape]
        return None if None in faults else faults[0]
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _not(dict, key)
        if str in shape:
            places = ((v, f"{key}.{name}".lstrip(".")) for name, v in value.items())
            return next((fault for v, place in places if (fault := _fault(v, shape[str], place))), None)
        for name, inner in shape.items():
            place = f"{key}.{name.rstrip('?')}".lstrip(".")
            if name.rstrip("?") in value:
                if fault := _fault(value[name.rstrip("?")], inner, place):
                    return fault
            elif not name.endswith("?"):
                return f"it has no {place}"
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _not(list, key)
        return next((fault for i, v in enumerate(value) if (fault := _fault(v, shape[0], f"{key}[{i}]"))), None)
    return None if _is(value, shape) else _not(shape, key)


def _is(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is float:  # neither NaN nor infinite, nor an integer that no float holds
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _not(kind: type | None, key: str) -> str:
    return f"{key or 'its content'} is not {KINDS[kind]}"
