"""The work of `mask` and `erase`: files in, files out."""

import gc
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from salun_sd import __version__
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.core.diffusion import Condition, Examples
from salun_sd.core.saliency import GradientSum, sum_dtype
from salun_sd.edit import maskfile, patch
from salun_sd.edit.budget import Erasing, Masking, Work
from salun_sd.edit.checks import (
    check_batch,
    check_form,
    check_numbers,
    check_replaceable,
    checked_size,
    given_mask,
    images_of,
)
from salun_sd.edit.concepts import RENAMED, Concept, concepts_of
from salun_sd.edit.deliver import deliver, finished, proof
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.resources import Compute, Foreseen, schedule_of
from salun_sd.edit.resume import Progress
from salun_sd.edit.training import strips, train
from salun_sd.edit.training_data import Base, Wanted, collect, encode, forget_items, prompts_said
from salun_sd.errors import UsageError
from salun_sd.methods import salun
from salun_sd.runtime import memory, ranks
from salun_sd.runtime.device import named
from salun_sd.runtime.files import new_folder, write_atomic

logger = logging.getLogger(__name__)


class Masks(NamedTuple):
    """What `mask` made."""

    files: list[tuple[Path, Mask]]
    run: dict  # as in run.json: seconds, peak_bytes and planned_bytes of each step


def mask(
    model: str | Path | Checkpoint, concept: str | Concept | Sequence[str | Concept], *,
    out: str | Path = "mask.safetensors", density: float | Sequence[float] = 0.5, saliency_guidance: float = 7.5,
    forget: str | None = None, samples: int = 800, size: int | None = None, batch_size: int = 8, seed: int = 0,
    dtype: str | None = None, checkpointing: bool | None = None, dry_run: bool = False, config: str | None = None,
    revision: str | None = None, variant: str | None = None,
) -> Masks | Foreseen:  # fmt: skip
    """Find the weights that matter to a concept, and write a mask file for each density. Parameters are those of
    `salun-sd mask`; with several densities, each goes into its file's name.

    With `dry_run`, gives what the run would take, and writes nothing. Raises UsageError for what cannot go together,
    SalunError for what fails; both are sentences for a person.
    """
    started, out = time.monotonic(), Path(out)
    densities = [density] if isinstance(density, float | int) else list(density)
    paths = [out if len(densities) == 1 else out.with_name(f"{out.stem}-{d:g}{out.suffix}") for d in densities]
    concepts = concepts_of(concept, forget=forget)
    base = opened(model, config, revision, variant)
    if len(set(paths)) < len(paths):
        raise UsageError("The same --density is given twice.")
    check_numbers(saliency_guidance=saliency_guidance)
    size = checked_size(base, size)
    for each, path in zip(densities, paths, strict=True):
        masks.keep_count(each, sys.maxsize)  # outside (0, 1]: say so before a checkpoint is loaded
        check_replaceable(path)
    images = [images_of(c.images, c.prompt) for c in concepts]
    compute = Compute.of(base, dtype, checkpointing)
    steps = [compute.drawing(size, draws=not all(images)),
             compute.work(Masking, size, batch=batch_size, guidance=saliency_guidance)]  # fmt: skip
    if dry_run:
        settings = {"model": base.name, "concepts": [text for c in concepts for text in c.prompts()],
                    "densities": densities, "saliency_guidance": saliency_guidance, "batch_size": batch_size,
                    "seed": seed, "size": size, "dtype": named(compute.precision.dtype)}  # fmt: skip
        return compute.foresee(steps, settings)
    for path in filter(Path.exists, paths):
        logger.info(f"{path} is there already; the mask is made anew in its place.")
    planned = compute.announced(steps)
    source = Base(base, size)
    items = [item for group in forget_items(source, concepts, images, samples) for item in group]
    forget_set, row = encode(source, items, [""])
    del source
    peaks = {"images": memory.forget_peak()}
    empty = forget_set.rows([row[""]])
    made = make_masks(base, compute.unet(), forget_set, empty, concepts, densities, saliency_guidance, seed, batch_size)
    peaks["mask"] = memory.forget_peak()
    if ranks.is_main():
        for path, each in zip(paths, made, strict=True):
            write_atomic(path, maskfile.pack(each))
    return Masks(list(zip(paths, made, strict=True)), run_record(started, peaks, planned))


