"""Training images and their captions, from a folder or from a data set of the `datasets` library."""

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from salun_sd.draw.images import images_in
from salun_sd.errors import SalunError, UsageError, some

CAPTION_COLUMNS = ("text", "caption")  # the first that exists is used
FILTERED = re.compile(r"(?P<id>.+):(?P<column>[^:=!]+)(?P<sign>!?=)(?P<value>.+)")  # greedy: the last colon that fits
STRINGS = ("string", "large_string")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*){1,2}")


class Item(NamedTuple):
    """An image to train on; its file is not read yet."""

    name: str  # for messages: the file's path, or "frgfm/imagenette:train[12]"
    caption: str | None  # its own; None: the command's prompt is used
    label: str | None  # class name in a labelled data set
    read: Callable[[], bytes]  # the image file's bytes; raises SalunError where there is none


def items(spec: str) -> list[Item]:
    """The images that `spec` names: of a folder in the order of their names, of a data set in its own order.

    A spec is a folder with images in it, or a data set: `ID`, `ID:column=value` or `ID:column!=value`, where ID is
    org/name or org/name/configuration on the Hugging Face Hub, or a folder that the `datasets` library can load.
    Raises UsageError where what the spec names does not exist, SalunError where it cannot be used.
    """
    if (folder := Path(spec)).is_dir():
        if files := images_in(folder):
            captions = _captions(folder, files)
            return [Item(str(f), captions.get(f.name), None, partial(file_bytes, f)) for f in files]
        if not any(f.suffix in (".parquet", ".arrow") for f in folder.rglob("*")):
            raise UsageError(f"Image folder {spec} holds no images: give one with .png, .jpg or other image files.")
        return _rows(spec)
    name, *condition = match.groups() if (match := FILTERED.fullmatch(spec)) else (spec,)
    if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise UsageError(f"Image folder {spec} was not found: give a folder of images, or a data set as org/name, "
                         "org/name:column=value or org/name:column!=value.")  # fmt: skip
    return _rows(name, *(word.strip() for word in condition))


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


def file_bytes(file: Path) -> bytes:
    """The content of a file. Raises SalunError where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as e:
        raise SalunError(f"{file} cannot be read: {e.strerror}.") from e


def _captions(folder: Path, files: list[Path]) -> dict[str, str]:
    """File name => caption, for the images that have one. Each run of white space becomes one space.

    Captions are in metadata.jsonl or metadata.csv, as for the library's `imagefolder`, or in .txt files with the
    images' stems. Raises SalunError for a .txt without an image and for a blank caption: nobody can tell what it was
    meant to be.
    """
    metadata = [folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).is_file()]
    if len(metadata) == 2:
        raise SalunError(f"{folder} has captions in metadata.csv and in metadata.jsonl: remove one of them.")
    rows = [row for file in metadata for row in _metadata_rows(file)]
    stems = defaultdict(list)
    for file in files:
        stems[file.stem].append(file.name)
    for file in sorted(f for f in folder.iterdir() if f.suffix.lower() == ".txt"):
        rows += [(str(file), image, _text(file)) for image in stems.get(file.stem, [f"{file.stem}.*"])]
    known = {file.name for file in files}
    if missing := [(place, image) for place, image, _ in rows if image not in known]:
        (place, image), *others = missing
        more = f", and {len(others)} more like it" if others else ""
        raise SalunError(f"{place} is a caption for {image}, which is not in {folder}{more}: remove captions without "
                         "an image, or add the images.")  # fmt: skip
    captions, places = {}, {}
    for place, image, caption in rows:
        if image in places:
            raise SalunError(f"{image} has two captions, in {places[image]} and in {place}: remove one of them.")
        if not isinstance(caption, str) or not caption.strip():
            raise SalunError(f"{place} holds no caption for {image}: write one or remove it.")
        captions[image], places[image] = " ".join(caption.split()), place
    return captions


def _metadata_rows(file: Path) -> Iterator[tuple[str, str, object]]:
    """(place for messages, file name, caption) of each line. The caption is not checked yet: it may be no text."""
    for number, row in (_csv_rows if file.suffix == ".csv" else _json_rows)(file):
        place = f"{file} line {number}"
        columns = ", ".join(row) or "none"
        if not isinstance(row.get("file_name"), str):
            raise SalunError(f"{place} has no file_name; its columns are {columns}.")
        if not (column := next((c for c in CAPTION_COLUMNS if c in row), None)):
            raise SalunError(f"{place} has no text or caption; its columns are {columns}.")
        yield place, str(Path(row["file_name"])), row[column]


def _json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as e:
                raise SalunError(f"{file} line {number} is not JSON: {e}.") from e
            if not isinstance(row, dict):
                raise SalunError(f"{file} line {number} is not a JSON object with file_name and text.")
            yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise SalunError(f"{file} line {reader.line_num} has more cells than the first line: "
                                 "put a caption with commas in double quotes.")  # fmt: skip
            yield reader.line_num, row
    except csv.Error as e:
        raise SalunError(f"{file} line {reader.reader.line_num} is not CSV: {e}.") from e


def _text(file: Path) -> str:
    try:
        return file_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise SalunError(f"{file} is not UTF-8 text: save it as UTF-8.") from e


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
    local, parts = Path(name).is_dir(), name.split("/")
    failure = f"{name}{'' if local else ' is not a folder here and'} cannot be loaded as a data set"
    try:
        from datasets import Dataset, disable_progress_bars, get_dataset_config_names, load_dataset, load_from_disk
        from datasets.exceptions import DatasetGenerationError
    except ImportError as e:
        raise SalunError(f"{failure}: the datasets library is missing, type pip install 'salun-sd[datasets]'") from e
    disable_progress_bars()
    place = [str(Path(name).resolve())] if local else ["/".join(parts[:2]), *parts[2:]]  # [id] or [id, configuration]
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            splits = load_from_disk(name)
        else:
            splits = load_dataset(*place)
    except Exception as e:  # of the network, the hub, the file formats, the library: many types, all with a message
        if "Config name is missing" in str(e):
            names = get_dataset_config_names(*place)
            one = "the folder of one of them" if local else f"one of them, as in {name}/{names[0]}"
            raise UsageError(f"{name} has several configurations, {', '.join(names)}: give {one}.") from e
        cause = e.__cause__ if isinstance(e, DatasetGenerationError) and e.__cause__ else e
        reason = (str(cause) or type(cause).__name__).splitlines()[0].rstrip(".")
        raise SalunError(f"{failure}: {reason}.") from e
    if isinstance(splits, Dataset):
        splits = {str(splits.split or "train"): splits}
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
