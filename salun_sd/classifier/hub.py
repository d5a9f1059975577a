"""Labelled images of the `datasets` library: of the hub, or of a folder that it can load."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from salun_sd.classifier.data import Data, Images
from salun_sd.draw.hub import splits_of
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime.contents import content_of

TESTS = ("test", "validation", "valid", "val")  # the split to test with: the first that is there
Decoded = Callable[[list[Callable[[], bytes]], list[str]], torch.Tensor]


def hub(spec: str, decoded: Decoded) -> Data:
    """A data set as org/name, org/name/configuration, or either with :column for the labels; or a folder.

    `decoded` makes pixels of the bytes of images. Raises SalunError where it cannot be loaded, UsageError where the
    images, labels or splits are not there.
    """
    name, _, column = (spec, "", "") if Path(spec).is_dir() else spec.partition(":")
    splits = splits_of(name)
    if "train" not in splits or not (test := next((t for t in TESTS if t in splits), None)):
        raise UsageError(f"--data {spec} has the splits {', '.join(splits)}: train and test are needed.")
    image, label = _columns(spec, splits["train"], column)
    names = splits["train"].features[label].names
    return Data(spec, names, *(_images(split, splits[split], image, label, decoded) for split in ("train", test)))


def _columns(spec: str, rows, wanted: str) -> tuple[str, str]:
    """The columns of images and of labels."""
    from datasets import ClassLabel, Image

    images = [c for c, f in rows.features.items() if isinstance(f, Image)]
    labels = [c for c, f in rows.features.items() if isinstance(f, ClassLabel)]
    if len(images) != 1:
        raise UsageError(f"--data {spec} has {len(images)} columns of images, and has to have one.")
    if wanted and wanted not in labels:
        raise UsageError(f"--data {spec}: {wanted} is no column of classes; those are {', '.join(labels) or 'none'}.")
    if not labels:
        raise UsageError(f"--data {spec} has no labels: none of its columns {', '.join(rows.features)} has classes.")
    if len(labels) > 1 and not wanted:
        raise UsageError(f"--data {spec} has several columns of classes: give one, as in {spec}:{labels[0]}.")
    return images[0], wanted or labels[0]


def _images(split: str, rows, image: str, label: str, decoded: Decoded) -> Images:
    from datasets import Image

    names, labels = [f"{split}[{i}]" for i in range(len(rows))], rows[label][:]
    if without := [name for name, value in zip(names, labels, strict=True) if value is None or value < 0]:
        raise SalunError(f"{len(without)} image(s) have no label: {some(without)}. Remove them from the data set.")
    encoded = rows.with_format(None).select_columns([image]).cast_column(image, Image(decode=False))
    contents = [partial(_bytes, encoded, i, image) for i in range(len(rows))]
    return Images(decoded(contents, names), torch.tensor(labels, dtype=torch.int64), names)


def _bytes(rows, place: int, column: str) -> bytes:
    """The file of an image: in the row, or where the library put it. Raises OSError as `content_of` does."""
    content = rows[place][column] or {}
    return content.get("bytes") or (content_of(Path(content["path"])) if content.get("path") else b"")