def make_masks(
    model: Checkpoint, unet, forget: Examples, empty: Condition, concepts: Sequence[Concept], densities: list[float],
    guidance: float, seed: int, batch_size: int,
) -> list[Mask]:  # fmt: skip
    """One gradient pass over D_f, one mask for each density."""
    weights = sum(p.numel() for p in unet.parameters())
    counts = [masks.keep_count(d, weights) for d in densities]
    sums = GradientSum(unet, memory.roomy(unet.device, weights * sum_dtype(weights).itemsize))
    passes = salun.forget_gradient(
        unet, schedule_of(model), forget, empty, guidance=guidance, seed=seed, batch_size=batch_size
    )
    with sums, tqdm(total=len(forget), desc="saliency", unit="image") as bar:
        for done in passes:
            bar.update(done - bar.n)
    settings = {"concepts": [text for c in concepts for text in c.prompts()], "guidance": guidance,
                "images": len(forget), "seed": seed, "dtype": named(unet.dtype),
                "base": model.fingerprint, "model": model.name, "salun_sd": __version__}  # fmt: skip
    cuts = masks.cuts(sums.result(len(forget)), counts)
    return [
        Mask(bits, {"density": density, "threshold": threshold, **settings})
        for density, (threshold, bits) in zip(densities, cuts, strict=True)
    ]


def run_record(started: float, peaks: dict[str, int], planned: dict[str, int]) -> dict:
    return {"seconds": round(time.monotonic() - started, 1), "peak_bytes": peaks, "planned_bytes": planned}


