"""The work of `mask` and `erase`: files in, files out."""

import gc
import logging
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
    check_choice,
    check_dtype,
    check_format,
    check_kept,
    check_mask,
    check_replaceable,
    check_retain,
    check_writable,
    checked_size,
    densities_of,
    images_of,
    plain,
    read_mask,
    warn_of_batch,
)
from salun_sd.edit.concepts import RENAMED, Concept, concepts_of, text_of
from salun_sd.edit.deliver import deliver, finished, proof
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.patch import Patch
from salun_sd.edit.ranges import check_numbers
from salun_sd.edit.resources import Compute, Forecast, schedule_of
from salun_sd.edit.resume import Progress, State
from salun_sd.edit.training import strip_writer, train
from salun_sd.edit.training_data import (
    LoadedBase,
    Sources,
    check_texts,
    collect,
    encode,
    forget_items,
    sources_in_words,
)
from salun_sd.methods import salun
from salun_sd.runtime import memory, ranks
from salun_sd.runtime.device import dtype_name
from salun_sd.runtime.files import new_file
from salun_sd.runtime.texts import check_given

logger = logging.getLogger(__name__)

DENSITY, GUIDANCE = 0.5, 7.5  # of a mask that `erase` computes, if not given
OPTIONS = RENAMED | {"clip": "clip_norm"}  # keys of a record's settings that are not the option's name


class Masks(NamedTuple):
    """What `mask` wrote."""

    files: list[tuple[Path, Mask]]
    run: dict  # as in run.json: seconds, peak_bytes and planned_bytes of each step


