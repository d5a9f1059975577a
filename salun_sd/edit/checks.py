"""What a run of `mask` or `erase` is given, checked before anything is drawn or loaded."""

import logging
from collections.abc import Collection, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from salun_sd.checkpoint import provenance, save
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core import mask as masks
from salun_sd.draw.images import read_image
from salun_sd.edit import datasets, maskfile
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item
from salun_sd.errors import SalunError, UsageError
from salun_sd.methods.batches import CONCEPT
from salun_sd.methods.loop import Method
from salun_sd.methods.uce import UCE
from salun_sd.runtime import files, ranks
from salun_sd.runtime.ranges import check_numbers

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
    _check_outside(path)
    files.check_place(path)
    if path.exists():
        try:
            maskfile.read(path)
        except (SalunError, OSError) as e:
            raise UsageError(f"{path} exists and is not a mask of salun-sd; choose another --out.") from e


def check_method(base: Checkpoint, name: str, method: Method | UCE) -> None:
    """Raise UsageError for a method that needs what the base has not."""
    if base.classes and method.needs_text:
        raise UsageError(f"--method {name} works on the tokens of a text, and {base.name} draws classes: give another "
                         "--method, such as salun.")  # fmt: skip
    if method.needs_empty and not base.is_guided:
        raise UsageError(f"--method {name} needs the prediction without a class, and {base.name} has no null class: "
                         "give another --method, such as salun.")  # fmt: skip


def check_images(concepts: Sequence[Concept], name: str, method: Method | UCE, needs_mask: bool) -> None:
    """Raise UsageError for images of a concept, of --forget or of a plan, that neither the method nor a mask takes."""
    given = next((c for c in concepts if c.images), None)
    if given and method.shows != CONCEPT and not needs_mask:
        raise UsageError(f"The images of {given.prompt!r}, {given.images}, are of no use to --method {name}: leave out "
                         "--forget or, in a plan, images.")  # fmt: skip


def named(base: Checkpoint, concepts: Sequence[Concept]) -> tuple[Concept, ...]:
    """The concepts as they are; for a class-conditional base, with the labels of the classes that they name. Raises
    UsageError where one names none."""
    if not base.classes:
        return tuple(concepts)
    label = base.classes.label
    return tuple(
        c._replace(prompt=label(c.prompt), anchor=c.anchor and label(c.anchor), synonyms=tuple(map(label, c.synonyms)))
        for c in concepts
    )


def check_batch(batch_size: int, parts: int) -> None:
    """Raise UsageError where a batch has fewer images than there are processes times parts to share it."""
    if batch_size < (least := parts * ranks.count()):
        raise UsageError(f"--batch-size {batch_size} is too small for --parts {parts} in each of {ranks.count()} "
                         f"process(es): give {least} or more.")  # fmt: skip


def warn_of_batch(batch_size: int, images: int) -> None:
    """Log a warning where an update takes more forget images than there are."""
    if batch_size > images:
        logger.warning(f"--batch-size {batch_size} is more than the {images} images to forget: each update takes some "
                       f"of them more than once. Give --batch-size {images}, or more images.")  # fmt: skip


def check_format(out: Path, format: str, reversible: bool) -> None:
    """Raise UsageError where --out or --reversible do not go with --format."""
    if reversible and format != "patch":
        raise UsageError("--reversible is for --format patch: only a patch can keep the base's values.")
    check_out(out, format, ("diffusers", "single-file", "patch"))


def check_writable(base: Checkpoint, format: str) -> None:
    """Raise UsageError where the base cannot be written in a format."""
    if format == "single-file":
        try:
            save.single_file(base, base.unet)
        except SalunError as e:  # a tensor has no place in it
            raise UsageError(f"{base.name} cannot be written as a single file: {e} Give another --format.") from e


def check_out(out: Path, format: str, formats: Collection[str]) -> None:
    """Raise UsageError where --format is none of `formats`, or --out does not go with it or cannot be written."""
    check_choice("format", format, formats)
    if format == "diffusers" and out.suffix == ".safetensors":
        raise UsageError(f"--out {out} looks like a file, and a diffusers checkpoint is a folder: see --format.")
    if format != "diffusers" and out.suffix != ".safetensors":
        raise UsageError(f"--out {out} has to end in .safetensors for --format {format}.")
    if out.name in ("", "..") or out.absolute() == Path.cwd():
        raise UsageError(f"--out {out} is the folder that you are in, or above it: give the name of a new one.")
    _check_outside(out)
    files.check_place(out, provenance.run_folder(out))


def _check_outside(out: Path) -> None:
    """Raise UsageError for a place inside a checkpoint's folder: who gets the folder would get the mask."""
    if inside := next((p for p in out.absolute().parents if (p / "model_index.json").exists()), None):
        raise UsageError(f"--out {out} lies in the checkpoint {inside}, which others may get, and a mask helps to undo "
                         "an erasure: give a place outside it.")  # fmt: skip


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Raise UsageError where an option has another value than its choices."""
    if value not in choices:
        raise UsageError(f"--{option} is {value!r}: give {'one of ' * (len(choices) > 1)}{', '.join(choices)}.")


def checked_size(model: Checkpoint, size: int | None) -> int:
    """Side of the training images in pixels: --size, or the model's own. Raises UsageError where the UNet cannot halve
    it as often as it must."""
    multiple = model.size_multiple
    if size is not None and (size < multiple or size % multiple):
        raise UsageError(f"--size {size} does not fit {model.name}: give a multiple of {multiple}.")
    return size or model.image_size


def densities_of(density: float | Sequence[float]) -> list[float]:
    """One density or several, as a list. Raises UsageError where there is none, one that is out of range, or two that
    are one to six digits, as the names of the mask files have them."""
    densities = [plain(d) for d in ([density] if isinstance(density, Real) else density)]
    if not densities:
        raise UsageError("There is no --density: give the share of weights to keep, such as 0.5.")
    for each in densities:
        check_numbers(density=each)
    names = [f"{each:g}" for each in densities]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UsageError(f"--density {twice} is given twice: give each once, as the mask files are named by it.")
    return densities


def check_kept(base: Checkpoint, densities: Sequence[float]) -> None:
    """Raise UsageError for a density that keeps no weight of the UNet."""
    for each in densities:
        masks.keep_count(each, base.weights)


def plain(value: Any) -> Any:
    """A number of numpy's as Python's own, which JSON can hold; anything else as it is."""
    return value.item() if isinstance(value, Real) and hasattr(value, "item") else value


def check_retain(retain: str | None, caption: str | None, retain_prompts: str | Sequence[str] | None) -> None:
    """Raise UsageError where the options that say what to retain cannot go together."""
    if retain and retain_prompts:
        raise UsageError("--retain and --retain-prompts cannot go together: give one of them.")
    if caption and not retain:
        raise UsageError("--retain-caption is for the images of --retain, which is not given.")


def images_to_retain(retain: str | None, caption: str | None, concepts: Sequence[Concept]) -> list[Item] | None:
    """The images of --retain. Images without a caption take the anchor's prompt, where there is only one anchor; else
    raises UsageError."""
    images, anchors = images_of(retain, caption or ""), {c.anchor for c in concepts if c.anchor}
    bare = next((item.name for item in images or () if item.caption is None), None)
    if bare and not caption and len(anchors) != 1:
        number = "are several anchors" if anchors else "is no anchor"
        raise UsageError(f"{bare} has no caption, and there {number}: give --retain-caption.")
    return images
