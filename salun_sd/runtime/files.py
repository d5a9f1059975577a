"""Output files and folders that are whole or not there: written beside their place, put on the disk, then renamed."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from salun_sd.errors import SalunError, UsageError

# A partial file or folder, and the lock that its writer holds: of the name or, if that is long, of its digest. Earlier
# versions had the number of the process in place of the random part, and no lock.
HIDDEN = re.compile(r"\.(?P<of>.+)\.(?P<random>[0-9a-f]+)\.(partial-lock|partial)", re.DOTALL)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file: whole or not there."""
    with new_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path, many: bool = False) -> Iterator[Path]:
    """A file to write beside `path`. At the end it is on the disk and becomes `path`; after any failure it is removed.

    What killed runs left of this file is removed first. That reads the whole folder, so who writes `many` files into
    one calls `remove_stale` for it once. Nor are these put on the disk one by one: such a file can be lost or damaged
    by a power cut, and has to be checked when it is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not many:
        remove_stale(path.parent, path.name)
    with _partial(path) as partial:
        yield partial
        if not many:
            to_disk(partial)
        os.replace(partial, path)
        if not many:
            to_disk(path.parent, inside=False)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`. At the end it is on the disk and becomes `out`; after any failure it is removed.

    An empty folder `out` is replaced. Raises SalunError if another run fills it in the meantime.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(out.parent, out.name)
    with _partial(out) as partial:
        partial.mkdir()
        yield partial
        to_disk(partial)
        try:
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise SalunError(
                f"{out} was filled by another run meanwhile, so this result was not kept: give another --out."
            ) from e
        to_disk(out.parent, inside=False)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, with a lock that says that its writer lives; afterwards both are gone."""
    partial, lock = _hidden(path)
    try:
        yield partial
    except OSError as e:
        if is_full(e) or not e.filename:  # such an error names no file, or the source of a copy
            e.filename, e.filename2 = str(path), None
        raise
    finally:
        _remove(partial)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def named_where_full(path: Path) -> Iterator[None]:
    """Inside, an error of a full disk that names no file is given the name of `path`."""
    try:
        yield
    except OSError as e:
        if is_full(e) and not e.filename:
            e.filename = str(path)
        raise


def _hidden(path: Path) -> tuple[Path, FileLock]:
    """A new hidden name beside `path`, and its lock, held."""
    while True:
        partial = path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}.partial")
        lock = FileLock(f"{partial}-lock")
        with suppress(Timeout):  # `remove_stale` of another run had it, or removed it
            lock.acquire(blocking=False)
            if Path(lock.lock_file).exists():
                return partial, lock
            lock.release()


def _short(name: str) -> str:
    """A name that leaves room for more in the 255 bytes that most file systems allow: itself, or its digest."""
    return name if len(os.fsencode(name)) <= 200 else hashlib.sha256(os.fsencode(name)).hexdigest()


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Remove the partial files and folders that killed runs left in a folder: those of `name`, or all.

    A run that lives holds its lock, whatever its process number and on whatever machine.
    """
    found = map(HIDDEN.fullmatch, os.listdir(folder) if folder.is_dir() else ())
    for of, random in {(m["of"], m["random"]) for m in found if m and (name is None or m["of"] == _short(name))}:
        partial = folder / f".{of}.{random}.partial"
        with suppress(OSError), FileLock(f"{partial}-lock").acquire(blocking=False):  # held, or not ours to remove
            _remove(partial)
            Path(f"{partial}-lock").unlink(missing_ok=True)


def _remove(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)


def to_disk(path: Path, inside: bool = True) -> None:
    """Wait until a file, or a folder and all that is `inside`, is on the disk.

    What was written is then no longer cached in memory, where the system allows that: who reads it reads the disk.
    """
    if path.is_dir():
        for child in path.iterdir() if inside else ():
            to_disk(child)
        with suppress(OSError), _descriptor(path) as folder:  # not every system can do that for a folder
            os.fsync(folder)
        return
    with _descriptor(path) as file:
        os.fsync(file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_place(out: Path, *beside: Path, advice: str = "give another --out") -> None:
    """Raise UsageError, which ends in what to do, unless a file or folder `out`, and those `beside` it, can be made.
    Nothing is left there."""
    folder = next(p for p in out.absolute().parents if os.path.lexists(p))
    try:
        for path in (out.absolute(), *(p.absolute() for p in beside)):
            str(path).encode()
            for place in (path, *(folder / part for part in path.relative_to(folder).parts)):
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.lstat(place)  # raises for a name or a path that is too long
        path = folder
        tempfile.TemporaryFile(dir=path).close()
    except UnicodeEncodeError as e:
        raise UsageError(f"{ascii(str(path))} is no valid Unicode text: {advice}.") from e
    except OSError as e:
        raise UsageError(f"{path} cannot be written ({e.strerror}): {advice}.") from e


def is_full(e: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, has no room, or no file may be as large."""
    return isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
