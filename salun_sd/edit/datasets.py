"""Training images and their captions, from a folder or from a data set of the `datasets` library."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from salun_sd.draw.folders import images_in, left_out
from salun_sd.draw.hub import HUB_ID, splits_of
from salun_sd.edit.captions import CAPTION_COLUMNS, caption_files, captions_of, is_metadata
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime.contents import file_bytes
from salun_sd.runtime.texts import checked_text

logger = logging.getLogger(__name__)

FILTERED = re.compile(r"(?P<id>.+):(?P<column>[^:=!]+)(?P<sign>!?=)(?P<value>.+)")  # greedy: the last colon that fits
STRINGS = ("string", "large_string")


class Item(NamedTuple):
    """An image to train on; its file is not read yet."""

    name: str  # for messages: the file's path, or "frgfm/imagenette:train[12]"
    caption: str | None  # its own; None: the command's prompt is used
    label: str | None  # class name in a labelled data set
    read: Callable[[], bytes]  # the image file's bytes; raises SalunError where there is none


def items(spec: str) -> list[Item]:
    """The images that `spec` names: of a folder in the order of their names, of a data set in its own order.

    A spec is a folder with images in it, or a data set: `ID`, `ID:column=value` or `ID:column!=value`, where ID is
    org/name or org/name/configuration on the Hugging Face Hub, or a folder that the `datasets` library can load. How
    many images and captions there are is logged, and what of a folder is left out. Raises UsageError where what the
    spec names does not exist, SalunError where it cannot be used.
    """
    try:
        found = _found(spec)
    except UnicodeDecodeError as e:  # of a data set
        raise SalunError(f"{spec} holds a text that is not UTF-8: repair it, or give the images as a folder.") from e
    for item in found:
        checked_text(f"{item.caption} {item.label}", f"The caption or label of {item.name}", SalunError)
    with_captions = sum(item.caption is not None for item in found)
    logger.info(f"{spec}: {len(found)} image(s), {with_captions} of them with captions.")
    return found


def _found(spec: str) -> list[Item]:
    if (folder := Path(spec)).is_dir():
        if files := images_in(folder):
            return _of_folder(folder, files)
        data = (f for f in folder.rglob("*") if f.suffix in (".parquet", ".arrow") and not is_metadata(f))
        if not any(data):
            others = left_out(folder)
            raise UsageError(f"Image folder {spec} holds no images that can be read: give one with .png, .jpg or other "
                             f"image files.{f' It has {others}.' if others else ''}")  # fmt: skip
        return _rows(spec)
    if folder.exists():
        raise UsageError(f"Image folder {spec} is a file: give the folder that it is in, {folder.absolute().parent}.")
    name, *condition = match.groups() if (match := FILTERED.fullmatch(spec)) else (spec,)
    if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise UsageError(f"Image folder {spec} was not found: give a folder of images, or a data set as org/name, "
                         "org/name:column=value or org/name:column!=value.")  # fmt: skip
    return _rows(name, *(word.strip() for word in condition))


def _of_folder(folder: Path, files: list[Path]) -> list[Item]:
    """An item for each image file of a folder; a warning names what is left out."""
    captions = captions_of(folder, files)
    if others := left_out(folder, {f.name for f in caption_files(folder)}, "an image or as captions"):
        logger.warning(f"{folder}: left out are {others}.")
    return [Item(str(f), captions.get(f.name), None, partial(file_bytes, f)) for f in files]


def captioned(items: list[Item], prompt: str) -> list[Item]:
    """The items, each with a caption: its own, or else the prompt with the item's label in place of "{label}".

    Raises UsageError where the prompt needs a label and an item has none.
    """
    for item in items:
        if "{label}" in prompt and item.caption is None and item.label is None:
            raise UsageError(f"{prompt!r} asks for a label, and {item.name} has none: give a prompt without {{label}}.")
    return [
        i._replace(caption=prompt.replace("{label}", i.label or "")) if i.caption is None else i for i in items
    ]  # fmt: skip


def digest(items: list[Item]) -> str:
    """SHA-256, in hex, of the bytes and captions of the items in their order. Reads each once."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([hashlib.sha256(item.read()).hexdigest(), item.caption]).encode())
    return digest.hexdigest()


