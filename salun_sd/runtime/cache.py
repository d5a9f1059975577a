"""The user's cache folder: entries of images and encodings, each used by one run at a time; listed and cleared."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from salun_sd.errors import SalunError
from salun_sd.runtime import ranks
from salun_sd.runtime.files import is_full
from salun_sd.runtime.texts import checked_text

logger = logging.getLogger(__name__)

KINDS = ("drawn", "encoded", "audited", "trained")  # the folders of the cache; nothing outside them is ever deleted
ABOUT = ".about"  # in an entry: one line that describes it to a person


class Entry(NamedTuple):
    """A folder of the cache."""

    kind: str
    name: str
    files: int
    bytes: int
    about: str  # one line that describes it
    used: float  # seconds since the epoch: the newest mtime of the folder and what is in it; `held` sets the folder's


def folder() -> Path:
    """$SALUN_SD_CACHE, or salun-sd in $XDG_CACHE_HOME or ~/.cache; absolute. Raises SalunError where ~ is needed and
    stands for no folder, as in many containers, and for a path that is no valid Unicode."""
    own, root = os.environ.get("SALUN_SD_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        place = Path(own or f"{root}/salun-sd").expanduser().absolute()
    except RuntimeError as e:
        raise SalunError("The home folder, for the cache, is not known: set SALUN_SD_CACHE to a folder.") from e
    checked_text(str(place), "The cache, SALUN_SD_CACHE,", SalunError)  # else it is written to, and never read
    return place


@contextmanager
def held(kind: str, key: str, about: str = "") -> Iterator[Path]:
    """The folder <cache>/<kind>/<key>, created if needed, locked for this run alone until the block ends.

    Waits, with a log line, while another run holds it. Blocks may be nested, also for the same key. `about` is shown
    with the entry. Raises SalunError if the cache cannot be written; a full disk stays an OSError.
    """
    by_main = held_by_main(kind, key, about) if ranks.is_main() else nullcontext(folder() / kind / key)
    with by_main as entry:
        ranks.wait()
        yield entry
        ranks.wait()


@contextmanager
def held_by_main(kind: str, key: str, about: str = "") -> Iterator[Path]:
    """As `held`, for a block that only the main process enters: the others do not wait for it."""
    entry = folder() / kind / key
    with ExitStack() as locks:
        try:
            _lock(entry, about, locks)
        except OSError as e:
            if is_full(e):
                raise
            raise SalunError(
                f"The cache {folder()} cannot be written ({e.strerror}): set SALUN_SD_CACHE to another folder."
            ) from e
        yield entry


def _lock(entry: Path, about: str, locks: ExitStack) -> None:
    """Lock the entry until `locks` is closed, and create it."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    # One lock object for each file in a process: a nested hold counts up, where two objects would deadlock.
    lock = FileLock(_lock_file(entry), is_singleton=True)
    try:
        locks.enter_context(lock.acquire(blocking=False))
    except Timeout:
        logger.warning(f"Another run is using {entry}; waiting for it.")
        locks.enter_context(lock.acquire(poll_interval=0.2))
    entry.mkdir(exist_ok=True)  # after the lock: `clear` may have removed it while this run waited
    (entry / ABOUT).write_text(about, encoding="utf-8")
    os.utime(entry)


def entries() -> list[Entry]:
    """The entries of the cache, largest first."""
    return sorted(map(_measure, _folders()), key=lambda e: (-e.bytes, e.kind, e.name))


def clear(older_than_days: float | None = None) -> tuple[int, int]:
    """Remove all entries, or those that were not used for so many days. Gives the number of files and of bytes removed.

    An entry that a run holds is kept, with a log line. Lock files stay: if one were replaced, two runs could hold the
    entry together. Raises OSError if something cannot be removed.
    """
    before = time.time() - (older_than_days or 0) * 86400
    files = size = 0
    for place in _folders():
        try:
            with FileLock(_lock_file(place)).acquire(blocking=False):
                entry = _measure(place)
                if place.is_dir() and (older_than_days is None or entry.used < before):
                    shutil.rmtree(place)  # removes links, never what they point to
                    files, size = files + entry.files, size + entry.bytes
        except Timeout:
            logger.warning(f"Another run is using {place}; it was not removed.")
    return files, size


def _lock_file(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.lock")


def _folders() -> Iterator[Path]:
    """The entries' folders: what has no lock file is not ours. A link is left out, with a log line."""
    for kind in KINDS:
        top = folder() / kind
        inside = sorted(top.iterdir()) if top.is_dir() and not top.is_symlink() else []
        for place in (top, *inside):
            if place.is_symlink():
                logger.warning(f"{place} is a link; its target is neither counted nor removed.")
            elif place != top and place.is_dir() and _lock_file(place).is_file():
                yield place


def _measure(place: Path) -> Entry:
    files, size, used = 0, 0, 0.0
    for parent, _, names in os.walk(place):
        for name in {".", *names} - {ABOUT}:
            try:
                stat = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue  # the partial file of a running process, renamed in the meantime
            used = max(used, stat.st_mtime)
            if name != ".":
                files, size = files + 1, size + stat.st_size
    file = place / ABOUT
    about = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return Entry(place.parent.name, place.name, files, size, about, used)