def erase(
    model: str | Path | Checkpoint, concept: str | Concept | Sequence[str | Concept],
    anchor: str | Sequence[str] | None = None, *, out: str | Path, mask: str | Path | None = None,
    density: float = 0.5, saliency_guidance: float = 7.5, forget: str | None = None, retain: str | None = None,
    retain_caption: str | None = None, retain_prompts: str | Sequence[str] | None = None, samples: int = 800,
    size: int | None = None, retain_weight: float = 0.5, lr: float = 1e-5, clip: float | None = None,
    steps: int | None = None, batch_size: int = 8, anchor_from: str = "current", sample_every: int = 0,
    save_every: float = 10, seed: int = 0, dtype: str | None = None, checkpointing: bool | None = None, parts: int = 1,
    format: str = "diffusers", reversible: bool = False, dry_run: bool = False, config: str | None = None,
    revision: str | None = None, variant: str | None = None, command: str = "salun_sd.erase()",
) -> dict | Foreseen:  # fmt: skip
    """Erase concepts from a checkpoint, and write the result. Parameters are those of `salun-sd erase`; `command` is
    what the record names as the maker.

    Gives the record that the result carries. Where an earlier run left the same result from the same inputs, gives its
    record; where one was stopped, goes on from its state. With `dry_run`, gives what the run would take, and writes
    nothing. Raises UsageError for what cannot go together, SalunError for what fails; both are sentences for a person.
    """
    # prepare: what can be refused is refused here
    started, out, mask = time.monotonic(), Path(out), mask and str(mask)
    concepts = concepts_of(concept, anchor or (), forget)
    base = opened(model, config, revision, variant)
    check_batch(batch_size, parts)
    check_numbers(saliency_guidance=saliency_guidance, lr=lr, clip=clip, retain_weight=retain_weight,
                  save_every=save_every)  # fmt: skip
    masks.keep_count(density, sys.maxsize)
    size = checked_size(base, size)
    check_form(base, out, format, reversible)
    given = given_mask(mask, base, concepts, seed)
    wanted = Wanted.of(base, concepts, samples, retain, retain_caption, retain_prompts)
    compute = Compute.of(base, dtype, checkpointing)
    settings = {
        "model": base.name, "concepts": [c.record() for c in concepts], "mask": mask,
        "density": None if given else density, "guidance": None if given else saliency_guidance, "retain": retain,
        "retain_caption": retain_caption, "samples": samples, "resolution": size,
        "retain_prompts": retain_prompts if isinstance(retain_prompts, str | None) else list(retain_prompts),
        "retain_weight": retain_weight, "lr": lr, "clip": clip, "steps": steps or -(-wanted.count() // batch_size),
        "batch_size": batch_size, "anchor_from": anchor_from, "sample_every": sample_every, "seed": seed,
        "dtype": named(compute.precision.dtype), "parts": parts, "format": format, "reversible": reversible,
    }  # fmt: skip
    works = _works(compute, settings, given, draws=wanted.draws())
    if dry_run:
        return compute.foresee(works, {RENAMED.get(name, name): value for name, value in settings.items()})
    inputs = {"base": base.identity, "mask": maskfile.digest(mask), **wanted.digests()}
    progress = Progress(out, {"settings": settings, "inputs": inputs}, save_every)
    if (done := finished(out, format, base, settings, inputs)) is not None:
        progress.end()
        return done
    planned = compute.announced(works)

    with progress.held() as state:
        # collect
        data = collect(Base(base, size), wanted)
        images = {"forget": len(data.forget), "retain": len(data.retain)}
        peaks = {"images": memory.forget_peak()}

        # find the mask
        unet, chosen = compute.unet(), state.mask if state else given
        if not chosen:
            part = -(-batch_size // parts)
            [chosen] = make_masks(
                base, unet, data.forget, data.empty, concepts, [density], saliency_guidance, seed, part
            )
            peaks["mask"] = memory.forget_peak()
            if save_every:
                progress.save(chosen)

        # train
        strip = strips(compute, unet, wanted.examples(4), progress.folder / "samples", sample_every)
        with progress.errors_recur():
            values = train(base, unet, chosen, data, settings, progress, state, strip)
            made = patch.of_training(values, chosen.bits, base.unet, reversible)
        peaks["erase"] = memory.forget_peak()
        del unet, strip, data
        gc.collect()  # the UNet's hooks and layers refer to each other

        # deliver
        drawn = "; ".join(c.images or f"drawn by the base, {samples} for {c.prompt!r}" for c in concepts)
        kept = retain or f"drawn by the base from {prompts_said(retain_prompts)}"
        record = {"schema": 2, "command": command, "concepts": settings["concepts"], "settings": settings,
                  "inputs": inputs, "images": images, "data": {"forget": drawn, "retain": kept}}  # fmt: skip
        if ranks.is_main():
            record |= proof(base, made, chosen)
            with new_folder(out if format == "diffusers" else provenance.run_folder(out)) as beside:
                progress.hand_over(beside)
                write_atomic(beside / "run.json", json.dumps(run_record(started, peaks, planned)) + "\n")
                deliver(base, made._replace(record=record), chosen, format, out, beside)
        ranks.wait()
    return record


def _works(compute: Compute, settings: dict, given: Mask | None, draws: bool) -> list[Work]:
    """The steps of an erasure, for the memory plan."""
    size, batch = settings["resolution"], settings["batch_size"]
    common = {"parts": settings["parts"], "most_parts": batch // ranks.count()}
    works = [compute.drawing(size, draws)]
    if not given:
        works.append(compute.work(Masking, size, batch=batch, guidance=settings["guidance"], **common))
    training = compute.work(
        Erasing, size, batch=-(-batch // ranks.count()), clips=settings["clip"] is not None,
        density=masks.density(given.bits) if given else settings["density"], mask_is_given=given is not None,
        keeps_base=settings["anchor_from"] == "base",
        strips=compute.drawing(size, draws=True) if settings["sample_every"] else None, **common,
    )  # fmt: skip
    return [*works, training]