def _rows(name: str, column: str = "", sign: str = "", value: str = "") -> list[Item]:
    """The rows of a data set that fit the condition, or all of them. Nothing is decoded.

    The label of a row is its class in the condition's column or, without a condition, in the only column of classes.
    A blank caption counts as none here, as users cannot edit the data set of somebody else.
    """
    split, rows = _split(name)
    from datasets import ClassLabel, Image, Value

    types = {c: f.dtype if isinstance(f, Value) else type(f).__name__ for c, f in rows.features.items()}
    images = [c for c, f in rows.features.items() if isinstance(f, Image)]
    if len(images) != 1 and "image" not in images:
        columns = ", ".join(f"{c} ({t})" for c, t in types.items())
        raise SalunError(f"{name} has to have one column of images, or one called image; its columns are {columns}.")
    image = images[0] if len(images) == 1 else "image"
    if column and column not in types:
        raise UsageError(f"{name} has no column {column}: it has {', '.join(types)}.")
    classes = [c for c, f in rows.features.items() if isinstance(f, ClassLabel)]
    labels, kept = [None] * len(rows), range(len(rows))
    if labelled := column or (classes[0] if len(classes) == 1 else None):
        known, labels = _labels(name, rows, labelled, types[labelled])
    if column:
        if (chosen := _match(value, known, column in classes)) is None:
            raise UsageError(f"{name} has no {column} {value!r}: it has {some(known, 20)}.")
        kept = [i for i, label in enumerate(labels) if (label == chosen) == (sign == "=")]
    if not kept:
        raise UsageError(f"{name} has no image{f' with {column}{sign}{value}' if column else ''}.")

    text = next((c for c in CAPTION_COLUMNS if types.get(c) in STRINGS), None)
    captions = [" ".join((c or "").split()) or None for c in rows[text][:]] if text else [None] * len(rows)
    named = not column or column in classes or types[column] in STRINGS  # a number is not a class name
    encoded = rows.select_columns([image]).cast_column(image, Image(decode=False))
    names = {i: f"{name}:{split}[{i}]" for i in kept}
    return [Item(names[i], captions[i], labels[i] if named else None, partial(_row_bytes, encoded, i, image, names[i]))
            for i in kept]  # fmt: skip


def _split(name: str):
    """Name and `Dataset` of the data set's training split, or of its only split."""
    splits = splits_of(name)
    split = "train" if "train" in splits else next(iter(splits))
    if split != "train" and len(splits) > 1:
        raise SalunError(f"{name} has no split called train to take images from: it has {', '.join(splits)}.")
    return split, splits[split].with_format(None)


def _labels(name: str, rows, column: str, kind: str) -> tuple[list[str], list[str | None]]:
    """All labels of a column of classes, texts or whole numbers, and the label of each row (None: it has none)."""
    values = rows[column][:]
    if kind == "ClassLabel":  # -1 and None: a row without a label
        known = rows.features[column].names
        return known, [None if v is None or v < 0 else known[v] for v in values]
    if kind not in STRINGS and not re.fullmatch(r"u?int\d+|bool", kind):
        raise UsageError(f"{name} cannot be filtered by {column} ({kind}): only by classes, texts or whole numbers.")
    known = [str(v) for v in sorted({v for v in values if v is not None})]
    return known, [None if v is None else str(v) for v in values]


def _match(value: str, known: list[str], classes: bool) -> str | None:
    """The label that a value means: the same text or, among classes, the same in another case, or its number."""
    if value in known or not classes:
        return value if value in known else None
    if same := [label for label in known if label.casefold() == value.casefold()]:
        return same[0]
    return known[int(value)] if value.isdecimal() and int(value) < len(known) else None


def _row_bytes(rows, index: int, column: str, name: str) -> bytes:
    image = rows[index][column] or {}  # bytes and path, one of which may be None
    if image.get("bytes"):
        return image["bytes"]
    if image.get("path"):
        return file_bytes(Path(image["path"]))
    raise SalunError(f"{name} holds no image.")
