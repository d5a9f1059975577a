"""What a run of `mask` or `erase` is given, checked before anything is drawn or loaded."""

import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from salun_sd.checkpoint import save
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.draw import prompts
from salun_sd.draw.images import read_image
from salun_sd.edit import datasets, maskfile
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item
from salun_sd.edit.maskfile import Mask
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import ranks

logger = logging.getLogger(__name__)


def images_of(spec: str | None, prompt: str) -> list[Item] | None:
    """The images that --forget, --retain or a plan names; None where it names none.

    Reads each once, so that a damaged image, or one without the label that `prompt` asks for, is an error before
    anything is drawn.
    """
    if spec is None:
        return None
    items = datasets.items(spec)
    for item in datasets.captioned(items, prompt):
        read_image(item.read(), item.name)
    return items


def check_replaceable(path: Path) -> None:
    """Raise UsageError unless a mask file can be written there. It may replace a mask of salun-sd, no other file."""
    if path.suffix != ".safetensors":
        raise UsageError(f"--out {path} has to end in .safetensors.")
    folder = next(p for p in path.parents if os.path.exists(p))  # those below it are made when the mask is written
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} is not a folder that can be written: choose another --out.")
    if path.exists():
        try:
            maskfile.unpack(path.read_bytes(), str(path))
        except (SalunError, OSError) as e:
            raise UsageError(f"{path} exists and is not a mask of salun-sd; choose another --out.") from e


def check_batch(batch_size: int, parts: int) -> None:
    """Raise UsageError where a batch has fewer images than there are processes times parts to share it."""
    if batch_size < (least := parts * ranks.count()):
        raise UsageError(f"--batch-size {batch_size} is too small for --parts {parts} in each of {ranks.count()} "
                         f"process(es): give {least} or more.")  # fmt: skip


def check_format(out: Path, format: str, reversible: bool) -> None:
    """Raise UsageError where --out or --reversible do not go with --format."""
    if reversible and format != "patch":
        raise UsageError("--reversible is for --format patch: only a patch can keep the base's values.")
    check_place(out, format, ("diffusers", "single-file", "patch"))


def check_writable(base: Checkpoint, format: str) -> None:
    """Raise UsageError where the base cannot be written in a format."""
    if format == "single-file":
        save.single_file(base, base.unet)  # raises where a tensor has no place in a single file


def check_place(out: Path, format: str, formats: Collection[str]) -> None:
    """Raise UsageError where --format is none of `formats`, or --out does not go with it."""
    check_choice("format", format, formats)
    if format == "diffusers" and out.suffix == ".safetensors":
        raise UsageError(f"--out {out} looks like a file, and a diffusers checkpoint is a folder: see --format.")
    if format != "diffusers" and out.suffix != ".safetensors":
        raise UsageError(f"--out {out} has to end in .safetensors for --format {format}.")


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Raise UsageError where an option has another value than its choices."""
    if value not in choices:
        raise UsageError(f"--{option} is {value!r}: give one of {', '.join(choices)}.")


def check_dtype(dtype: str | None) -> None:
    """Raise UsageError for a --dtype that the UNet cannot be held in. None: it was not given."""
    if dtype is not None:
        check_choice("dtype", dtype, ("float32", "bfloat16"))


def checked_size(model: Checkpoint, size: int | None) -> int:
    """Side of the training images in pixels: --size, or the model's own. Raises UsageError where the UNet cannot halve
    it as often as it must."""
    multiple = model.size_multiple
    if size is not None and (size < multiple or size % multiple):
        raise UsageError(f"--size {size} does not fit {model.name}: give a multiple of {multiple}.")
    return size or model.image_size


# The range of an option in words, and its test. Adam moves a weight by about lr at each step, whatever the gradient;
# no weight of a UNet is as large as 1.
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "clip_norm": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "sample_every": ("a whole number from 0 on", lambda v: isinstance(v, Integral) and v >= 0),
    "seed": ("a whole number from 0 to 2147483647", lambda v: isinstance(v, Integral) and 0 <= v < 2**31),
    **dict.fromkeys(
        ("samples", "size", "steps", "batch_size", "parts"),
        ("a whole number from 1 on", lambda v: isinstance(v, Integral) and v >= 1),
    ),
}
OTHER_RANGE = ("a finite number from 0 on", lambda v: 0 <= v < math.inf)


def check_numbers(**values: float | None) -> None:
    """Raise UsageError for an option, by its parameter's name, whose value is out of range. None: it was not given."""
    for name, value in values.items():
        words, is_in_range = RANGES.get(name, OTHER_RANGE)
        if value is not None and not (isinstance(value, Real) and is_in_range(value)):
            raise UsageError(f"--{name.replace('_', '-')} is {value}: give {words}.")


