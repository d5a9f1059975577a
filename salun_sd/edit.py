"""The work of `mask` and `erase`, files in and files out: collect images, encode, saliency, train, save."""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from salun_sd import (
    __version__,
    budget,
    checkpoint,
    families,
    generate,
    memory,
    patch,
    provenance,
    ranks,
    save,
    sources,
)
from salun_sd import erase as erasing
from salun_sd import mask as masks
from salun_sd.adam import SalientAdam
from salun_sd.budget import Work
from salun_sd.checkpoint import Checkpoint
from salun_sd.diffusion import Condition, Examples, Schedule
from salun_sd.errors import SalunError, UsageError
from salun_sd.examples import Base, encode, forget_items, retain_items, spread
from salun_sd.files import new_folder, write_atomic
from salun_sd.inputs import check_numbers, check_replaceable, checked_size, given_mask, images_of, kept_prompts
from salun_sd.mask import Mask
from salun_sd.output import check_place, deliver, finished, proof
from salun_sd.plan import Concept
from salun_sd.precision import Precision
from salun_sd.resume import Progress, State, agreed, patient
from salun_sd.saliency import Saliency

LARGE = 100_000_000  # weights of a UNet whose activations are worth recomputing


class Foreseen(NamedTuple):
    """What --dry-run gives in place of a result."""

    settings: dict
    plans: dict[str, dict[str, int]]  # for each step, bytes by part
    advice: list[tuple[str, int]]  # options that bring the largest plan down, with the bytes each saves


class Compute(NamedTuple):
    """How the UNet computes, which changes the result by rounding only."""

    precision: Precision
    is_large: bool  # the model
    checkpointing: bool  # activations are made anew in the backward pass instead of kept
    parts: int = 1  # that a batch is worked through in

    @classmethod
    def of(cls, model: Checkpoint, dtype: str | None, checkpointing: bool | None, parts: int = 1) -> "Compute":
        """As asked or, where nothing is, what fits the device and the model; says what the dtype is and why."""
        precision = Precision.of(dtype, checkpoint.device())
        print(f"The UNet is held in {named(precision.dtype)}: {precision.reason}.", file=sys.stderr)
        is_large = sum(t.shape.numel() for t in model.unet.values()) >= LARGE
        return cls(precision, is_large, is_large if checkpointing is None else checkpointing, parts)

    def load(self, base: Base):
        unet = self.precision.prepare(base.unet(self.precision.dtype))
        if self.checkpointing:
            unet.enable_gradient_checkpointing()
        return unet

    def works(self, model: Checkpoint, resolution: int, *steps: dict) -> list[Work]:
        """The steps of a run, for the memory plan."""
        pixels = 2 ** (len(families.config(model.config, "vae", model.name)["block_out_channels"]) - 1)
        common = {"resolution": resolution, "pixels": pixels, "parts": self.parts,
                  "precision": self.precision, "checkpointing": self.checkpointing}  # fmt: skip
        return [Work(**common, **step) for step in steps]

    def record(self) -> dict:
        return {"dtype": named(self.precision.dtype), "parts": self.parts}


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def planned(model: Checkpoint, works: Sequence[Work]) -> dict[str, dict[str, int]]:
    """The memory plan of each step."""
    config, device = families.config(model.config, "unet", model.name), checkpoint.device()
    return {work.step: budget.plan(config, work, device) for work in works}


def announced(model: Checkpoint, works: Sequence[Work], compute: Compute) -> dict[str, dict[str, int]]:
    """The plan of a run that is about to begin, where the model is large enough to ask; a step that does not fit the
    device is named."""
    plans = planned(model, works) if compute.is_large else {}
    for step, parts in plans.items():
        if not budget.fits(parts, checkpoint.device()):
            print(f"The {step} step takes {budget.peak(parts) / 2**30:.1f} GiB, more than is free: --dry-run says what "
                  "brings it down.", file=sys.stderr)  # fmt: skip
    return plans


