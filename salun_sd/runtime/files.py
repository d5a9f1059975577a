"""Output files and folders that are whole or not there: written beside their place, then renamed into it."""

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
def new_file(path: Path, sweep: bool = True) -> Iterator[Path]:
    """A file to write beside `path`. At the end it becomes `path`; after any failure it is removed.

    With `sweep`, what killed runs left of this file is removed first. That reads the whole folder: who writes many
    files into one calls `remove_stale` for it once, and writes them with sweep=False.
    """
    if sweep:
        remove_stale(path.parent, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # the error of a full disk names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`. At the end it becomes `out`; after any failure it is removed.

    An empty folder `out` is replaced. Raises SalunError if another run fills it in the meantime.
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
            raise SalunError(
                f"{out} was filled by another run meanwhile, so this result was not kept: give another --out."
            ) from e
    except OSError as e:
        e.filename = e.filename or str(out)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Remove the partial files and folders that killed runs left in a folder: those of `name`, or all."""
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
