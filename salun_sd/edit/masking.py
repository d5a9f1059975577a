"""The work of `mask`: the weights that matter to a concept, found and written."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from salun_sd import __version__
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.core.diffusion import Condition, Examples
from salun_sd.core.saliency import GradientSum, sum_dtype
from salun_sd.edit import maskfile, supports
from salun_sd.edit.checks import (
    check_kept,
    check_replaceable,
    checked_size,
    densities_of,
    images_of,
    named,
    plain,
)
from salun_sd.edit.concepts import Concept, concepts_of, text_of
from salun_sd.edit.datasets import Item
from salun_sd.edit.encodings import LoadedBase, encode
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.resources import Compute, Forecast, schedule_of
from salun_sd.edit.sources import check_texts
from salun_sd.edit.steps import Masking
from salun_sd.edit.training_data import forget_items
from salun_sd.methods import salun
from salun_sd.runtime import memory, ranks
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.device import check_dtype, dtype_name
from salun_sd.runtime.files import new_file
from salun_sd.runtime.ranges import check_numbers
from salun_sd.runtime.texts import check_given

logger = logging.getLogger(__name__)


class Masks(NamedTuple):
    """What `mask` wrote."""

    files: list[tuple[Path, Mask]]
    run: dict  # as in run.json: seconds, peak_bytes and planned_bytes of each step


def mask(
    model: str | Path | Checkpoint, concept: str | Concept | Sequence[str | Concept], *,
    out: str | Path = "mask.safetensors", density: float | Sequence[float] = 0.5,
    saliency_guidance: float | None = None, forget: str | Path | None = None, samples: int = 800,
    size: int | None = None, batch_size: int = 8, seed: int = 0, dtype: str | None = None,
    checkpointing: bool | None = None, dry_run: bool = False, config: str | None = None, revision: str | None = None,
    variant: str | None = None,
) -> Masks | Forecast:  # fmt: skip
    """Find the weights that matter to a concept, and write a mask file for each density. Parameters are those of
    `salun-sd mask`. With several densities, the name of each file ends in its density.

    With `dry_run`, gives the settings and the planned memory, and writes nothing. Raises UsageError for arguments that
    are wrong or cannot go together, SalunError for anything else that fails, each with a sentence for a person.
    """
    # prepare: what can be wrong is checked here
    check_given(model=model, concept=concept, forget=forget, out=out, config=config, revision=revision, variant=variant)
    started, out = time.monotonic(), Path(out)
    seed, densities = plain(seed), densities_of(density)
    paths = [out if len(densities) == 1 else out.with_name(f"{out.stem}-{d:g}{out.suffix}") for d in densities]
    concepts = concepts_of(concept, forget=text_of(forget), needs_anchor=False)
    check_numbers(saliency_guidance=saliency_guidance, samples=samples, size=size, batch_size=batch_size, seed=seed)
    check_dtype(dtype)
    for path in paths:
        check_replaceable(path)
    base = opened(model, config, revision, variant)
    size, saliency_guidance = checked_size(base, size), supports.saliency_guidance(base, saliency_guidance)
    concepts = named(base, concepts)
    check_kept(base, densities)
    images = [images_of(c.images, c.prompt) for c in concepts]
    check_texts(base, concepts, images)
    compute = Compute.of(base, dtype, checkpointing)
    steps = [compute.drawing(size, draws=not all(images)),
             compute.work(Masking, size, batch=batch_size, guidance=saliency_guidance)]  # fmt: skip
    if dry_run:
        settings = {"model": base.name, "concepts": [text for c in concepts for text in c.prompts()],
                    "densities": densities, "saliency_guidance": saliency_guidance, "batch_size": batch_size,
                    "seed": seed, "size": size, **compute.dtypes()}  # fmt: skip
        return compute.forecast(steps, settings, {"masks": len(densities) * compute.mask_bytes()})
    for path in filter(Path.exists, paths):
        logger.info(f"{path} exists; the new mask replaces it.")
    planned = compute.planned_bytes(steps)

    # collect
    examples, empty = _collect(LoadedBase(base, size, compute.drawn_in.dtype), concepts, images, samples)
    peaks = {"images": memory.reset_peak()}

    # find the masks, write
    results = make_masks(
        base, compute.unet(), examples, empty, concepts, densities, saliency_guidance, seed, batch_size
    )  # fmt: skip
    peaks["mask"] = memory.reset_peak()
    if ranks.is_main():
        for path, result in zip(paths, results, strict=True):
            with new_file(path) as partial:
                maskfile.write(partial, result)
    return Masks(list(zip(paths, results, strict=True)), run_record(started, peaks, planned))


def _collect(
    base: LoadedBase, concepts: Sequence[Concept], images: Sequence[list[Item] | None], samples: int
) -> tuple[Examples, Condition]:  # fmt: skip
    """D_f of all concepts together, encoded, and the prompt ""."""
    items = [item for of_concept in forget_items(base, concepts, images, samples) for item in of_concept]
    examples, row = encode(base, items, [""])
    return examples, examples.rows([row[""]])


def make_masks(
    model: Checkpoint, unet, forget: Examples, empty: Condition, concepts: Sequence[Concept], densities: list[float],
    guidance: float, seed: int, batch_size: int,
) -> list[Mask]:  # fmt: skip
    """One pass over D_f for the gradient, then one mask for each density. `empty` is the prompt ""."""
    weights = sum(p.numel() for p in unet.parameters())
    counts = [masks.keep_count(d, weights) for d in densities]
    sums = GradientSum(unet, memory.device_with_room(unet.device, weights * sum_dtype(weights).itemsize), model.name)
    passes = salun.forget_gradient(
        unet, schedule_of(model), forget, empty, guidance=guidance, seed=seed, batch_size=batch_size, name=model.name
    )
    with sums, Bar(total=len(forget), desc="saliency", unit="image") as bar:
        for done in passes:
            bar.update(done - bar.n)
    settings = {"concepts": [text for c in concepts for text in c.prompts()], "guidance": plain(guidance),
                "images": len(forget), "seed": seed, "dtype": dtype_name(unet.dtype),
                "base": model.fingerprint, "model": model.name, "salun_sd": __version__}  # fmt: skip
    cuts = masks.cuts(sums.result(len(forget)), counts)
    return [
        Mask(bits, {"density": density, "threshold": threshold, **settings})
        for density, (threshold, bits) in zip(densities, cuts, strict=True)
    ]


def run_record(started: float, peaks: dict[str, int], planned: dict[str, int]) -> dict:
    """What run.json holds: the seconds since `started`, and for each step its peak and planned bytes."""
    return {"seconds": round(time.monotonic() - started, 1), "peak_bytes": peaks, "planned_bytes": planned}
