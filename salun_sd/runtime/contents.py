"""Files of other programs, read whole; what is no file, such as a pipe, is refused at once."""

import errno
import hashlib
import os
import stat
from pathlib import Path

from salun_sd.errors import SalunError

MOST_BYTES = 2**30
PART = 2**20  # bytes of a file that are read at once to hash it


def file_bytes(file: Path) -> bytes:
    """The content of a file. Raises SalunError as `content_of` raises OSError."""
    try:
        return content_of(file)
    except OSError as e:
        raise SalunError(f"{file} cannot be read: {e.strerror}.") from e


def gone(file: Path) -> str | None:
    """A sentence for a link whose target is not there, as in a hub's cache that was cleared; None for all else."""
    if file.is_symlink() and not file.exists():
        return f"{file} is a link to {os.readlink(file)}, which is gone: download it again."
    return None


def no_file(file: Path) -> str | None:
    """Why a path that a person gave is no file to read, in words; None for a file, also behind a link."""
    if file.is_file():
        return None
    return "is no regular file" if file.exists() else "was not found"


def content_of(file: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises OSError where it cannot be read, for more than `most` bytes, and for a pipe or a
    device, which may never end."""
    try:
        status = file.stat()
    except ValueError as e:  # a name with a NUL
        raise OSError(errno.EINVAL, "it is no name of a file", str(file)) from e
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20:,} MiB", str(file))
    return file.read_bytes()


def hash_into(whole: "hashlib._Hash", file: Path) -> None:
    """Add a file's bytes to a hash, a part at a time. Raises OSError where it cannot be read."""
    with file.open("rb") as opened:
        while part := opened.read(PART):
            whole.update(part)


def check_files(folder: Path) -> None:
    """Raise SalunError for a pipe or a device in a folder that another library will read: it may wait for ever."""
    for file in folder.glob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise SalunError(f"{file} cannot be read: it is no regular file.")
