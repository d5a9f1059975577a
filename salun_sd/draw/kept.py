"""Images that a base draws once and the user's cache folder keeps: to train on, and to compare audits with."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from salun_sd.checkpoint.model import BUNDLED, Checkpoint
from salun_sd.draw import generate
from salun_sd.draw.sample import Row
from salun_sd.runtime import cache
from salun_sd.runtime.device import dtype_mark


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
    what: str, until: float | None = None,
) -> Iterator[list[Path | None]]:  # fmt: skip
    """The file of each row's image in the cache's folder `kind`, locked for this run until the block ends.

    Missing and changed images are drawn first, with what `pipeline` returns; `what` names them on the progress bar. A
    file's name depends on its row alone, so that runs share images, and a longer list of rows reuses a shorter one's.
    Drawing ends at `until`, as in `generate.draw`; then None stands for the images that are still missing.
    """
    about = f"by {called(base)}, {steps} steps of {scheduler.removesuffix('Scheduler')} in {dtype}"
    with cache.held(kind, key_of(base, scheduler, steps, dtype), about) as folder:
        files = [folder / "images" / f"{hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]}.png" for row in rows]
        wanted = dict(zip(files, rows, strict=True))
        settings = {"identity": base.identity, "scheduler": scheduler, "steps": steps, "dtype": dtype, "redraw": True}
        for _ in generate.draw(pipeline, wanted, **settings, what=what, until=until):
            pass
        missing = generate.missing(wanted, **settings) if until is not None else ()
        yield [None if file in missing else file for file in files]
