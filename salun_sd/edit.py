"""The work of `mask` and `erase`, files in and files out: collect images, encode, saliency, train, save."""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from salun_sd import __version__, generate, patch, prompts, provenance, save, sources
from salun_sd import erase as erasing
from salun_sd import mask as masks
from salun_sd.checkpoint import Checkpoint
from salun_sd.diffusion import Condition, Examples, Schedule
from salun_sd.errors import SalunError, UsageError
from salun_sd.examples import Base, encode, forget_items, retain_items, spread
from salun_sd.files import new_folder, write_atomic
from salun_sd.images import read_image
from salun_sd.mask import Mask
from salun_sd.output import check_place, deliver, finished, peak_memory, proof
from salun_sd.plan import Concept
from salun_sd.saliency import Saliency
from salun_sd.sources import Item


def make_masks(
    base: Base, forget: Examples, empty: Condition, concepts: Sequence[Concept], densities: list[float],
    guidance: float, seed: int, batch_size: int,
) -> list[Mask]:  # fmt: skip
    """One gradient pass over D_f, one mask for each density."""
    pipeline = base.trainable()
    total = sum(p.numel() for p in pipeline.unet.parameters())
    counts = [masks.keep_count(d, total) for d in densities]
    saliency = Saliency(pipeline.unet, Schedule.of(pipeline.scheduler), empty, guidance, seed)
    with tqdm(total=len(forget), desc="saliency", unit="image") as bar:
        for done in saliency.accumulate(forget, batch_size):
            bar.update(done - bar.n)
    values = saliency.result()
    settings = {"concepts": [text for c in concepts for text in c.prompts()], "guidance": guidance,
                "images": len(forget), "seed": seed, "base": base.model.fingerprint, "model": base.model.name,
                "salun_sd": __version__}  # fmt: skip
    return [
        Mask(masks.select(values, threshold, count), {"density": density, "threshold": threshold, **settings})
        for density, count, threshold in zip(densities, counts, masks.thresholds(values, counts), strict=True)
    ]


def mask(
    model: Checkpoint, concepts: Sequence[Concept], *, samples: int, densities: list[float], guidance: float,
    seed: int, batch_size: int, resolution: int | None, out: Path,
) -> list[tuple[Path, Mask]]:  # fmt: skip
    """Compute and write a mask file for each density; with several, the density goes into the file's name."""
    paths = [out if len(densities) == 1 else out.with_name(f"{out.stem}-{d:g}{out.suffix}") for d in densities]
    if len(set(paths)) < len(paths):
        raise UsageError("The same --density is given twice.")
    _check_numbers(guidance=guidance)
    base = Base(model, _checked_size(model, resolution))
    for density, path in zip(densities, paths, strict=True):
        masks.keep_count(density, sys.maxsize)  # outside (0, 1]: say so before a checkpoint is loaded
        _check_replaceable(path)
    images = [_images(c.images, c.prompt) for c in concepts]
    items = [item for group in forget_items(base, concepts, images, samples) for item in group]
    forget, row = encode(base, items, [""])
    made = make_masks(base, forget, forget.rows([row[""]]), concepts, densities, guidance, seed, batch_size)
    for path, each in zip(paths, made, strict=True):
        write_atomic(path, masks.pack(each))
    return list(zip(paths, made, strict=True))


def _images(spec: str | None, prompt: str) -> list[Item] | None:
    """The images that a spec names; one that cannot be read or lacks the label that its prompt asks for is said now,
    before anything is drawn."""
    if spec is None:
        return None
    for item in sources.captioned(found := sources.items(spec), prompt):
        read_image(item.read(), item.name)
    return found


def _check_replaceable(path: Path) -> None:
    """A mask may be made anew in its place, and that is said; any other file is not ours to replace."""
    if path.suffix != ".safetensors":
        raise UsageError(f"--out {path} has to end in .safetensors.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path.parent} cannot be written: choose another --out.")
    if path.exists():
        try:
            masks.unpack(path.read_bytes(), str(path))
        except (SalunError, OSError) as e:
            raise UsageError(f"{path} exists and is not a mask of salun-sd; choose another --out.") from e
        print(f"{path} is there already; the mask is made anew in its place.", file=sys.stderr)


def _checked_size(model: Checkpoint, resolution: int | None) -> int:
    """Pixels of a side to train at. Raises UsageError where the UNet cannot halve it as often as it must."""
    least = model.least_size
    if resolution is not None and (resolution < least or resolution % least):
        raise UsageError(f"--resolution {resolution} does not fit {model.name}: give a multiple of {least}.")
    return resolution or model.image_size


