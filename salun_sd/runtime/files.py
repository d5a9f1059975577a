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


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it becomes `path` at the end, or is removed if anything goes wrong."""
    remove_stale(path.parent, path.name)
    with one_of_many(path) as partial:
        yield partial


@contextmanager
def one_of_many(path: Path) -> Iterator[Path]:
    """As `new_file`, for a folder of many: who writes them calls `remove_stale` for it, once."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    remove_stale(out.parent, out.name)
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


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Take away what runs that were killed have left in a folder, of the file `name` or of all. Reads the folder."""
    for stale in folder.glob(f".{glob.escape(name) if name else '*'}.*.partial"):
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
