"""The user's cache folder: entries of images and encodings that one run at a time may fill, counted and cleared."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from salun_sd.errors import SalunError
from salun_sd.runtime import ranks

logger = logging.getLogger(__name__)

KINDS = ("drawn", "encoded", "audited")  # the folders of the cache; nothing outside them is ever deleted
ABOUT = ".about"  # in an entry: one line for its reader
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Entry(NamedTuple):
    """A folder of the cache."""

    kind: str
    name: str
    files: int
    bytes: int
    about: str  # what its maker says of it
    used: float  # newest mtime of the folder and what is in it; `held` sets the folder's


def folder() -> Path:
    """$SALUN_SD_CACHE, or salun-sd in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SALUN_SD_CACHE") or Path(root) / "salun-sd")


@contextmanager
def held(kind: str, key: str, about: str = "") -> Iterator[Path]:
    """The folder <cache>/<kind>/<key>, made if need be, for this run alone until the end; where another holds it, says
    so and waits. May be nested, for the same key too. `about` is shown with the entry.

    Raises SalunError where the cache cannot be written; a full disk is an OSError, as anywhere.
    """
    entry = folder() / kind / key
    with ExitStack() as hold:
        if ranks.is_main():  # for all the processes of the run
            try:
                _take(entry, about, hold)
            except OSError as e:
                if e.errno in FULL_DISK:
                    raise
                raise SalunError(
                    f"The cache {folder()} cannot be written ({e.strerror}): set SALUN_SD_CACHE to another folder."
                ) from e
        ranks.wait()
        yield entry
        ranks.wait()


def _take(entry: Path, about: str, hold: ExitStack) -> None:
    """Make the entry this run's until `hold` ends."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    # One lock object for a file in a process: a hold inside a hold counts up, where two objects would deadlock.
    lock = FileLock(_lock_of(entry), is_singleton=True)
    try:
        hold.enter_context(lock.acquire(blocking=False))
    except Timeout:
        logger.warning(f"Another run is using {entry}; waiting for it.")
        hold.enter_context(lock.acquire(poll_interval=0.2))
    entry.mkdir(exist_ok=True)  # under the lock: `clear` may have removed it while this run waited
    (entry / ABOUT).write_text(about, encoding="utf-8")
    os.utime(entry)


def entries() -> list[Entry]:
    """What the cache holds, largest first; what is not a folder is left out."""
    return sorted(map(_measured, _folders()), key=lambda e: (-e.bytes, e.kind, e.name))


def clear(older_than_days: float | None = None) -> tuple[int, int]:
    """Remove the entries, or those that were not used for so many days; gives back how many files and bytes that were.

    An entry that a run holds is left, and that is said. Lock files stay: a run that waits for one that was replaced
    would hold the entry together with another. Raises OSError where something cannot be removed.
    """
    before = time.time() - (older_than_days or 0) * 86400
    files = size = 0
    for place in _folders():
        try:
            with FileLock(_lock_of(place)).acquire(blocking=False):
                entry = _measured(place)
                if place.is_dir() and (older_than_days is None or entry.used < before):
                    shutil.rmtree(place)  # takes links away, never what they point to
                    files, size = files + entry.files, size + entry.bytes
        except Timeout:
            logger.warning(f"Another run is using {place}; it was left.")
    return files, size


def _lock_of(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")


def _folders() -> Iterator[Path]:
    """The entries' folders; hidden names are lock and partial files. A link is named on stderr and left out."""
    for kind in KINDS:
        top = folder() / kind
        inside = sorted(top.iterdir()) if top.is_dir() and not top.is_symlink() else []
        for place in (top, *inside):
            if place.is_symlink():
                logger.warning(f"{place} is a link: what it points to is neither counted nor removed.")
            elif place != top and place.is_dir() and not place.name.startswith("."):
                yield place


def _measured(place: Path) -> Entry:
    files, size, used = 0, 0, 0.0
    for parent, _, names in os.walk(place):
        for name in {".", *names} - {ABOUT}:
            try:
                stat = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue  # the partial file of a run that goes on: renamed meanwhile
            used = max(used, stat.st_mtime)
            if name != ".":
                files, size = files + 1, size + stat.st_size
    about = place / ABOUT
    said = about.read_text(encoding="utf-8", errors="replace") if about.is_file() else ""
    return Entry(place.parent.name, place.name, files, size, said, used)