def densities_of(density: float | Sequence[float]) -> list[float]:
    """One density or several, as a list. Raises UsageError where there is none, one twice, or one outside (0, 1]."""
    densities = [plain(d) for d in ([density] if isinstance(density, Real) else density)]
    if not densities:
        raise UsageError("There is no --density: give the share of weights to keep, such as 0.5.")
    if len({f"{d:g}" for d in densities}) < len(densities):
        raise UsageError("The same --density is given twice.")
    for each in densities:
        masks.keep_count(each, sys.maxsize)  # raises outside (0, 1]
    return densities


def plain(value: Any) -> Any:
    """A number of numpy's as Python's own, which JSON can hold; anything else as it is."""
    return value.item() if isinstance(value, Real) and hasattr(value, "item") else value


def prompts_to_retain(
    retain_prompts: str | Sequence[str] | None, concepts: Sequence[Concept], guidance: float
) -> list[tuple[str, float]]:  # fmt: skip
    """Text and guidance scale of each prompt to draw retain images from.

    They are the rows of a prompt set without those whose class a concept names; or the texts of a plan, with
    `guidance`; or, where neither is given, the anchors, as in the paper's erasure of nudity.
    """
    if not isinstance(retain_prompts, str):
        return [(text, guidance) for text in retain_prompts or dict.fromkeys(c.anchor for c in concepts)]
    rows = prompts.read(retain_prompts)
    classes = {p.label for p in rows if p.label}
    class_of = {text: prompts.class_in(text, classes) for c in concepts for text in c.prompts()}
    for text in [text for text, label in class_of.items() if classes and label is None]:
        logger.warning(f"{text!r} names no class of {retain_prompts}: none of its prompts is left out for it.")
    if not (left := [(p.text, p.guidance) for p in rows if not p.label or p.label not in class_of.values()]):
        raise UsageError(f"Every prompt of {retain_prompts} asks for a concept: none is left to retain.")
    return left


def check_retain(retain: str | None, caption: str | None, retain_prompts: str | Sequence[str] | None) -> None:
    """Raise UsageError where the options that say what to retain cannot go together."""
    if retain and retain_prompts:
        raise UsageError("--retain and --retain-prompts cannot go together: give one of them.")
    if caption and not retain:
        raise UsageError("--retain-caption is for the images of --retain, which is not given.")


def images_to_retain(retain: str | None, caption: str | None, concepts: Sequence[Concept]) -> list[Item] | None:
    """The images of --retain. Images without a caption take the anchor's prompt, where there is only one anchor."""
    images = images_of(retain, caption or "")
    if images and not caption and len({c.anchor for c in concepts}) > 1:
        if bare := next((item.name for item in images if item.caption is None), None):
            raise UsageError(f"{bare} has no caption, and there are several anchors: give --retain-caption.")
    return images


def check_mask(spec: str | None) -> None:
    """Raise UsageError where --mask names neither a file nor a control. None: it was not given."""
    if spec is None or spec == "none":
        return
    if spec.startswith("random:"):
        masks.keep_count(_random_density(spec), sys.maxsize)  # raises outside (0, 1]
    elif not Path(spec).is_file():
        raise UsageError(f"Mask {spec} was not found: give a file that salun-sd mask wrote, random:0.5, or none.")


def _random_density(spec: str) -> float:
    """D of random:D."""
    try:
        return float(spec.removeprefix("random:"))
    except ValueError as e:
        raise UsageError(f"--mask {spec} has no density: write random:0.5, say.") from e


def read_mask(spec: str | None, model: Checkpoint, concepts: Sequence[Concept], seed: int) -> Mask | None:
    """The mask that --mask names: a file, checked against the UNet; random:D, of density D; or none, every weight.
    None where --mask is not given. Raises UsageError as `check_mask` does."""
    check_mask(spec)
    if spec is None:
        return None
    shapes = {name: t.shape for name, t in model.unet.items()}
    if spec == "none":
        return Mask(masks.full_bits(shapes), {"base": model.fingerprint, "kind": "none"})
    if spec.startswith("random:"):
        density = _random_density(spec)
        bits = masks.random_bits(shapes, density, seed)
        return Mask(bits, {"base": model.fingerprint, "kind": "random", "density": density, "seed": seed})
    stored = maskfile.unpack(Path(spec).read_bytes(), spec)
    maskfile.check(stored, shapes, model.fingerprint)
    made_for = stored.settings.get("concepts", [])
    if {c.prompt for c in concepts} - set(made_for):
        logger.warning(f"{spec} was made for {', '.join(map(repr, made_for))}, not for these concepts.")
    return stored
