"""The work of `erase`: prepare, collect, find the mask, train, deliver."""

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from salun_sd.checkpoint import places, provenance
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.edit import closed_form, maskfile, patch
from salun_sd.edit.checks import (
    check_batch,
    check_format,
    check_images,
    check_method,
    check_retain,
    check_writable,
    checked_size,
    named,
    plain,
    warn_of_batch,
)
from salun_sd.edit.concepts import RENAMED, Concept, concepts_of, text_of
from salun_sd.edit.deliver import deliver, finished, proof
from salun_sd.edit.encodings import LoadedBase
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.masking import make_masks, run_record
from salun_sd.edit.patch import Patch
from salun_sd.edit.predictions import size_of
from salun_sd.edit.recipes import Recipe, recipe_of
from salun_sd.edit.resources import Compute, Forecast
from salun_sd.edit.resume import Progress, State
from salun_sd.edit.sources import Sources, sources_in_words
from salun_sd.edit.steps import Erasing, Masking, Work
from salun_sd.edit.supports import SALIENT, support_of
from salun_sd.edit.training import strip_writer, train
from salun_sd.edit.training_data import Data, collect
from salun_sd.methods.names import TITLES
from salun_sd.runtime import memory, ranks, tracker
from salun_sd.runtime.device import check_dtype
from salun_sd.runtime.ranges import RANGES, check_numbers
from salun_sd.runtime.texts import check_given

logger = logging.getLogger(__name__)

OPTIONS = RENAMED | {"clip": "clip_norm"}  # keys of a record's settings that are not the option's name


def erase(
    model: str | Path | Checkpoint, concept: str | Concept | Sequence[str | Concept],
    anchor: str | Sequence[str] | None = None, *, out: str | Path, method: str = "salun", recipe: str | None = None,
    setting: Mapping[str, Any] | Sequence[str] | None = None, mask: str | Path | None = None,
    density: float | None = None, saliency_guidance: float | None = None, forget: str | Path | None = None,
    retain: str | Path | None = None, retain_caption: str | None = None,
    retain_prompts: str | Path | Sequence[str] | None = None, samples: int | None = None, size: int | None = None,
    retain_weight: float | None = None, lr: float | None = None, clip_norm: float | None = None,
    steps: int | None = None, batch_size: int | None = None, anchor_from: str | None = None,
    retain_target: str | None = None, probe_every: int | None = None, until: float | None = None,
    sample_every: int = 0, save_every: float = 10, seed: int = 0, dtype: str | None = None,
    checkpointing: bool | None = None, parts: int = 1, format: str = "diffusers", reversible: bool = False,
    track: str | Sequence[str] | None = None, dry_run: bool = False, config: str | None = None,
    revision: str | None = None, variant: str | None = None, command: str = "salun_sd.erase()",
) -> dict | Forecast:  # fmt: skip
    """Erase concepts from a checkpoint, and write the result. Parameters are those of `salun-sd erase`; `command` is
    what the record names as the maker. None: the method's or the recipe's value. `setting` is --setting, as a table
    or as texts NAME=VALUE.

    Gives the record that the result carries. Where `out` holds the same result from the same inputs, gives its record;
    where such a run was interrupted, resumes from its state. With `dry_run`, gives the settings and the planned memory,
    and writes nothing. Raises UsageError for arguments that are wrong or cannot go together, SalunError for anything
    else that fails, each with a sentence for a person.
    """
    started, trackers, job = time.monotonic(), tracker.check(track), _prepared(SimpleNamespace(**locals()))
    if dry_run:
        return job.forecast()
    progress = Progress(job.out, {"settings": job.settings, "inputs": job.inputs}, save_every)
    if (record := finished(job.out, format, job.base, job.settings, job.inputs)) is not None:
        progress.clean_up()
        return record
    planned = job.compute.planned_bytes(job.steps_to_plan())
    with progress.held() as state, tracker.started(trackers, progress.folder, job.settings) as progress.tracker:
        result = _train(job, progress, state)
        gc.collect()  # the UNet's hooks and layers refer to each other
        return _deliver(job, result, progress, command, started, planned)


