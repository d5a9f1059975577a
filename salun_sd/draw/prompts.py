"""Prompt sets: I2P and CSV files with its columns, text files, the sets that ship with the package, and the classes of
a class-conditional model."""

import hashlib
import io
import json
import logging
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from salun_sd.draw.tables import column_name, read_table, read_text
from salun_sd.errors import SalunError, UsageError, first_line, some
from salun_sd.runtime.contents import no_file
from salun_sd.runtime.files import is_full

if TYPE_CHECKING:  # reading a set waits for no library
    from salun_sd.checkpoint.model import Checkpoint

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
# The sets lie inside the package in a wheel, and in the top-level folder of a source tree.
FOLDER = next(p for p in (PACKAGE / "prompt_sets", PACKAGE.parent / "prompts") if p.is_dir())
I2P = ("AIML-TUDA/i2p", "i2p_benchmark.csv")  # data set on the hub, file
CLASSES = "classes"  # the set of all classes that a model draws, one prompt each
COLUMNS = ["case_number", "prompt", "evaluation_seed", "evaluation_guidance"]
HUB_NAMES = {"evaluation_seed": "sd_seed", "evaluation_guidance": "sd_guidance_scale"}  # in the hub's copy of I2P
SIZE = ["sd_image_width", "sd_image_height"]  # columns that a set may have: both or none
KNOWN = {*COLUMNS, *HUB_NAMES.values(), *SIZE, "class", "categories"}
MOST_GUIDANCE = 10**6  # a prediction times it stays far from the largest number of float32
GUIDANCE = "7.5"  # where a set has none: what Stable Diffusion's pipelines draw with
WITHOUT = {
    "evaluation_seed": "Each seed is derived from its prompt.",
    "evaluation_guidance": f"Without --guidance, the guidance scale is {GUIDANCE}.",
}
UNNAMED = ("", "Unnamed: 0")  # pandas's column of row numbers, written once and written twice
CONDITION = re.compile(r"\s*([^~=!<>]*[^~=!<>\s])\s*(!=|>=|<=|[~=><])\s*(.*\S)\s*", re.DOTALL)
EQUAL = {"=": operator.eq, "!=": operator.ne}
ORDER = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Prompt(NamedTuple):
    """A row of a prompt set: text, seed, classifier-free guidance scale (diffusers' form) and size of an image."""

    case: int
    text: str
    seed: int
    guidance: float
    label: str | None = None  # the column `class`: what the image must show
    categories: tuple[str, ...] = ()  # of I2P: what an image of this prompt may show
    size: tuple[int, int] | None = None  # width, height in pixels; None: the model's own


def builtin() -> list[str]:
    """Names of prompt sets: those that ship with the package, i2p, which comes from the hub, and CLASSES."""
    return sorted(["i2p", CLASSES, *(p.stem for p in FOLDER.glob("*.csv"))])


def read(
    name_or_path: str, where: Sequence[str] = (), limit: int | None = None, model: "Checkpoint | None" = None
) -> list[Prompt]:  # fmt: skip
    """A prompt set by name, or from a CSV file, or from a .txt with one prompt a line. CLASSES is of a model.

    Gives the first `limit` of the rows that meet every condition of `where`, such as "categories~sexual". A CSV needs
    the column `prompt`. The others of COLUMNS, or the hub's names for them, `class`, `categories` and those of SIZE are
    optional: without case_number, an unnamed first column of numbers gives the cases, or else the row's number from 0;
    without a seed, it is derived from the text; without guidance, it is GUIDANCE.

    Raises UsageError if there is no such set or column, or if no row meets the conditions; SalunError, which names the
    line, if the content is invalid.
    """
    conditions = [_condition(text) for text in where]
    rows = _of_classes(model) if name_or_path == CLASSES else _of_file(_find(name_or_path))
    prompts = [_prompt(row, place) for place, row in rows]
    seen: set[int] = set()
    for p in prompts:
        if p.case in seen:
            raise SalunError(f"{name_or_path} has case_number {p.case} twice: give every prompt its own.")
        seen.add(p.case)
    columns = [c for c in rows[0][1] if c]
    if unknown := [column for column, _, _ in conditions if column not in columns]:
        raise UsageError(f"{name_or_path} has no column {unknown[0]}: it has {', '.join(columns)}.")
    pairs = zip(prompts, rows, strict=True)
    matching = [p for p, (place, row) in pairs if all(_holds(c, row, place) for c in conditions)]
    if not matching:
        raise UsageError(f"{name_or_path} has no prompt with {' and '.join(where)}: give another --where.")
    return matching[:limit]


