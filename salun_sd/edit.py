"""The work of `mask` and `erase`, files in and files out: collect images, encode, saliency, train, save."""

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from salun_sd import __version__, checkpoint, memory, patch, provenance, ranks, save, sources
from salun_sd import erase as erasing
from salun_sd import mask as masks
from salun_sd.adam import SalientAdam
from salun_sd.budget import Erasing, Masking, Work
from salun_sd.checkpoint import Checkpoint
from salun_sd.compute import Compute, Foreseen
from salun_sd.diffusion import Condition, Examples, Schedule
from salun_sd.errors import UsageError
from salun_sd.examples import Base, encode, forget_items, retain_items, spread
from salun_sd.files import new_folder, write_atomic
from salun_sd.inputs import check_numbers, check_replaceable, checked_size, given_mask, images_of, kept_prompts, to_keep
from salun_sd.mask import Mask
from salun_sd.output import check_place, deliver, finished, proof
from salun_sd.plan import Concept
from salun_sd.precision import named
from salun_sd.resume import Progress, State, patient
from salun_sd.saliency import Saliency
from salun_sd.sample import Row, Sampler


class Data(NamedTuple):
    """What a run learns from."""

    forget: Examples
    row: dict[str, int]  # of a text in forget.prompts: of the captions, the anchors and ""
    concepts: torch.Tensor  # which each image to forget shows, int64 [N]
    anchors: torch.Tensor  # the row of what stands in its place, int64 [N]
    retain: Examples

    @property
    def empty(self) -> Condition:
        """The prompt ""."""
        return self.forget.rows([self.row[""]])


class Masks(NamedTuple):
    """What `mask` made."""

    files: list[tuple[Path, Mask]]
    run: dict  # as in run.json: seconds, peak_bytes and planned_bytes of each step


def make_masks(
    model: Checkpoint, unet, forget: Examples, empty: Condition, concepts: Sequence[Concept], densities: list[float],
    guidance: float, seed: int, batch_size: int,
) -> list[Mask]:  # fmt: skip
    """One gradient pass over D_f, one mask for each density."""
    counts = [masks.keep_count(d, sum(p.numel() for p in unet.parameters())) for d in densities]
    schedule = Schedule.of(checkpoint.load_scheduler(model))
    saliency = Saliency(unet, schedule, empty, guidance, seed)
    with tqdm(total=len(forget), desc="saliency", unit="image") as bar:
        for done in saliency.accumulate(forget, batch_size):
            bar.update(done - bar.n)
    settings = {"concepts": [text for c in concepts for text in c.prompts()], "guidance": guidance,
                "images": len(forget), "seed": seed, "dtype": named(unet.dtype),
                "base": model.fingerprint, "model": model.name, "salun_sd": __version__}  # fmt: skip
    cuts = masks.cut(saliency.result(), counts)
    return [
        Mask(bits, {"density": density, "threshold": threshold, **settings})
        for density, (threshold, bits) in zip(densities, cuts, strict=True)
    ]


def mask(
    model: Checkpoint, concepts: Sequence[Concept], *, samples: int, densities: list[float], guidance: float,
    seed: int, batch_size: int, resolution: int | None, dtype: str | None, checkpointing: bool | None, dry_run: bool,
    out: Path,
) -> Masks | Foreseen:  # fmt: skip
    """Compute and write a mask file for each density; with several, the density goes into the file's name."""
    started = time.monotonic()
    paths = [out if len(densities) == 1 else out.with_name(f"{out.stem}-{d:g}{out.suffix}") for d in densities]
    if len(set(paths)) < len(paths):
        raise UsageError("The same --density is given twice.")
    check_numbers(guidance=guidance)
    size = checked_size(model, resolution)
    for density, path in zip(densities, paths, strict=True):
        masks.keep_count(density, sys.maxsize)  # outside (0, 1]: say so before a checkpoint is loaded
        check_replaceable(path)
    images = [images_of(c.images, c.prompt) for c in concepts]
    compute = Compute.of(model, dtype, checkpointing)
    steps = [compute.drawing(size, draws=not all(images)),
             compute.work(Masking, size, batch=batch_size, guidance=guidance)]  # fmt: skip
    if dry_run:
        settings = {"model": model.name, "concepts": [text for c in concepts for text in c.prompts()],
                    "densities": densities, "guidance": guidance, "batch_size": batch_size, "seed": seed,
                    "resolution": size, "dtype": named(compute.precision.dtype)}  # fmt: skip
        return compute.foresee(steps, settings)
    for path in filter(Path.exists, paths):
        print(f"{path} is there already; the mask is made anew in its place.", file=sys.stderr)
    planned = compute.announced(steps)
    base = Base(model, size)
    items = [item for group in forget_items(base, concepts, images, samples) for item in group]
    forget, row = encode(base, items, [""])
    del base
    peaks = {"images": memory.forget_peak()}
    empty = forget.rows([row[""]])
    made = make_masks(model, compute.unet(), forget, empty, concepts, densities, guidance, seed, batch_size)
    peaks["mask"] = memory.forget_peak()
    if ranks.is_main():
        for path, each in zip(paths, made, strict=True):
            write_atomic(path, masks.pack(each))
    return Masks(list(zip(paths, made, strict=True)), run_record(started, peaks, planned))