class Job(NamedTuple):
    """An erasure that is about to begin, checked."""

    out: Path
    base: Checkpoint
    recipe: Recipe
    sources: Sources
    mask: Mask | None  # None: it is computed first
    compute: Compute
    settings: dict  # as in the record
    inputs: dict  # digests of what the result depends on beside the settings

    def steps_to_plan(self) -> list[Work]:
        """The steps of an erasure, for the memory plan."""
        settings, compute, size = self.settings, self.compute, self.settings["resolution"]
        batch, processes = settings["batch_size"], ranks.count()
        common = {"parts": settings["parts"], "most_parts": batch // processes}
        steps: list[Work] = [compute.drawing(size, self.sources.draws(needs_mask=self.mask is None))]
        if not self.mask:
            steps.append(compute.work(Masking, size, batch=batch, guidance=settings["guidance"], **common))
        if not self.recipe.is_closed:
            strips = compute.drawing(size, draws=True) if settings["sample_every"] else None
            steps.append(compute.work(
                Erasing, size, batch=-(-batch // processes), clips=settings["clip"] is not None,
                density=self.density, mask_is_given=self.mask is not None, method=self.recipe.method,
                retain=self.recipe.retain, strips=strips, **common,
            ))  # fmt: skip
        return steps

    @property
    def density(self) -> float:
        """Share of the weights in the mask."""
        return masks.density(self.mask.bits) if self.mask else self.settings["density"]

    def forecast(self) -> Forecast:
        """The settings, by the name of their option, and what the run will take."""
        settings, compute = self.settings, self.compute
        of_options = {OPTIONS.get(name, name): value for name, value in settings.items()}
        kept = round(self.density * self.base.weights)
        disk = compute.disk(kept, settings["format"], settings["reversible"])
        if asks := self.recipe.asks:
            side = settings["resolution"] // self.base.pixels_per_latent
            channels = self.base.unet_settings["in_channels"]
            of_step = size_of((asks, settings["batch_size"], channels, side, side))
            disk["the base's predictions, while it runs"] = settings["steps"] * of_step
        return compute.forecast(self.steps_to_plan(), of_options, disk)


def _prepared(o: SimpleNamespace) -> Job:
    """The options of `erase`, checked: whatever can be wrong is found here."""
    check_given(
        model=o.model, concept=o.concept, anchor=o.anchor, out=o.out, mask=o.mask, forget=o.forget, retain=o.retain,
        retain_caption=o.retain_caption, retain_prompts=o.retain_prompts, config=o.config, revision=o.revision,
        variant=o.variant,
    )  # fmt: skip
    check_numbers(**{name: value for name, value in vars(o).items() if name in RANGES})
    vars(o).update({name: plain(value) for name, value in vars(o).items()})
    o.mask, o.forget, o.retain = text_of(o.mask), text_of(o.forget), text_of(o.retain)
    if o.retain_prompts is not None:
        o.retain_prompts = (
            text_of(o.retain_prompts) if isinstance(o.retain_prompts, str | Path) else [*o.retain_prompts]
        )
    recipe = recipe_of(o.method, o.recipe, o.setting, vars(o))
    support = support_of(o.mask, o.density, o.saliency_guidance, recipe.method.support)
    concepts = concepts_of(o.concept, o.anchor, o.forget, needs_anchor=recipe.method.needs_anchor)
    check_images(concepts, o.method, recipe.method, needs_mask=support.kind == SALIENT)
    check_dtype(o.dtype)
    check_format(Path(o.out), o.format, o.reversible)
    check_retain(o.retain, o.retain_caption, o.retain_prompts)
    base = opened(o.model, o.config, o.revision, o.variant)
    size = checked_size(base, o.size)
    check_writable(base, o.format)
    check_method(base, o.method, recipe.method)
    recipe = recipe.of_model(base, size)
    check_batch(recipe.values["batch_size"], o.parts)
    concepts, support = named(base, concepts), support.of_model(base)
    mask = support.mask(base, concepts, o.seed)
    if recipe.is_closed:
        closed_form.check(base, mask)
    sources = Sources.of(base, concepts, recipe, o.retain, o.retain_caption, o.seed)
    compute = Compute.of(base, o.dtype, o.checkpointing)
    settings = {
        "model": base.name, "concepts": [c.record() for c in concepts], "recipe": o.recipe, **recipe.record(),
        **support.record(), "retain": o.retain, "retain_caption": o.retain_caption, "resolution": size,
        "steps": recipe.steps(sources.count()), "clip": o.clip_norm, "until": o.until,
        "sample_every": o.sample_every, "seed": o.seed, **compute.dtypes(),
        "parts": o.parts, "format": o.format, "reversible": o.reversible,
    }  # fmt: skip
    if recipe.method.shows:
        warn_of_batch(settings["batch_size"], sources.count())
    inputs = {"base": base.identity, "mask": maskfile.digest(settings["mask"]), **sources.digests()}
    return Job(Path(o.out), base, recipe, sources, mask, compute, settings, inputs)


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
    mask = state.mask if state else job.mask
    loaded = LoadedBase(base, settings["resolution"], job.compute.drawn_in.dtype)
    data = collect(loaded, job.sources, needs_mask=mask is None)
    del loaded
    peaks["images"] = memory.reset_peak()

    # find the mask
    unet = None if mask and job.recipe.is_closed else job.compute.unet()
    if mask is None:
        [mask] = make_masks(
            base, unet, data.shown.examples, data.shown.empty, job.sources.concepts, [settings["density"]],
            settings["guidance"], settings["seed"], -(-settings["batch_size"] // settings["parts"]),
        )  # fmt: skip
        peaks["mask"] = memory.reset_peak()
    if progress.minutes and not state:
        progress.save(mask)

    # train
    with progress.no_state_of_a_failure():
        values = _values(job, unet, mask, data, progress, state)
        trained = patch.of_training(values, mask.bits, base.unet, settings["reversible"])
    peaks["erase"] = memory.reset_peak()
    training = data.training
    images = {"forget": len(training.forget or ()), "retain": len(training.retain or ())}
    return Trained(trained, mask, images, peaks)


def _values(
    job: Job, unet, mask: Mask, data: Data, progress: Progress, state: State | None
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The new values of the weights in the mask, float32 [k] for each parameter with k of them."""
    settings = job.settings
    if job.recipe.is_closed:
        preserved = [text for text, _ in job.sources.prompts]
        loaded = LoadedBase(job.base, settings["resolution"])
        return closed_form.solve(loaded, job.recipe.method, mask, job.sources.concepts, preserved)
    erasure = job.recipe.erasure(data.training, settings["steps"], settings["seed"], settings["parts"])
    texts, folder = job.sources.examples(4), progress.folder / "samples"
    write_strip = strip_writer(job.compute, unet, texts, folder, settings["sample_every"])
    return train(job.base, unet, mask, erasure, settings, progress, state, write_strip)


def _deliver(
    job: Job, trained: Trained, progress: Progress, command: str, started: float, planned: dict[str, int]
) -> dict:  # fmt: skip
    """Write the result and read it back; gives its record."""
    settings, format = job.settings, job.settings["format"]
    record = {
        "schema": provenance.SCHEMA, "command": command, "method": TITLES[settings["method"]],
        "concepts": settings["concepts"], "settings": settings, "inputs": job.inputs, "images": trained.images,
        "data": sources_in_words(settings, job.recipe.method, by_class=job.base.classes is not None),
        "probe": progress.probe,
    }  # fmt: skip
    proven = proof(job.base, trained.patch, trained.mask) if ranks.is_main() else {}
    record = places.without_places(record | proven)
    if ranks.is_main():
        run = run_record(started, trained.peaks, planned)
        progress.keep(trained.mask, run, None if format == "diffusers" else record)
        deliver(job.base, trained.patch._replace(record=record), format, job.out)
    ranks.wait()
    return record
