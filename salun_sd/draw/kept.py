"""Images that a base draws once and the user's cache folder keeps: to train on, and to compare audits with."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    with cache.held(kind, *_entry(base, **settings)) as folder:
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
    if ranks.is_main():
        try:
            with cache.held_by_main(kind, *_entry(base, **settings)) as folder:
                _copy(folder, files, missing, identity=base.identity, **settings)
        except OSError as e:
            if not is_full(e) or e.filename in map(str, files):
                raise
            logger.warning("The cache has no room for the base's images: salun-sd cache --clear, or set "
                           "SALUN_SD_CACHE to another folder. The run goes on.")  # fmt: skip
    ranks.wait()


def _copy(folder: Path, files: Mapping[Path, Row], missing: Container[Path], **settings: str | int) -> None:
    """Copy images from an entry of the cache to the run's `missing` files, then others from the run to the entry."""
    kept = {file: folder / _name_of(row) for file, row in files.items()}
    rows = {kept[file]: row for file, row in files.items()}
    absent = generate.missing(rows, **settings, redraw=True)
    copies = {file: place for file, place in kept.items() if file in missing and place not in absent}
    copies |= {place: file for file, place in kept.items() if place in absent and file not in missing}
    for parent in {copy.parent for copy in copies}:
        remove_stale(parent)
    for copy, original in copies.items():
        with new_file(copy, many=True) as new:
            shutil.copyfile(original, new)


def _entry(base: Checkpoint, scheduler: str, steps: int, dtype: str) -> tuple[str, str]:
    """The key of the cache's entry for all images that a base draws with these settings, and a line about it."""
    about = f"by {called(base)}, {steps} steps of {scheduler.removesuffix('Scheduler')} in {dtype}"
    return key_of(base, scheduler, steps, dtype), about


def place_of(kind: str, base: Checkpoint, row: Row, *, scheduler: str, steps: int, dtype: str) -> Path:
    """Where the cache's folder `kind` has the image that a base draws of a row, if it has it."""
    return cache.folder() / kind / key_of(base, scheduler, steps, dtype) / _name_of(row)


def _name_of(row: Row) -> Path:
    """The file of a row's image in the cache."""
    return Path("images", f"{hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]}.png")