def _check_numbers(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0) or (name == "lr" and value == 0):
            least = "above 0" if name == "lr" else "from 0 on"
            raise UsageError(f"--{name.replace('_', '-')} is {value:g}: give a finite number {least}.")


def kept_prompts(kept: str | Sequence[str] | None, concepts: Sequence[Concept], guidance: float):
    """Text and guidance scale of what must stay: the rows of a prompt set, less those whose class a concept names; the
    texts of a plan; or, without either, the anchors, as the paper does for nudity."""
    if not isinstance(kept, str):
        return [(text, guidance) for text in kept or dict.fromkeys(c.anchor for c in concepts)]
    rows = prompts.read(kept)
    classes = {p.label for p in rows if p.label}
    gone = {text: prompts.class_in(text, classes) for c in concepts for text in c.prompts()}
    for text in [text for text, label in gone.items() if classes and label is None]:
        print(f"{text!r} names no class of {kept}: none of its prompts is left out for it.", file=sys.stderr)
    if not (left := [(p.text, p.guidance) for p in rows if not p.label or p.label not in gone.values()]):
        raise UsageError(f"Every prompt of {kept} asks for what must go: none is left to retain.")
    return left


def erase(
    model: Checkpoint, concepts: Sequence[Concept], *, mask: str | None, density: float, guidance: float,
    retain: str | None, retain_caption: str | None, retain_prompts: str | Sequence[str] | None, samples: int,
    resolution: int | None, retain_weight: float, lr: float, steps: int | None, batch_size: int, anchor_from: str,
    sample_every: int, seed: int, form: str, reversible: bool, out: Path, command: str,
) -> dict:  # fmt: skip
    """Erase the concepts and write the checkpoint `out` in a form, "diffusers", "single-file" or "patch"; gives back
    the record that it carries.

    Where an earlier run left the same checkpoint from the same inputs, gives back its record.
    """
    started = time.monotonic()
    if retain and retain_prompts:
        raise UsageError("--retain and --retain-prompts cannot go together: give one of them.")
    if retain_caption and not retain:
        raise UsageError("--retain-caption is for the images of --retain, which is not given.")
    if reversible and form != "patch":
        raise UsageError("--reversible is for --format patch: only a patch can keep the base's values.")
    _check_numbers(guidance=guidance, lr=lr, retain_weight=retain_weight)
    masks.keep_count(density, sys.maxsize)
    size = _checked_size(model, resolution)
    check_place(out, form)
    given = _given_mask(mask, model, concepts, seed)
    kept = kept_prompts(retain_prompts, concepts, model.sampling[1])
    images = [_images(c.images, c.prompt) for c in concepts]
    kept_images = _images(retain, retain_caption or "")
    if kept_images and not retain_caption and len({c.anchor for c in concepts}) > 1:
        if bare := next((item.name for item in kept_images if item.caption is None), None):
            raise UsageError(f"{bare} has no caption, and there are several anchors: give --retain-caption.")
    if form == "single-file":
        save.single_file(model, model.unet)  # a UNet that has no place there is refused before it is trained
    count = sum(len(own) if own else samples for own in images)
    settings = {
        "model": model.name, "concepts": [c.record() for c in concepts], "mask": mask,
        "density": None if given else density, "guidance": None if given else guidance, "retain": retain,
        "retain_caption": retain_caption, "samples": samples, "resolution": size,
        "retain_prompts": retain_prompts if isinstance(retain_prompts, str | None) else list(retain_prompts),
        "retain_weight": retain_weight, "lr": lr, "steps": steps or -(-count // batch_size), "batch_size": batch_size,
        "anchor_from": anchor_from, "sample_every": sample_every, "seed": seed, "format": form,
        "reversible": reversible,
    }  # fmt: skip
    inputs = {
        "base": model.identity,
        "mask": hashlib.sha256(Path(mask).read_bytes()).hexdigest() if mask and Path(mask).is_file() else None,
        "forget": [own and sources.digest(own) for own in images],
        "retain": kept_images and sources.digest(kept_images),
        "retain_prompts": None if retain else hashlib.sha256(json.dumps(kept).encode()).hexdigest(),
    }
    if (done := finished(out, form, model, settings, inputs)) is not None:
        return done

    with new_folder(out if form == "diffusers" else provenance.run_folder(out)) as beside:
        base = Base(model, size, draws_later=sample_every > 0)
        groups = forget_items(base, concepts, images, samples)
        caption = retain_caption or concepts[0].anchor
        retained, _ = encode(base, retain_items(base, kept_images, caption, kept, samples), [])
        forgotten, row = encode(base, [item for own in groups for item in own], ["", *(c.anchor for c in concepts)])
        empty = forgotten.rows([row[""]])
        [chosen] = [given] if given else make_masks(
            base, forgotten, empty, concepts, [density], guidance, seed, batch_size
        )  # fmt: skip
        which = [n for n, own in enumerate(groups) for _ in own]
        anchors = torch.tensor([row[concepts[n].anchor] for n in which])
        texts = [*spread([c.prompt for c in concepts], 4), *spread([text for text, _ in kept], 4)]
        unet = _train(base, chosen, forgotten, anchors, torch.tensor(which), retained, texts, settings, beside)
        made = patch.of_training(unet, chosen.bits, model.unet, reversible)
        del unet, base, forgotten, retained
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
            **proof(model, made, chosen),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_bytes": peak_memory(),
        }  # fmt: skip
        deliver(model, made._replace(record=record), chosen, form, out, beside)
    return record