def _of_file(path: Path) -> list[tuple[str, dict]]:
    """(place, row) of each row of a file. Raises SalunError where there is none."""
    is_text = _is_list(path)
    rows = [(f"{path}, line {n}", row) for n, row in (_lines(path) if is_text else _table(path))]
    if not rows:
        raise SalunError(f"{path} has no prompts: it is empty or has only {'blank lines' if is_text else 'a header'}.")
    return rows


def _of_classes(model: "Checkpoint | None") -> list[tuple[str, dict]]:
    """(place, row) of each class that a model draws, at its own guidance; a case is the number of a class."""
    if model is None:
        raise UsageError(f"The prompt set {CLASSES} is of a class-conditional model, and none is given: give it as "
                         "--against, or give another set.")  # fmt: skip
    if not model.classes:
        raise UsageError(f"The prompt set {CLASSES} is of a class-conditional model, and {model.name} draws from a "
                         "text: give another set.")  # fmt: skip
    texts = {n: model.classes.text(n) for n in model.classes.labels}
    columns, guidance = [*COLUMNS, "class"], str(model.sampling[1])
    return [
        (f"class {n}", dict(zip(columns, (str(n), text, seed, guidance, text), strict=True)))
        for (n, text), seed in zip(texts.items(), _seeds(texts.values()), strict=True)
    ]


def _find(name_or_path: str) -> Path:
    if name_or_path == "i2p":
        return _i2p()
    path = FOLDER / f"{name_or_path}.csv" if name_or_path in builtin() else Path(name_or_path)
    if fault := no_file(path):
        raise UsageError(f"Prompt set {name_or_path} {fault}: give a file, or one of {', '.join(builtin())}.")
    return path


def _i2p() -> Path:
    """I2P's file in the hub's own cache, downloaded if needed."""
    from huggingface_hub import hf_hub_download

    repo, file = I2P
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except Exception as e:  # the network and the hub raise many types
        if is_full(e):
            raise
        raise UsageError(
            f"I2P could not be downloaded: {file} of the data set {repo} ({first_line(e)}). Check the network and, for "
            f"a gated data set, run hf auth login; or give a copy on disk: --prompts {file}"
        ) from e


def _is_list(path: Path) -> bool:
    """Whether a file has one prompt a line: a .txt, but for the tables that Excel calls text."""
    if path.suffix.lower() != ".txt":
        return False
    first = read_text(path).partition("\n")[0].split("\t")
    return len(first) == 1 or "prompt" not in [column_name(cell, KNOWN) for cell in first]


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of each line of a text file that is not blank."""
    lines = [(n, s.strip()) for n, s in enumerate(io.StringIO(read_text(path), newline=None), 1) if s.strip()]
    seeds = _seeds(line for _, line in lines)
    for case, ((n, line), seed) in enumerate(zip(lines, seeds, strict=True)):
        yield n, dict(zip(COLUMNS, (str(case), line, seed, GUIDANCE), strict=True))


def _seeds(texts: Iterable[str]) -> Iterator[str]:
    """The seed of each text that has none: 32 bits of the SHA-256 of the text and the number of equal texts before it,
    so that a new text changes no other one's seed."""
    counts: Counter[str] = Counter()
    for text in texts:
        yield str(int(hashlib.sha256(f"{counts[text]} {text}".encode()).hexdigest()[:8], 16))
        counts[text] += 1


def _table(path: Path) -> list[tuple[int, dict]]:
    """(line number, row) of each row of a CSV file, with all of COLUMNS, whatever the file calls them."""
    rows = read_table(path, "prompt", KNOWN)
    columns = list(rows[0][1]) if rows else []
    cases = [row[columns[0]] for _, row in rows] if rows and columns[0] in UNNAMED else []
    if not all(re.fullmatch("[0-9]{1,18}", c) for c in cases) or len(set(map(int, cases))) < len(rows):
        cases = map(str, range(len(rows)))
    seeds = _seeds(row["prompt"].strip() for _, row in rows)
    for (_, row), case, seed in zip(rows, cases, seeds, strict=True):
        defaults = {"evaluation_seed": seed, "evaluation_guidance": GUIDANCE}
        row.setdefault("case_number", case)
        for name, other in HUB_NAMES.items():
            row.setdefault(name, row.get(other, defaults[name]))
    for name, other in HUB_NAMES.items():
        if rows and name not in columns and other not in columns:
            logger.info(f"{path} has no column {name} or {other}; it has {some([c for c in columns if c], 12)}. "
                        f"{WITHOUT[name]}")  # fmt: skip
    return rows