def foresee(model: Checkpoint, works: Sequence[Work], settings: dict) -> Foreseen:
    """What --dry-run gives."""
    config, device = families.config(model.config, "unet", model.name), checkpoint.device()
    plans = planned(model, works)
    most = max(works, key=lambda work: budget.peak(plans[work.step]))
    too_much = not budget.fits(plans[most.step], device)
    return Foreseen(settings, plans, budget.advice(config, most, device) if too_much else [])


def make_masks(
    base: Base, unet, forget: Examples, empty: Condition, concepts: Sequence[Concept], densities: list[float],
    guidance: float, seed: int, batch_size: int,
) -> list[Mask]:  # fmt: skip
    """One gradient pass over D_f, one mask for each density."""
    counts = [masks.keep_count(d, sum(p.numel() for p in unet.parameters())) for d in densities]
    schedule = Schedule.of(checkpoint.load_scheduler(base.model))
    saliency = Saliency(unet, schedule, empty, guidance, seed)
    with tqdm(total=len(forget), desc="saliency", unit="image") as bar:
        for done in saliency.accumulate(forget, batch_size):
            bar.update(done - bar.n)
    values = saliency.result()
    settings = {"concepts": [text for c in concepts for text in c.prompts()], "guidance": guidance,
                "images": len(forget), "seed": seed, "dtype": named(unet.dtype),
                "base": base.model.fingerprint, "model": base.model.name, "salun_sd": __version__}  # fmt: skip
    return [
        Mask(masks.select(values, threshold, count), {"density": density, "threshold": threshold, **settings})
        for density, count, threshold in zip(densities, counts, masks.thresholds(values, counts), strict=True)
    ]


