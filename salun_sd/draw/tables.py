"""Texts and tables that people write: in UTF-8 or UTF-16, with commas, semicolons or tabs, as editors and Excel save
them."""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from salun_sd.errors import SalunError
from salun_sd.runtime.contents import file_bytes

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEP = re.compile(r'"?sep=([^\w\s"]|\t)"?[,;]*\r?\n', re.IGNORECASE)  # a first line by which Excel knows the delimiter


def read_text(file: Path) -> str:
    """The text of a file in UTF-8 or, with a byte-order mark, in UTF-16. Raises SalunError for any other, naming the
    line."""
    content = file_bytes(file)
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise SalunError(f"{file}, line {line} is not UTF-8 text: save the file as UTF-8.") from e
    if "\0" in text:  # UTF-16 without its mark, or no text
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SalunError(f"{file}, line {line} has a zero byte and is not UTF-8 text: save the file as UTF-8.")
    return text


def read_table(file: Path, needed: str, known: Collection[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, cells by column) of each row of a CSV file; rows without any text are skipped.

    The delimiter is what a first line `sep=;` says, or else the one with which the header has the column `needed`.
    Columns in `known` are found by `column_name`. Raises SalunError, which names the line, for what is no such table.
    """
    text = read_text(file)
    said = SEP.match(text)
    body = text[said.end() :] if said else text
    delimiter = said[1] if said else max(DELIMITERS, key=lambda d: _fit(body, d, needed, known))
    header, *rows = _rows(file, body, delimiter, 1 if said else 0) or [(0, [])]
    columns = [column_name(cell, known) for cell in header[1]]
    if needed not in columns:
        raise SalunError(
            f"{file} has no column {needed}; its columns are {', '.join(filter(None, columns)) or 'none'}."
        )
    if twice := [c for c, count in Counter(columns).items() if c and count > 1]:
        raise SalunError(f"{file} has two columns {twice[0]}: remove one of them.")
    least = max(n for n, column in enumerate(columns, 1) if column)
    for line, cells in rows:
        if len(cells) < least or any(map(str.strip, cells[len(columns) :])):
            marks = DELIMITERS.get(delimiter, repr(delimiter))
            raise SalunError(
                f"{file}, line {line} has {len(cells)} cells, and the header has {len(columns)}: put a cell with "
                f"{marks} into quotes, and write an empty cell as nothing between {marks}."
            )
    places = [n for n, column in enumerate(columns) if column or n == 0]  # an unnamed first one may be row numbers
    return [(line, {columns[n]: cells[n] for n in places}) for line, cells in rows]


def column_name(text: str, known: Collection[str]) -> str:
    """The one of `known` that a column is meant to be, whatever its case and blanks: "Evaluation Seed" is
    evaluation_seed. Another column's own name, without blanks around it."""
    text = text.strip("\ufeff \t\xa0")
    name = re.sub(r"[\s_-]+", "_", text).casefold()
    return name if name in known else text


def _fit(body: str, delimiter: str, needed: str, known: Collection[str]) -> tuple[bool, int]:
    """How well a delimiter fits the header: the larger, the better."""
    try:
        columns = [column_name(cell, known) for cell in next(filter(None, _reader(body, delimiter)), [])]
    except csv.Error:
        return False, 0
    return needed in columns, len(columns)


def _rows(file: Path, body: str, delimiter: str, offset: int) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row with text in it, the header too."""
    reader, rows, last = _reader(body, delimiter), [], 0
    try:
        for cells in reader:
            last = reader.line_num
            if any(map(str.strip, cells)):
                rows.append((last + offset, cells))
    except csv.Error as e:
        raise SalunError(
            f"{file} is not valid CSV from line {last + offset + 1} on ({e}): put a cell with delimiters, quotes or "
            "line breaks into quotes, and write a quote inside it twice."
        ) from e
    return rows


def _reader(body: str, delimiter: str):
    is_spaced = re.match(rf"[^\r\n]*{re.escape(delimiter)} ", body)  # "a, b": a quote may come after the blank
    return csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, skipinitialspace=bool(is_spaced), strict=True)
