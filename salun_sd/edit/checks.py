"""What a run of `mask` or `erase` is given, checked before anything is drawn or loaded."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from salun_sd.checkpoint import save
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.draw import prompts
from salun_sd.draw.images import read_image
from salun_sd.edit import datasets as sources
from salun_sd.edit import maskfile
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item
from salun_sd.edit.maskfile import Mask
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import ranks

logger = logging.getLogger(__name__)


def images_of(spec: str | None, prompt: str) -> list[Item] | None:
    """The images that a spec names; one that cannot be read or lacks the label that its prompt asks for is said now,
    before anything is drawn."""
    if spec is None:
        return None
    for item in sources.captioned(found := sources.items(spec), prompt):
        read_image(item.read(), item.name)
    return found


def check_replaceable(path: Path) -> None:
    """A mask may be made anew in its place; any other file is not ours to replace."""
    if path.suffix != ".safetensors":
        raise UsageError(f"--out {path} has to end in .safetensors.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path.parent} cannot be written: choose another --out.")
    if path.exists():
        try:
            maskfile.unpack(path.read_bytes(), str(path))
        except (SalunError, OSError) as e:
            raise UsageError(f"{path} exists and is not a mask of salun-sd; choose another --out.") from e


def check_batch(batch_size: int, parts: int) -> None:
    """Raise UsageError where a batch has fewer images than the processes and parts that share it."""
    if batch_size < (least := parts * ranks.count()):
        raise UsageError(f"--batch-size {batch_size} is too small for --parts {parts} in each of {ranks.count()} "
                         f"process(es): give {least} or more.")  # fmt: skip


def check_form(base: Checkpoint, out: Path, form: str, reversible: bool) -> None:
    """Raise UsageError where --out or --reversible do not go with --format, or the base has no place in it."""
    if reversible and form != "patch":
        raise UsageError("--reversible is for --format patch: only a patch can keep the base's values.")
    check_place(out, form)
    if form == "single-file":
        save.single_file(base, base.unet)  # a UNet that has no place there is refused before it is trained


def check_place(out: Path, form: str) -> None:
    """Raise UsageError where --out does not go with --format."""
    if form == "diffusers" and out.suffix == ".safetensors":
        raise UsageError(f"--out {out} looks like a file, and a diffusers checkpoint is a folder: see --format.")
    if form != "diffusers" and out.suffix != ".safetensors":
        raise UsageError(f"--out {out} has to end in .safetensors for --format {form}.")


def checked_size(model: Checkpoint, size: int | None) -> int:
    """Pixels of a side to train at. Raises UsageError where the UNet cannot halve it as often as it must."""
    least = model.least_size
    if size is not None and (size < least or size % least):
        raise UsageError(f"--size {size} does not fit {model.name}: give a multiple of {least}.")
    return size or model.image_size


# Adam moves a weight by about lr at each step, whatever the gradient: no weight of a UNet is as large as 1.
RANGES = {"lr": ("above 0, at most 1", lambda v: 0 < v <= 1), "clip": ("above 0", lambda v: 0 < v < math.inf)}


def check_numbers(**values: float | None) -> None:
    """Raise UsageError for an option's value that is out of its range; None is one that was not given."""
    for name, value in values.items():
        words, holds = RANGES.get(name, ("from 0 on", lambda v: 0 <= v < math.inf))
        if value is not None and not holds(value):
            raise UsageError(f"--{name.replace('_', '-')} is {value:g}: give a finite number {words}.")


def kept_prompts(kept: str | Sequence[str] | None, concepts: Sequence[Concept], guidance: float):
    """Text and guidance scale of what must stay: the rows of a prompt set, less those whose class a concept names; the
    texts of a plan; or, without either, the anchors, as the paper does for nudity."""
    if not isinstance(kept, str):
        return [(text, guidance) for text in kept or dict.fromkeys(c.anchor for c in concepts)]
    rows = prompts.read(kept)
    classes = {p.label for p in rows if p.label}
    gone = {text: prompts.class_in(text, classes) for c in concepts for text in c.prompts()}
    for text in [text for text, label in gone.items() if classes and label is None]:
        logger.warning(f"{text!r} names no class of {kept}: none of its prompts is left out for it.")
    if not (left := [(p.text, p.guidance) for p in rows if not p.label or p.label not in gone.values()]):
        raise UsageError(f"Every prompt of {kept} asks for what must go: none is left to retain.")
    return left


def to_keep(
    retain: str | None, caption: str | None, retain_prompts: str | Sequence[str] | None, concepts: Sequence[Concept]
) -> list[Item] | None:  # fmt: skip
    """The images of --retain. Those without a caption take the anchor's, if there is one anchor."""
    if retain and retain_prompts:
        raise UsageError("--retain and --retain-prompts cannot go together: give one of them.")
    if caption and not retain:
        raise UsageError("--retain-caption is for the images of --retain, which is not given.")
    images = images_of(retain, caption or "")
    if images and not caption and len({c.anchor for c in concepts}) > 1:
        if bare := next((item.name for item in images if item.caption is None), None):
            raise UsageError(f"{bare} has no caption, and there are several anchors: give --retain-caption.")
    return images


def given_mask(spec: str | None, model: Checkpoint, concepts: Sequence[Concept], seed: int) -> Mask | None:
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
    stored = maskfile.unpack(Path(spec).read_bytes(), spec)
    maskfile.check(stored, shapes, model.fingerprint)
    made_for = stored.settings.get("concepts", [])
    if {c.prompt for c in concepts} - set(made_for):
        logger.warning(f"{spec} was made for {', '.join(map(repr, made_for))}, not for these concepts.")
    return stored
