"""The images of an audit's models: what can be refused first, then drawn as far as the time allows."""

import logging
from functools import cache, partial
from itertools import takewhile
from pathlib import Path

import torch

from salun_sd.audit.request import Request, seconds_in
from salun_sd.checkpoint.load import load_pipeline, load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate
from salun_sd.draw.encode import warn_of_long
from salun_sd.draw.kept import exchange
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import OutOfTime
from salun_sd.runtime.cache import folder as cache_folder
from salun_sd.runtime.device import Precision, default_device, dtype_name
from salun_sd.runtime.escape import line
from salun_sd.runtime.files import check_place

logger = logging.getLogger(__name__)


def check(audited: Checkpoint | None, base: Checkpoint | None, request: Request, sampling: dict) -> None:
    """Raise UsageError where a model cannot be drawn on these prompts. Logs prompts that are too long for it."""
    for checkpoint in filter(None, (audited, base)):
        generate.check(checkpoint, request.rows, **sampling)
    if drawn := audited or base:
        warn_of_long(load_tokenizers(drawn), [p.text for p in request.rows], drawn.name)
    if base:
        place = cache_folder() / "audited" / "base"  # its images are kept there
        check_place(place, advice="set SALUN_SD_CACHE to another folder")


def dtype_to_draw_in(requested: str | None) -> torch.dtype:
    """--dtype, or what suits the device. Logs it, and why."""
    precision = Precision.to_draw(requested, default_device())
    logger.info(f"Images are drawn in {dtype_name(precision.dtype)}: {precision.reason}.")
    return precision.dtype


def ends(begun: float, limit_time: str | None, models: int) -> list[float | None]:
    """The moments at which the drawing of each of the models has to end: they have the same share of the time."""
    if limit_time is None:
        return [None]
    return [begun + seconds_in(limit_time) * n / max(1, models) for n in range(1, models + 1)]


def draw(
    model: Checkpoint, prompts: list[Prompt], samples: int, out: Path, *, steps: int | None, scheduler: str | None,
    dtype: torch.dtype, until: float | None, keep: bool = False,
) -> tuple[list[Prompt], dict]:  # fmt: skip
    """Draw the images that are missing in out/images, until a moment of time.monotonic. Returns the prompts before the
    first of which an image is still missing, and the sampling settings for the report.

    With `keep`, the images also stay in the user's cache for the next audit.
    """
    sampling = {"scheduler": scheduler or model.scheduler, "steps": steps or model.sampling[0],
                "dtype": dtype_name(dtype)}  # fmt: skip
    default_size = model.image_size, model.image_size
    files = {out / generate.file_of(p, k): generate.row_of(p, k, default_size) for p in prompts for k in range(samples)}
    pipeline, what = cache(partial(load_pipeline, model, dtype=dtype)), line(Path(model.name).name)
    find_missing = partial(generate.missing, files, identity=model.identity, **sampling)
    missing = find_missing() if keep else {}
    shares = keep and (missing or not (out / "manifest.jsonl").is_file())  # else it gave the cache its images once
    if shares:
        exchange("audited", model, files, missing, **sampling)
    for _ in generate.draw(pipeline, files, identity=model.identity, what=what, until=until, **sampling):
        pass
    missing = find_missing() if until is not None else {}
    if shares:
        exchange("audited", model, files, missing, **sampling)
    if missing:
        prompts = list(
            takewhile(lambda p: all(out / generate.file_of(p, k) not in missing for k in range(samples)), prompts)
        )
        if not prompts:
            raise OutOfTime(f"No prompt has all of its images of {model.name} yet: type the same command again to go "
                             "on, or give a longer --limit-time.")  # fmt: skip
    return prompts, {"identity": model.identity, **sampling, "samples": samples, "safety_checker": "off"}


def manifest(model: Checkpoint, prompts: list[Prompt], samples: int, sampling: dict) -> list[dict]:
    """A line for each image that a model drew, in the order of the cases."""
    steps, size = sampling["steps"] or model.sampling[0], (model.image_size, model.image_size)
    return [
        generate.line_of(p, k, generate.file_of(p, k), generate.row_of(p, k, size), steps)
        for p in sorted(prompts, key=lambda p: p.case)
        for k in range(samples)
    ]
