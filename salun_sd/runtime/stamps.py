"""What was found of files, noted beside them: a note holds as long as its file has the size and times that it had."""

import json
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path

from salun_sd.runtime import ranks
from salun_sd.runtime.files import named_where_full

FILE = re.compile(r"\.stamps-\d+")  # of a process of a run
State = tuple[int, ...]


class Stamps:
    """The notes on files, by their paths from a folder.

    Each process of a run appends lines to a file of its own. A line that a kill has cut short, or that is damaged, is
    none. Where a file was replaced, changed or copied, its times say so, and there is no note: the file has to be
    looked at.
    """

    def __init__(self, folder: Path):
        self._folder, self._own = folder, folder / f".stamps-{ranks.rank()}"
        self._notes: dict[tuple, str] = {}
        for place in sorted(folder.glob(".stamps-*")):
            for line in place.read_bytes().split(b"\n"):
                content, _, check = line.rpartition(b" ")
                if check == _check(content):
                    with suppress(ValueError, TypeError):  # of another program
                        name, state, note = json.loads(content)
                        self._notes[(name, *state)] = note

    def of(self, name: str) -> str | None:
        """The note on a file as it is now; None without one."""
        return self._notes.get((name, *state_of(self._folder / name)))

    def add(self, name: str, state: State, note: str) -> None:
        """Note something of a file, found after `state_of` it was taken."""
        content = json.dumps([name, state, note]).encode()
        with named_where_full(self._own), self._own.open("ab") as file:
            file.write(b"\n" + content + b" " + _check(content) + b"\n")


def state_of(file: Path) -> State:
    """A file's size in bytes, and when its content and its entry changed, in ns; empty where there is none."""
    with suppress(OSError):
        stat = os.stat(file)
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return ()


def _check(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)