def _said(retain_prompts: str | Sequence[str] | None) -> str:
    if retain_prompts is None:
        return "the anchors"
    return retain_prompts if isinstance(retain_prompts, str) else ", ".join(map(repr, retain_prompts))


def _given_mask(spec: str | None, model: Checkpoint, concepts: Sequence[Concept], seed: int) -> Mask | None:
    """The mask that --mask asks for: a file, checked against the UNet, random:D, or none; None where it is to be
    computed."""
    if spec is None:
        return None
    shapes = {name: t.shape for name, t in model.unet.items()}
    if spec == "none":
        return Mask(masks.full_bits(shapes), {"base": model.fingerprint, "kind": "none"})
    if spec.startswith("random:"):
        try:
            density = float(spec.removeprefix("random:"))
        except ValueError as e:
            raise UsageError(f"--mask {spec} has no density: write random:0.5, say.") from e
        bits = masks.random_bits(shapes, density, seed)
        return Mask(bits, {"base": model.fingerprint, "kind": "random", "density": density, "seed": seed})
    if not Path(spec).is_file():
        raise UsageError(f"Mask {spec} was not found: give a file that salun-sd mask wrote, random:0.5, or none.")
    stored = masks.unpack(Path(spec).read_bytes(), spec)
    masks.check(stored, shapes, model.fingerprint)
    made_for = stored.settings.get("concepts", [])
    if {c.prompt for c in concepts} - set(made_for):
        print(f"{spec} was made for {', '.join(map(repr, made_for))}, not for these concepts.", file=sys.stderr)
    return stored


def _train(
    base: Base, mask: Mask, forget: Examples, anchors: torch.Tensor, concepts: torch.Tensor, retain: Examples,
    texts: list[str], settings: dict, folder: Path,
):  # fmt: skip
    """Run the loop to its end, gives back the UNet; writes losses.jsonl and, where asked for, the strips of samples/,
    drawn from `texts`."""
    names = ("steps", "batch_size", "lr", "retain_weight", "anchor_from", "seed")
    every = settings["sample_every"]
    pipeline = base.trainable()
    if every:
        _write_strip(base, texts, folder / "samples" / "step-00000.png")
    loop = erasing.erase(
        pipeline.unet, mask.bits, Schedule.of(pipeline.scheduler), forget, anchors, concepts, retain,
        **{name: settings[name] for name in names},
    )  # fmt: skip
    with (folder / "losses.jsonl").open("w") as losses, tqdm(loop, total=settings["steps"], desc="erase") as bar:
        for row in bar:
            losses.write(json.dumps(row) + "\n")
            bar.set_postfix(forget=f"{row['forget']:.4f}", retain=f"{row['retain']:.4f}")
            if every and row["step"] % every == 0:
                _write_strip(base, texts, folder / "samples" / f"step-{row['step']:05d}.png")
    return pipeline.unet


def _write_strip(base: Base, texts: list[str], file: Path) -> None:
    """One row of images, from seeds that neither training images nor a prompt set use."""
    steps, guidance = base.model.sampling
    rows, size = [(text, 2**31 + i) for i, text in enumerate(texts)], generate.images_per_pass(base.pipeline())
    images = []
    for start in range(0, len(rows), size):
        images += generate.sample(base.pipeline(), rows[start : start + size], guidance, steps)
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    file.parent.mkdir(exist_ok=True)
    strip.save(file)