def mask(
    model: str | Path | Checkpoint, concept: str | Concept | Sequence[str | Concept], *,
    out: str | Path = "mask.safetensors", density: float | Sequence[float] = 0.5, saliency_guidance: float = 7.5,
    forget: str | Path | None = None, samples: int = 800, size: int | None = None, batch_size: int = 8, seed: int = 0,
    dtype: str | None = None, checkpointing: bool | None = None, dry_run: bool = False, config: str | None = None,
    revision: str | None = None, variant: str | None = None,
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
    size = checked_size(base, size)
    check_kept(base, densities)
    images = [images_of(c.images, c.prompt) for c in concepts]
    check_texts(base, concepts, images)
    compute = Compute.of(base, dtype, checkpointing)
    steps = [compute.drawing(size, draws=not all(images)),
             compute.work(Masking, size, batch=batch_size, guidance=saliency_guidance)]  # fmt: skip
    if dry_run:
        settings = {"model": base.name, "concepts": [text for c in concepts for text in c.prompts()],
                    "densities": densities, "saliency_guidance": saliency_guidance, "batch_size": batch_size,
                    "seed": seed, "size": size, "dtype": dtype_name(compute.precision.dtype)}  # fmt: skip
        return compute.forecast(steps, settings, {"masks": len(densities) * compute.mask_bytes()})
    for path in filter(Path.exists, paths):
        logger.info(f"{path} exists; the new mask replaces it.")
    planned = compute.planned_bytes(steps)

    # collect
    loaded = LoadedBase(base, size)
    items = [item for of_concept in forget_items(loaded, concepts, images, samples) for item in of_concept]
    examples, row = encode(loaded, items, [""])
    empty = examples.rows([row[""]])
    del loaded
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
    with sums, tqdm(total=len(forget), desc="saliency", unit="image") as bar:
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


def erase(
    model: str | Path | Checkpoint, concept: str | Concept | Sequence[str | Concept],
    anchor: str | Sequence[str] | None = None, *, out: str | Path, mask: str | Path | None = None,
    density: float | None = None, saliency_guidance: float | None = None, forget: str | Path | None = None,
    retain: str | Path | None = None, retain_caption: str | None = None,
    retain_prompts: str | Path | Sequence[str] | None = None, samples: int = 800, size: int | None = None,
    retain_weight: float = 0.5, lr: float = 1e-5, clip_norm: float | None = None,
    steps: int | None = None, batch_size: int = 8, anchor_from: str = "current", retain_target: str = "base",
    sample_every: int = 0, save_every: float = 10, seed: int = 0, dtype: str | None = None,
    checkpointing: bool | None = None, parts: int = 1, format: str = "diffusers", reversible: bool = False,
    dry_run: bool = False, config: str | None = None, revision: str | None = None, variant: str | None = None,
    command: str = "salun_sd.erase()",
) -> dict | Forecast:  # fmt: skip
    """Erase concepts from a checkpoint, and write the result. Parameters are those of `salun-sd erase`; `command` is
    what the record names as the maker. Without a mask, `density` is 0.5 and `saliency_guidance` 7.5 if not given.

    Gives the record that the result carries. Where `out` holds the same result from the same inputs, gives its record;
    where such a run was interrupted, resumes from its state. With `dry_run`, gives the settings and the planned memory,
    and writes nothing. Raises UsageError for arguments that are wrong or cannot go together, SalunError for anything
    else that fails, each with a sentence for a person.
    """
    # prepare: what can be wrong is checked here
    check_given(
        model=model, concept=concept, anchor=anchor, out=out, mask=mask, forget=forget, retain=retain,
        retain_caption=retain_caption, retain_prompts=retain_prompts, config=config, revision=revision, variant=variant,
    )  # fmt: skip
    started, out, seed, mask, retain = time.monotonic(), Path(out), plain(seed), text_of(mask), text_of(retain)
    retain_prompts = str(retain_prompts) if isinstance(retain_prompts, Path) else retain_prompts
    concepts = concepts_of(concept, anchor, text_of(forget), needs_anchor=True)
    check_numbers(density=density, saliency_guidance=saliency_guidance, lr=lr, clip_norm=clip_norm,
                  retain_weight=retain_weight, samples=samples, size=size, steps=steps, batch_size=batch_size,
                  parts=parts, seed=seed, sample_every=sample_every, save_every=save_every)  # fmt: skip
    check_batch(batch_size, parts)
    check_choice("anchor-from", anchor_from, ("current", "base"))
    check_choice("retain-target", retain_target, ("base", "noise"))
    check_dtype(dtype)
    check_format(out, format, reversible)
    check_retain(retain, retain_caption, retain_prompts)
    check_mask(mask, density, saliency_guidance)
    if mask is None:
        density = DENSITY if density is None else density
        saliency_guidance = GUIDANCE if saliency_guidance is None else saliency_guidance
    base = opened(model, config, revision, variant)
    size = checked_size(base, size)
    check_writable(base, format)
    check_kept(base, [] if density is None else [density])
    given_mask = read_mask(mask, base, concepts, seed)
    sources = Sources.of(base, concepts, samples, retain, retain_caption, retain_prompts)
    compute = Compute.of(base, dtype, checkpointing)
    settings = {
        "model": base.name, "concepts": [c.record() for c in concepts], "mask": mask,
        "density": density, "guidance": saliency_guidance,
        "retain": retain, "retain_caption": retain_caption, "samples": samples, "resolution": size,
        "retain_prompts": retain_prompts if isinstance(retain_prompts, str | None) else list(retain_prompts),
        "retain_weight": retain_weight, "lr": lr, "clip": clip_norm,
        "steps": steps or -(-sources.count() // batch_size), "batch_size": batch_size,
        "anchor_from": anchor_from, "retain_target": retain_target, "sample_every": sample_every, "seed": seed,
        "dtype": dtype_name(compute.precision.dtype), "parts": parts, "format": format, "reversible": reversible,
    }  # fmt: skip
    settings = {name: plain(value) for name, value in settings.items()}
    warn_of_batch(batch_size, sources.count())
    steps_to_plan = _steps_to_plan(compute, settings, given_mask, draws=sources.draws())
    if dry_run:
        kept = round((masks.density(given_mask.bits) if given_mask else density) * compute.weights)
        of_options = {OPTIONS.get(name, name): value for name, value in settings.items()}
        return compute.forecast(steps_to_plan, of_options, compute.disk(kept, format, reversible))
    inputs = {"base": base.identity, "mask": maskfile.digest(mask), **sources.digests()}
    progress = Progress(out, {"settings": settings, "inputs": inputs}, save_every)
    if (record := finished(out, format, base, settings, inputs)) is not None:
        progress.clean_up()
        return record
    planned = compute.planned_bytes(steps_to_plan)
    job = Job(base, sources, given_mask, compute, settings, inputs, planned, started)
    with progress.held() as state:
        result = _train(job, progress, state)
        gc.collect()  # the UNet's hooks and layers refer to each other
        return _deliver(job, result, progress, out, command)


class Job(NamedTuple):
    """An erasure that is about to begin, checked."""

    base: Checkpoint
    sources: Sources
    mask: Mask | None  # None: it is computed first
    compute: Compute
    settings: dict  # as in the record
    inputs: dict  # digests of what the result depends on beside the settings
    planned: dict[str, int]  # bytes that each step is planned to take
    started: float  # on the monotonic clock, seconds


class Trained(NamedTuple):
    """The result of training."""

    patch: Patch
    mask: Mask
    images: dict[str, int]  # number of forget and retain images
    peaks: dict[str, int]  # bytes that each step held at most


def _train(job: Job, progress: Progress, state: State | None) -> Trained:
    """Collect the images, find the mask and train. With a state, the mask is the state's and training resumes there."""
    base, settings, peaks = job.base, job.settings, {}
    # collect
    data = collect(LoadedBase(base, settings["resolution"]), job.sources)
    peaks["images"] = memory.reset_peak()

    # find the mask
    unet, mask = job.compute.unet(), state.mask if state else job.mask
    if not mask:
        [mask] = make_masks(
            base, unet, data.forget, data.empty, job.sources.concepts, [settings["density"]], settings["guidance"],
            settings["seed"], -(-settings["batch_size"] // settings["parts"]),
        )  # fmt: skip
        peaks["mask"] = memory.reset_peak()
    if progress.minutes and not state:
        progress.save(mask)

    # train
    texts, folder = job.sources.examples(4), progress.folder / "samples"
    write_strip = strip_writer(job.compute, unet, texts, folder, settings["sample_every"])
    with progress.no_state_after_an_error():
        values = train(base, unet, mask, data, settings, progress, state, write_strip)
        trained = patch.of_training(values, mask.bits, base.unet, settings["reversible"])
    peaks["erase"] = memory.reset_peak()
    return Trained(trained, mask, {"forget": len(data.forget), "retain": len(data.retain)}, peaks)


def _deliver(job: Job, trained: Trained, progress: Progress, out: Path, command: str) -> dict:
    """Write the result and read it back; gives its record."""
    settings, format = job.settings, job.settings["format"]
    record = {"schema": provenance.SCHEMA, "command": command, "concepts": settings["concepts"], "settings": settings,
              "inputs": job.inputs, "images": trained.images, "data": sources_in_words(settings)}  # fmt: skip
    if ranks.is_main():
        record |= proof(job.base, trained.patch, trained.mask)
        run = run_record(job.started, trained.peaks, job.planned)
        progress.keep(trained.mask, run, None if format == "diffusers" else record)
        deliver(job.base, trained.patch._replace(record=record), format, out)
    ranks.wait()
    return record


def _steps_to_plan(compute: Compute, settings: dict, given_mask: Mask | None, draws: bool) -> list[Work]:
    """The steps of an erasure, for the memory plan."""
    size, batch = settings["resolution"], settings["batch_size"]
    common = {"parts": settings["parts"], "most_parts": batch // ranks.count()}
    steps = [compute.drawing(size, draws)]
    if not given_mask:
        steps.append(compute.work(Masking, size, batch=batch, guidance=settings["guidance"], **common))
    training = compute.work(
        Erasing, size, batch=-(-batch // ranks.count()), clips=settings["clip"] is not None,
        density=masks.density(given_mask.bits) if given_mask else settings["density"],
        mask_is_given=given_mask is not None,
        strips=compute.drawing(size, draws=True) if settings["sample_every"] else None, **common,
    )  # fmt: skip
    return [*steps, training]
