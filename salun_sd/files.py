"""Output that is whole or not there: written beside its place and renamed into it."""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from salun_sd.errors import SalunError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file: whole or not there."""
    with new_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def place(source: Path, file: Path) -> None:
    """A file with the bytes of another, as a hard link where the file system has them; whole or not there."""
    with new_file(file) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it becomes `path` at the end, or is removed if anything goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    partial = _beside(path)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk does not say where
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`; it becomes `out` at the end, or is removed if anything goes wrong.

    `out` may be there if it is empty.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    partial = _beside(out)
    partial.mkdir()
    try:
        yield partial
        try:
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise SalunError(f"{out} was filled by another run meanwhile: what this one made was not kept.") from e
    except OSError as e:
        e.filename = e.filename or str(out)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _remove_stale(path: Path) -> None:
    """Take away what runs that were killed have left beside `path`."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if not _is_running(stale.name.split(".")[-2]):
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