def mask(
    model: Checkpoint, concepts: Sequence[Concept], *, samples: int, densities: list[float], guidance: float,
    seed: int, batch_size: int, resolution: int | None, dtype: str | None, checkpointing: bool | None, dry_run: bool,
    out: Path,
) -> list[tuple[Path, Mask]] | Foreseen:  # fmt: skip
    """Compute and write a mask file for each density; with several, the density goes into the file's name."""
    paths = [out if len(densities) == 1 else out.with_name(f"{out.stem}-{d:g}{out.suffix}") for d in densities]
    if len(set(paths)) < len(paths):
        raise UsageError("The same --density is given twice.")
    check_numbers(guidance=guidance)
    base = Base(model, checked_size(model, resolution))
    for density, path in zip(densities, paths, strict=True):
        masks.keep_count(density, sys.maxsize)  # outside (0, 1]: say so before a checkpoint is loaded
        check_replaceable(path)
    compute = Compute.of(model, dtype, checkpointing)
    work = {"step": "mask", "batch": batch_size, "guidance": guidance}
    works = compute.works(model, base.resolution, work)
    if dry_run:
        settings = {"model": model.name, "concepts": [text for c in concepts for text in c.prompts()],
                    "densities": densities, "guidance": guidance, "batch_size": batch_size, "seed": seed,
                    "resolution": base.resolution, **compute.record()}  # fmt: skip
        return foresee(model, works, settings)
    plans = announced(model, works, compute)
    images = [images_of(c.images, c.prompt) for c in concepts]
    items = [item for group in forget_items(base, concepts, images, samples) for item in group]
    forget, row = encode(base, items, [""])
    empty = forget.rows([row[""]])
    memory.forget_peak()
    made = make_masks(base, compute.load(base), forget, empty, concepts, densities, guidance, seed, batch_size)
    foreseen = f"; planned {budget.peak(plans['mask']) / 2**30:.2f} GiB" if plans else ""
    print(f"Peak memory of the mask step: {memory.peak() / 2**30:.2f} GiB{foreseen}.", file=sys.stderr)
    if ranks.is_main():
        for path, each in zip(paths, made, strict=True):
            write_atomic(path, masks.pack(each))
    return list(zip(paths, made, strict=True))


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
    if retain and retain_prompts:
        raise UsageError("--retain and --retain-prompts cannot go together: give one of them.")
    if retain_caption and not retain:
        raise UsageError("--retain-caption is for the images of --retain, which is not given.")
    if reversible and form != "patch":
        raise UsageError("--reversible is for --format patch: only a patch can keep the base's values.")
    if batch_size < parts * ranks.count():
        raise UsageError(f"--batch-size {batch_size} is too small for {parts} parts in each of {ranks.count()} "
                         "processes: give a larger one.")  # fmt: skip
    check_numbers(guidance=guidance, lr=lr, clip=clip, retain_weight=retain_weight, save_every=save_every)
    masks.keep_count(density, sys.maxsize)
    size = checked_size(model, resolution)
    check_place(out, form)
    given = given_mask(mask, model, concepts, seed)
    kept = kept_prompts(retain_prompts, concepts, model.sampling[1])
    images = [images_of(c.images, c.prompt) for c in concepts]
    kept_images = images_of(retain, retain_caption or "")
    if kept_images and not retain_caption and len({c.anchor for c in concepts}) > 1:
        if bare := next((item.name for item in kept_images if item.caption is None), None):
            raise UsageError(f"{bare} has no caption, and there are several anchors: give --retain-caption.")
    if form == "single-file":
        save.single_file(model, model.unet)  # a UNet that has no place there is refused before it is trained
    compute = Compute.of(model, dtype, checkpointing, parts)
    count = sum(len(own) if own else samples for own in images)
    settings = {
        "model": model.name, "concepts": [c.record() for c in concepts], "mask": mask,
        "density": None if given else density, "guidance": None if given else guidance, "retain": retain,
        "retain_caption": retain_caption, "samples": samples, "resolution": size,
        "retain_prompts": retain_prompts if isinstance(retain_prompts, str | None) else list(retain_prompts),
        "retain_weight": retain_weight, "lr": lr, "clip": clip, "steps": steps or -(-count // batch_size),
        "batch_size": batch_size, "anchor_from": anchor_from, "sample_every": sample_every, "seed": seed,
        **compute.record(), "format": form, "reversible": reversible,
    }  # fmt: skip
    share = -(-batch_size // ranks.count())
    steps_of_work = [{"step": "erase", "batch": share, "density": masks.density(given.bits) if given else density,
                      "clips": clip is not None, "keeps_base": anchor_from == "base"}]  # fmt: skip
    if not given:
        steps_of_work = [{"step": "mask", "batch": batch_size, "guidance": guidance}, *steps_of_work]
    works = compute.works(model, size, *steps_of_work)
    if dry_run:
        return foresee(model, works, settings)
    inputs = {
        "base": model.identity,
        "mask": hashlib.sha256(Path(mask).read_bytes()).hexdigest() if mask and Path(mask).is_file() else None,
        "forget": [own and sources.digest(own) for own in images],
        "retain": kept_images and sources.digest(kept_images),
        "retain_prompts": None if retain else hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
    }
    if (done := finished(out, form, model, settings, inputs)) is not None:
        return done

    progress = Progress(out, {"settings": settings, "inputs": inputs}, save_every)
    plans = announced(model, works, compute)
    peaks = {}
    with progress.held() as state:
        base = Base(model, size)
        groups = forget_items(base, concepts, images, samples)
        caption = retain_caption or concepts[0].anchor
        retained, _ = encode(base, retain_items(base, kept_images, caption, kept, samples), [])
        forgotten, row = encode(base, [item for own in groups for item in own], ["", *(c.anchor for c in concepts)])
        peaks["images"] = memory.forget_peak()
        unet = compute.load(base)
        given = state.mask if state else given
        [chosen] = [given] if given else make_masks(
            base, unet, forgotten, forgotten.rows([row[""]]), concepts, [density], guidance, seed, batch_size
        )  # fmt: skip
        if not given:
            peaks["mask"] = memory.forget_peak()
        which = [n for n, own in enumerate(groups) for _ in own]
        anchors = torch.tensor([row[concepts[n].anchor] for n in which])
        texts = [*spread([c.prompt for c in concepts], 4), *spread([text for text, _ in kept], 4)]
        data = (forgotten, anchors, torch.tensor(which), retained)
        values = _train(base, unet, chosen, data, texts, settings, progress, state, compute.precision)
        peaks["erase"] = memory.forget_peak()
        del unet, base, forgotten, retained, data
        made = patch.of_training(values, chosen.bits, model.unet, reversible)
        record = {
            "schema": 2,
            "command": command,
            "concepts": settings["concepts"],
            "settings": settings,
            "inputs": inputs,
            "images": {"forget": len(which), "retain": len(kept_images or ()) or samples},
            "data": {
                "forget": "; ".join(c.images or f"drawn by the base, {samples} for {c.prompt!r}" for c in concepts),
                "retain": retain or f"drawn by the base from {_said(retain_prompts)}",
            },
        }
        if ranks.is_main():
            record |= proof(model, made, chosen)
            with new_folder(out if form == "diffusers" else provenance.run_folder(out)) as beside:
                progress.hand_over(beside)
                run = {"seconds": round(time.monotonic() - started, 1), "peak_bytes": peaks,
                       "planned_bytes": {step: budget.peak(parts) for step, parts in plans.items()}}  # fmt: skip
                write_atomic(beside / "run.json", json.dumps(run) + "\n")
                deliver(model, made._replace(record=record), chosen, form, out, beside)
        ranks.wait()
    return record


def _said(retain_prompts: str | Sequence[str] | None) -> str:
    if retain_prompts is None:
        return "the anchors"
    return retain_prompts if isinstance(retain_prompts, str) else ", ".join(map(repr, retain_prompts))


def _train(
    base: Base, unet, mask: Mask, data: tuple, texts: list[str], settings: dict, progress: Progress,
    state: State | None, precision: Precision,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Run the loop to its end, from the state on if there is one; gives the trained values. Writes the losses and,
    where asked for, strips drawn from `texts`, into the folder of the progress."""
    forget, anchors, concepts, retain = data
    every, steps = settings["sample_every"], settings["steps"]
    drawer = checkpoint.load(base.model, unet=unet) if every and ranks.is_main() else None
    if drawer and not precision.widens:
        drawer.to(unet.dtype)

    def strip(step: int) -> None:
        if drawer and step % every == 0:
            _write_strip(drawer, base.model, texts, progress.folder / "samples" / f"step-{step:05d}.png")

    adam = SalientAdam(
        unet, mask.bits, base.model.unet, settings["lr"], clip=settings["clip"], holds=settings["parts"] > 1,
        keeps_base=settings["anchor_from"] == "base",
    )  # fmt: skip
    if state:
        adam.restore(state.adam, state.steps)
        print(f"Going on from step {state.steps}, where an earlier run was stopped.", file=sys.stderr)
    else:
        strip(0)
    names = ("steps", "batch_size", "retain_weight", "anchor_from", "seed", "parts")
    schedule = Schedule.of(checkpoint.load_scheduler(base.model))
    loop = erasing.erase(
        unet, adam, schedule, forget, anchors, concepts, retain, **{name: settings[name] for name in names}
    )  # fmt: skip
    with (
        progress.losses(adam.steps) as losses, patient() as interrupts,
        tqdm(loop, total=steps, initial=adam.steps, desc="erase") as bar,
    ):  # fmt: skip
        try:
            for row in bar:
                losses.write(json.dumps(row) + "\n")
                bar.set_postfix(forget=f"{row['forget']:.4f}", retain=f"{row['retain']:.4f}")
                strip(row["step"])
                stops = agreed(interrupts)
                if row["step"] < steps and (stops or progress.is_due()):
                    progress.save(adam, mask)
                if stops:
                    raise KeyboardInterrupt(f"Interrupted after step {row['step']} of {steps}, which is kept in "
                                            f"{progress.folder}: the same command goes on from there.")  # fmt: skip
        except SalunError:  # it would come again
            progress.forget()
            raise
    return adam.values()


def _write_strip(pipeline, model: Checkpoint, texts: list[str], file: Path) -> None:
    """One row of images, from seeds that neither training images nor a prompt set use."""
    steps, guidance = model.sampling
    rows, size = [(text, 2**31 + i) for i, text in enumerate(texts)], generate.images_per_pass(pipeline)
    images = []
    for start in range(0, len(rows), size):
        images += generate.sample(pipeline, rows[start : start + size], guidance, steps)
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    file.parent.mkdir(exist_ok=True)
    strip.save(file)