def run_record(started: float, peaks: dict[str, int], planned: dict[str, int]) -> dict:
    return {"seconds": round(time.monotonic() - started, 1), "peak_bytes": peaks, "planned_bytes": planned}


def erase(
    model: Checkpoint, concepts: Sequence[Concept], *, mask: str | None, density: float, guidance: float,
    retain: str | None, retain_caption: str | None, retain_prompts: str | Sequence[str] | None, samples: int,
    resolution: int | None, retain_weight: float, lr: float, clip: float | None, steps: int | None, batch_size: int,
    anchor_from: str, sample_every: int, save_every: float, seed: int, dtype: str | None, checkpointing: bool | None,
    parts: int, form: str, reversible: bool, dry_run: bool, out: Path, command: str,
) -> dict | Foreseen:  # fmt: skip
    """Erase the concepts and write the checkpoint `out` in a form, "diffusers", "single-file" or "patch"; gives back
    the record that it carries.

    Where an earlier run left the same checkpoint from the same inputs, gives back its record; where one was stopped,
    goes on from its state.
    """
    started = time.monotonic()
    if reversible and form != "patch":
        raise UsageError("--reversible is for --format patch: only a patch can keep the base's values.")
    if batch_size < parts * ranks.count():
        raise UsageError(f"--batch-size {batch_size} is too small for --parts {parts} in each of {ranks.count()} "
                         f"process(es): give {parts * ranks.count()} or more.")  # fmt: skip
    check_numbers(guidance=guidance, lr=lr, clip=clip, retain_weight=retain_weight, save_every=save_every)
    masks.keep_count(density, sys.maxsize)
    size = checked_size(model, resolution)
    check_place(out, form)
    given = given_mask(mask, model, concepts, seed)
    kept = kept_prompts(retain_prompts, concepts, model.sampling[1])
    images = [images_of(c.images, c.prompt) for c in concepts]
    kept_images = to_keep(retain, retain_caption, retain_prompts, concepts)
    if form == "single-file":
        save.single_file(model, model.unet)  # a UNet that has no place there is refused before it is trained
    compute = Compute.of(model, dtype, checkpointing)
    count = sum(len(own) if own else samples for own in images)
    settings = {
        "model": model.name, "concepts": [c.record() for c in concepts], "mask": mask,
        "density": None if given else density, "guidance": None if given else guidance, "retain": retain,
        "retain_caption": retain_caption, "samples": samples, "resolution": size,
        "retain_prompts": retain_prompts if isinstance(retain_prompts, str | None) else list(retain_prompts),
        "retain_weight": retain_weight, "lr": lr, "clip": clip, "steps": steps or -(-count // batch_size),
        "batch_size": batch_size, "anchor_from": anchor_from, "sample_every": sample_every, "seed": seed,
        "dtype": named(compute.precision.dtype), "parts": parts, "format": form, "reversible": reversible,
    }  # fmt: skip
    works = _works(compute, settings, given, draws=not all([*images, kept_images]))
    if dry_run:
        return compute.foresee(works, settings)
    inputs = {
        "base": model.identity,
        "mask": hashlib.sha256(Path(mask).read_bytes()).hexdigest() if mask and Path(mask).is_file() else None,
        "forget": [own and sources.digest(own) for own in images],
        "retain": kept_images and sources.digest(kept_images),
        "retain_prompts": None if retain else hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
    }
    progress = Progress(out, {"settings": settings, "inputs": inputs}, save_every)
    if (done := finished(out, form, model, settings, inputs)) is not None:
        progress.end()
        return done

    planned = compute.announced(works)
    with progress.held() as state:
        data = _data(Base(model, size), concepts, images, kept_images, retain_caption, kept, samples)
        peaks = {"images": memory.forget_peak()}
        unet = compute.unet()
        chosen = state.mask if state else given
        if not chosen:
            [chosen] = make_masks(
                model, unet, data.forget, data.empty, concepts, [density], guidance, seed, -(-batch_size // parts)
            )  # fmt: skip
            peaks["mask"] = memory.forget_peak()
            if save_every:
                progress.save(chosen)
        texts = [*spread([c.prompt for c in concepts], 4), *spread([text for text, _ in kept], 4)]
        strip = _strips(compute, unet, texts, progress.folder / "samples", sample_every)
        with progress.errors_recur():
            values = _train(model, unet, chosen, data, settings, progress, state, strip)
            made = patch.of_training(values, chosen.bits, model.unet, reversible)
        peaks["erase"] = memory.forget_peak()
        record = {
            "schema": 2,
            "command": command,
            "concepts": settings["concepts"],
            "settings": settings,
            "inputs": inputs,
            "images": {"forget": len(data.forget), "retain": len(data.retain)},
            "data": {
                "forget": "; ".join(c.images or f"drawn by the base, {samples} for {c.prompt!r}" for c in concepts),
                "retain": retain or f"drawn by the base from {_said(retain_prompts)}",
            },
        }
        del unet, strip, data
        gc.collect()  # the UNet's hooks and layers refer to each other
        if ranks.is_main():
            record |= proof(model, made, chosen)
            with new_folder(out if form == "diffusers" else provenance.run_folder(out)) as beside:
                progress.hand_over(beside)
                write_atomic(beside / "run.json", json.dumps(run_record(started, peaks, planned)) + "\n")
                deliver(model, made._replace(record=record), chosen, form, out, beside)
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


def _data(
    base: Base, concepts: Sequence[Concept], images: Sequence[list | None], kept_images: list | None,
    caption: str | None, kept: list[tuple[str, float]], samples: int,
) -> Data:  # fmt: skip
    """Images drawn where there are none, and all of them encoded."""
    groups = forget_items(base, concepts, images, samples)
    to_retain = retain_items(base, kept_images, caption or concepts[0].anchor, kept, samples)
    retain, _ = encode(base, to_retain, [])
    forget, row = encode(base, [item for own in groups for item in own], ["", *(c.anchor for c in concepts)])
    which = [n for n, own in enumerate(groups) for _ in own]
    return Data(forget, row, torch.tensor(which), torch.tensor([row[concepts[n].anchor] for n in which]), retain)


def _said(retain_prompts: str | Sequence[str] | None) -> str:
    if retain_prompts is None:
        return "the anchors"
    return retain_prompts if isinstance(retain_prompts, str) else ", ".join(map(repr, retain_prompts))


def _train(
    model: Checkpoint, unet, mask: Mask, data: Data, settings: dict, progress: Progress, state: State | None,
    strip: Callable[[int], None],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Run the loop to its end, from the state on if there is one; gives the trained values. Writes the losses into the
    folder of the progress, and calls `strip` before the first step and after each."""
    adam = SalientAdam(
        unet, mask.bits, model.unet, settings["lr"], clip=settings["clip"], holds=settings["parts"] > 1,
        keeps_base=settings["anchor_from"] == "base",
    )  # fmt: skip
    if state and state.steps:
        adam.restore(state.adam, state.steps)
        print(f"Going on from step {state.steps}, where an earlier run was stopped.", file=sys.stderr)
    else:
        strip(0)
    names = ("steps", "batch_size", "retain_weight", "anchor_from", "seed", "parts")
    schedule = Schedule.of(checkpoint.load_scheduler(model))
    loop = erasing.erase(
        unet, adam, schedule, data.forget, data.anchors, data.concepts, data.retain,
        **{name: settings[name] for name in names},
    )  # fmt: skip
    with (
        progress.losses(adam.steps) as losses, patient() as interrupts,
        tqdm(loop, total=settings["steps"], initial=adam.steps, desc="erase") as bar,
    ):  # fmt: skip
        for row in bar:
            losses.write(json.dumps(row) + "\n")
            bar.set_postfix(forget=f"{row['forget']:.4f}", retain=f"{row['retain']:.4f}")
            strip(row["step"])
            progress.rest(mask, adam, interrupts)
    if progress.minutes:  # what is left to do takes its time, too
        progress.save(mask, adam)
    values = adam.values()
    adam.close()
    return values


def _strips(compute: Compute, unet, texts: list[str], folder: Path, every: int) -> Callable[[int], None]:
    """Draws a row of images after each `every` steps, in the main process; 0: never."""
    if not every or not ranks.is_main():
        return lambda step: None
    pipeline = checkpoint.load(compute.model, unet=unet)
    if not compute.precision.widens:
        pipeline.to(unet.dtype)

    def strip(step: int) -> None:
        if step % every == 0:
            _write_strip(pipeline, compute.model, texts, folder / f"step-{step:05d}.png")

    return strip


def _write_strip(pipeline, model: Checkpoint, texts: list[str], file: Path) -> None:
    """One row of images."""
    steps, guidance = model.sampling
    size = model.image_size, model.image_size
    sampler, rows = Sampler(pipeline, steps), [Row(text, 2**31 + i, guidance, size) for i, text in enumerate(texts)]
    images = []
    for places in sampler.passes(rows):
        images += sampler.draw([rows[i] for i in places], len(places))
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    file.parent.mkdir(exist_ok=True)
    strip.save(file)
