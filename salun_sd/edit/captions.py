"""The captions of a folder of images: a metadata file, and text files beside the images."""

import io
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from salun_sd.draw.folders import visible
from salun_sd.draw.tables import read_table, read_text
from salun_sd.errors import SalunError, first_line
from salun_sd.runtime.contents import file_bytes
from salun_sd.runtime.documents import parse_json

CAPTION_COLUMNS = ("text", "caption")  # the first that exists is used
TEXTS = (".txt", ".caption")  # .caption is what kohya's scripts read
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def caption_files(folder: Path) -> list[Path]:
    """The files of a folder that hold captions."""
    return [f for f in visible(folder) if (f.suffix.lower() in TEXTS or is_metadata(f)) and f.is_file()]


def is_metadata(file: Path) -> bool:
    """Whether a file is called as a metadata file, in any case."""
    return file.name.lower() in METADATA


def captions_of(folder: Path, images: list[Path]) -> dict[str, str]:
    """File name => caption, for the images that have one. Each run of white space becomes one space.

    Captions are in a metadata file, as for the `imagefolder` of the library `datasets`, or in .txt or .caption files
    with the images' stems. Names are compared in composed form, as macOS stores them decomposed. Raises SalunError for
    a caption without an image and for a blank one: nobody can tell what it was meant to be. The captions of files that
    are in the folder but no images to read are left out with these.
    """
    files = caption_files(folder)
    known = {_composed(f.name): f.name for f in images} | {f.name: f.name for f in images}
    others = set(visible(folder)) - {*images, *files}
    skipped = {name for f in others for name in (f.name, f"{f.stem}.*")} - set(known)
    rows = [(place, known.get(name) or known.get(_composed(name)) or name, caption)
            for place, name, caption in [*_metadata_rows(folder, files), *_text_rows(files, images)]
            if name.partition("/")[0] not in skipped]  # fmt: skip
    if missing := [(place, name) for place, name, _ in rows if name not in known]:
        (place, name), *others = missing
        more = f", and {len(others)} more like it" if others else ""
        raise SalunError(f"{place} is a caption for {name}, which is not in {folder}{more}: remove captions without "
                         "an image, or add the images.")  # fmt: skip
    captions, places = {}, {}
    for place, name, caption in rows:
        if name in places:
            raise SalunError(f"{name} has two captions, in {places[name]} and in {place}: remove one of them.")
        if not isinstance(caption, str) or not caption.strip():
            raise SalunError(f"{place} holds no text as the caption of {name}: write one or remove it.")
        captions[name], places[name] = " ".join(caption.split()), place
    return captions


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _text_rows(files: list[Path], images: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(place for messages, image's file name, caption) of each text file; the name is "stem.*" where no image has the
    stem."""
    names = defaultdict(list)
    for image in images:
        names[_composed(image.stem)].append(image.name)
    for file in files:
        if file.suffix.lower() in TEXTS:
            caption = read_text(file)
            for name in names.get(_composed(file.stem), [f"{file.stem}.*"]):
                yield str(file), name, caption


def _metadata_rows(folder: Path, files: list[Path]) -> Iterator[tuple[str, str, object]]:
    """(place for messages, image's file name, caption) of each row of a metadata file. The caption may be no text."""
    present = [file for file in files if is_metadata(file)]
    if len(present) > 1:
        raise SalunError(f"{folder} has captions in {' and in '.join(f.name for f in present)}: keep one of them.")
    for file in present:
        for line, row in READERS[file.suffix.lower()](file):
            place, columns = f"{file}, line {line}", ", ".join(row) or "none"
            if "file_name" not in row:
                raise SalunError(f"{place} has no file_name; its columns are {columns}.")
            if not isinstance(row["file_name"], str):
                raise SalunError(f"{place} has a file_name that is no text: give the name of one image.")
            if not (column := next((c for c in CAPTION_COLUMNS if c in row), None)):
                raise SalunError(f"{place} has no text or caption; its columns are {columns}.")
            yield place, str(Path(row["file_name"])), row[column]


def _csv_rows(file: Path) -> list[tuple[int, dict]]:
    return read_table(file, "file_name", ("file_name", *CAPTION_COLUMNS))


def _json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{file}, line {number}", dict)


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise SalunError(
            f"{file} needs pyarrow: type pip install 'salun-sd[datasets]', or save it as metadata.csv."
        ) from e
    try:
        return enumerate(parquet.read_table(io.BytesIO(file_bytes(file))).to_pylist(), 1)
    except Exception as e:  # pyarrow raises many types on damaged bytes
        raise SalunError(f"{file} is not Parquet, or is damaged: {first_line(e)}.") from e


READERS = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
