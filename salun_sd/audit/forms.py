"""Compared audits as text: sentences, lines, Markdown, CSV and JSON."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from salun_sd import __version__
from salun_sd.audit.compare import Column, Table
from salun_sd.audit.saved import begins
from salun_sd.errors import UsageError
from salun_sd.report.markdown import table as markdown_table
from salun_sd.report.words import cell, quoted
from salun_sd.runtime.escape import code, in_csv
from salun_sd.runtime.files import write_atomic

VALUE = 60  # most characters of a setting's value in a sentence
TITLE = "# Audits side by side"
COLUMNS = ["prompts", "prompts_sha256", "model", "base", "metric", "value", "n", "of", "low", "high", "p"]  # of the CSV


def sentences(table: Table, shown: Callable[[str], str] = quoted) -> list[str]:
    """What a reader of a table must know: settings that differ, models without pairs, how to read p. `shown` formats
    names and values."""
    lines = []
    if table.namesake:
        lines.append(
            f"Another table has other prompts with the same name, {shown(table.prompts)}: do not compare the two."
        )
    for setting, values in table.differs.items():
        each = [f"{shown(_cut(value))} for {', '.join(map(shown, names))}" for value, names in values.items()]
        lines.append(f"The audits differ in {shown(setting)}: {'; '.join(each)}.")
    first = shown(table.columns[0].name)
    lines += [f"No pairs of {shown(name)} and {first}: {shown(reason)}." for name, reason in table.unpaired.items()]
    if table.paired:
        lines.append(
            f"p: exact McNemar, image by image, against {first}. In brackets: images that count only there : only "
            "here. With several images per prompt, p is too small."
        )
    return lines


def _cut(value: str) -> str:
    """A setting's value in one line of at most VALUE characters."""
    line = " ".join(value.split())
    return line if len(line) <= VALUE else line[: VALUE - 1] + "…"


def lines(table: Table) -> list[list[str]]:
    """A table's rows as text, the name first. A metric's pairs follow it in a row of their own."""
    rows = []
    for name, values in table.rows.items():
        rows.append([name, *map(cell, values)])
        pairs = [_pairs(table, column, name) for column in table.columns]
        if any(pairs):
            rows.append([f"{name}: p", *(_p_of(of_column) if of_column else "" for of_column in pairs)])
    return rows


def _pairs(table: Table, column: Column, name: str) -> dict | None:
    """A metric's pairs of a column with the first; None for the first itself, for bases, and where there are none."""
    return None if column.is_base else table.paired.get(column.name, {}).get(name)


def _p_of(pairs: dict) -> str:
    return f"{pairs['p']:.3g} ({pairs['only_base']} : {pairs['only_model']})"


def as_markdown(tables: Sequence[Table]) -> str:
    """A section for each prompt set: the sentences, then the table."""
    parts = [f"{TITLE}\n"]
    for table in tables:
        parts.append(f"## {code(table.prompts)}\n")
        if notes := sentences(table, code):
            parts.append("".join(f"- {note}\n" for note in notes))
        rows = [[code(name), *cells] for name, *cells in lines(table)]
        parts.append(markdown_table(["metric", *(code(column.name) for column in table.columns)], rows))
    return "\n".join(parts)


def as_csv(tables: Sequence[Table]) -> str:
    """A line for each number; `p` is of the pairs with the first model of the same prompts. A name that a spreadsheet
    would take for a formula begins with an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for table in tables:
        for name, values in table.rows.items():
            for column, value in zip(table.columns, values, strict=True):
                pairs = _pairs(table, column, name)
                metric = value if isinstance(value, dict) else {}
                number = metric.get("rate", metric.get("value", value))
                low_high = metric.get("ci95") or ("", "")
                place = [table.prompts, table.prompts_sha256, column.name, int(column.is_base), name]
                line = [*place, number, metric.get("n"), metric.get("of"), *low_high, pairs and pairs["p"]]
                writer.writerow(map(in_csv, line))
    return out.getvalue()


def as_json(tables: Sequence[Table]) -> str:
    """The tables as they are, with the version."""
    content = {"salun_sd": __version__, "tables": [asdict(table) for table in tables]}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


FORMS = {".md": as_markdown, ".csv": as_csv, ".json": as_json}  # by the ending of the file
BEGINNINGS = {  # of a file in each form
    ".md": re.escape(f"{TITLE}\n\n## "),
    ".csv": re.escape(",".join(COLUMNS) + "\n"),
    ".json": r'\{\s*"salun_sd": "[^"]*",\s*"tables": \[',
}


def check_place(out: Path) -> None:
    """Raise UsageError unless tables can be written to `out`: its ending is of a form, and nothing is there or tables
    that `compare` wrote."""
    if out.suffix not in FORMS:
        raise UsageError(f"--out {out} ends in none of {', '.join(FORMS)}: give it one of these.")
    if out.exists() and not begins(out, BEGINNINGS[out.suffix]):
        raise UsageError(f"{out} exists and is not of `salun-sd compare`: choose another --out, or remove it.")


def write(tables: Sequence[Table], out: Path) -> None:
    """Write the tables into a file, in the form that its ending names."""
    check_place(out)
    write_atomic(out, FORMS[out.suffix](tables))