def _condition(text: str) -> tuple[str, str, str]:
    """(column, sign, value). Raises UsageError for any other text, and for an order by a value that is no number."""
    match = CONDITION.fullmatch(text)
    if not match:
        raise UsageError(f"--where {text!r} is not a condition: give a column, one of ~ = != >= <= > < and a value, as "
                         "in 'categories~sexual' or 'nudity_percentage>=50'.")  # fmt: skip
    column, sign, value = match.groups()
    if sign in ORDER and _number(value) is None:
        raise UsageError(f"--where {text!r}: {value} is not a number, and {sign} compares numbers; give =, != or ~.")
    return column_name(column, KNOWN), sign, value


def _holds(condition: tuple[str, str, str], row: dict, place: str) -> bool:
    """Whether a row meets a condition. An empty cell meets none."""
    column, sign, value = condition
    cell = (row[column] or "").strip()
    if not cell:
        return False
    if sign == "~":
        return value.casefold() in cell.casefold()
    numbers = _number(cell), _number(value)
    if sign in EQUAL:
        return EQUAL[sign](*((cell, value) if None in numbers else numbers))
    if numbers[0] is None:
        raise SalunError(f"{place}: {column} is {cell!r}, not a number: compare it with =, != or ~ in --where.")
    return ORDER[sign](*numbers)


def _number(text: str) -> Decimal | None:
    """The finite number in a text, None if there is none. It is exact: a seed can have more digits than a float."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _prompt(row: dict, place: str) -> Prompt:
    def number(column: str, kind: type):
        text = row[column].strip()
        if kind is float:
            text = re.sub(r"^(\d+),(\d{1,2})$", r"\1.\2", text)  # a decimal comma, as Excel writes it in half of Europe
        value = _number(text)
        if value is None or (kind is int and not re.fullmatch(r"-?\d+(\.0*)?", text)):
            raise SalunError(f"{place}: {column} is {row[column]!r}, not a {'whole ' * (kind is int)}number.")
        if not 0 <= value <= (MOST_GUIDANCE if kind is float else 2**63 - 1):
            raise SalunError(f"{place}: {column} is {row[column]}, which is negative or too large.")
        return kind(value)

    sides = [column for column in SIZE if (row.get(column) or "").strip()]
    if len(sides) == 1:
        raise SalunError(f"{place} has only {sides[0]}: a size needs both {' and '.join(SIZE)}.")
    return Prompt(
        number("case_number", int),
        row["prompt"],  # may be empty, as case 2260 of I2P is
        number("evaluation_seed", int),
        number("evaluation_guidance", float),
        unicodedata.normalize("NFC", (row.get("class") or "").strip()) or None,
        tuple(dict.fromkeys(c.strip() for c in (row.get("categories") or "").split(",") if c.strip())),
        (number(SIZE[0], int), number(SIZE[1], int)) if sides else None,
    )


def overridden(prompts: Iterable[Prompt], guidance: float | None, size: tuple[int, int] | None) -> list[Prompt]:
    """The prompts with this guidance scale and size instead of their own; None keeps their own."""
    changes = {name: value for name, value in (("guidance", guidance), ("size", size)) if value is not None}
    return [p._replace(**changes) for p in prompts]


def digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of the prompts' case, text, class, seed, guidance and size, whatever their order."""
    rows = sorted([p.case, p.text, p.label, p.seed, float(p.guidance), p.size] for p in prompts)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def parse_size(text: str) -> tuple[int, int]:
    """ "512" or "512x384" => width and height in pixels. Raises UsageError for any other text."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise UsageError(f"--size {text} is not a size: give pixels, as in 512, or width and height, as in 512x384.")
    return int(match[1]), int(match[2] or match[1])


def as_csv(prompts: Iterable[Prompt]) -> str:
    """The text of a CSV file that `read` reads back."""
    lines = [[*COLUMNS, "class", "categories", *SIZE]]
    lines += (
        [p.case, p.text, p.seed, str(p.guidance).removesuffix(".0"), p.label or "", ", ".join(p.categories),
         *(p.size or ("", ""))] for p in prompts
    )  # fmt: skip
    return "".join(",".join(_quote(str(v)) for v in line) + "\n" for line in lines)


def _quote(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if re.search(r'[",\r\n]', value) else value


def class_in(text: str, classes: Iterable[str | None]) -> str | None:
    """The class whose name is a whole word in a text, in any case: the longest if several, None if there is none.

    So "a photo of a T-shirt" names "t-shirt", not "shirt".
    """

    text = unicodedata.normalize("NFC", text)
    return max((c for c in set(classes) if c and whole(c).search(text)), key=lambda c: (len(c), c), default=None)


def whole(name: str) -> re.Pattern:
    """A name where it is a whole word of a text, in any case."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
