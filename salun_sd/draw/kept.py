"""Images that a base draws once and the user's cache folder keeps: to train on, and to compare audits with."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from salun_sd.checkpoint.model import BUNDLED, Checkpoint
from salun_sd.draw import generate
from salun_sd.draw.sample import Row
from salun_sd.runtime import cache, ranks
from salun_sd.runtime.device import dtype_mark
from salun_sd.runtime.files import is_full, new_file, remove_stale

logger = logging.getLogger(__name__)


def key_of(base: Checkpoint, scheduler: str, steps: int, dtype: str = "float32") -> str:
    """The cache key of all images that a base draws with one scheduler and number of steps, in one dtype."""
    return hashlib.sha256(f"{base.identity} {scheduler} {steps}{dtype_mark(dtype)}".encode()).hexdigest()[:16]


def called(base: Checkpoint) -> str:
    """A base as the cache names it: where it is, and the beginning of its UNet's fingerprint. A folder of the disk goes
    by its kind of model, as others may hold the same base under other names."""
    name = base.name if base.revision or base.path in BUNDLED.values() else base.family.name
    return f"{name} ({base.fingerprint[:8]})"


@contextmanager
def kept_images(
    kind: str, base: Checkpoint, pipeline: Callable, rows: Sequence[Row], *, scheduler: str, steps: int, dtype: str,
    what: str,
) -> Iterator[list[Path]]:  # fmt: skip
    """The file of each row's image in the cache's folder `kind`, locked for this run until the block ends.

    Missing and changed images are drawn first, with what `pipeline` returns; `what` names them on the progress bar. A
    file's name depends on its row alone, so that runs share images, and a longer list of rows reuses a shorter one's.
    """
    settings = {"scheduler": scheduler, "steps": steps, "dtype": dtype}
    with _held(kind, base, **settings) as folder:
        files = [folder / _name_of(row) for row in rows]
        wanted = dict(zip(files, rows, strict=True))
        for _ in generate.draw(pipeline, wanted, identity=base.identity, **settings, redraw=True, what=what):
            pass
        yield files


def exchange(
    kind: str, base: Checkpoint, files: Mapping[Path, Row], missing: Container[Path], *, scheduler: str, steps: int,
    dtype: str,
) -> None:  # fmt: skip
    """Copy a base's images between a run's own `files`, of which some are `missing`, and the cache's folder `kind`:
    each gets what it lacks and the other has.

    The cache is locked while they are copied. A run calls this before it draws, and again afterwards, so runs that draw
    at the same time do not wait for each other. It makes no links: who changes an image of one changes no other. Where
    the cache has no room, it keeps no more.
    """
    settings = {"scheduler": scheduler, "steps": steps, "dtype": dtype}
    with _held(kind, base, **settings) as folder:
        if not ranks.is_main():
            return
        kept = {file: folder / _name_of(row) for file, row in files.items()}
        rows = {kept[file]: row for file, row in files.items()}
        absent = generate.missing(rows, identity=base.identity, **settings, redraw=True)
        copies = {file: place for file, place in kept.items() if file in missing and place not in absent}
        copies |= {place: file for file, place in kept.items() if place in absent and file not in missing}
        for parent in {copy.parent for copy in copies}:
            remove_stale(parent)
        for copy, original in copies.items():
            try:
                with new_file(copy, many=True) as new:
                    shutil.copyfile(original, new)
            except OSError as e:
                if copy in files or not is_full(e):
                    raise
                logger.warning("The cache has no room for the base's images: salun-sd cache --clear, or set "
                               "SALUN_SD_CACHE to another folder. The run goes on.")  # fmt: skip
                break


def _held(
    kind: str, base: Checkpoint, scheduler: str, steps: int, dtype: str
) -> AbstractContextManager[Path]:  # fmt: skip
    """The cache's folder for all images that a base draws with these settings, locked until the block ends."""
    about = f"by {called(base)}, {steps} steps of {scheduler.removesuffix('Scheduler')} in {dtype}"
    return cache.held(kind, key_of(base, scheduler, steps, dtype), about)


def _name_of(row: Row) -> Path:
    """The file of a row's image in the cache."""
    return Path("images", f"{hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]}.png")
