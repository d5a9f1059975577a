"""Images that a base draws once, kept in the user's cache folder: to train on, and to compare audits with."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate
from salun_sd.draw.sample import Row
from salun_sd.runtime import cache


def key_of(base: Checkpoint, scheduler: str, steps: int) -> str:
    """The cache's name for all that a base draws with a scheduler in so many steps."""
    return hashlib.sha256(f"{base.identity} {scheduler} {steps}".encode()).hexdigest()[:16]


@contextmanager
def drawn(
    kind: str, base: Checkpoint, pipeline: Callable, rows: Sequence[Row], *, scheduler: str, steps: int, what: str
) -> Iterator[list[Path]]:  # fmt: skip
    """The file of each row's image, under the cache's `kind`, for this run alone until the end; another run that draws
    from this base is waited for. `what` names the images on the progress bar, and `pipeline` gives the base's if any is
    missing.

    An image is filed under what it is drawn from, so that runs share it, and more rows extend fewer; one that something
    changed is drawn anew.
    """
    about = f"by {Path(base.name).name}, {steps} steps of {scheduler.removesuffix('Scheduler')}"
    with cache.held(kind, key_of(base, scheduler, steps), about) as folder:
        files = [folder / "images" / f"{hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]}.png" for row in rows]
        wanted = dict(zip(files, rows, strict=True))
        drawing = generate.draw(pipeline, wanted, identity=base.identity, scheduler=scheduler, steps=steps, anew=True)
        for _ in tqdm(drawing, total=len(wanted), desc=f"draw {what}", unit="image"):
            pass
        yield files
