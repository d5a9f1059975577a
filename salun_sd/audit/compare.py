"""Several audits side by side: a table for each prompt set, and what makes its numbers not compare."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from salun_sd import __version__
from salun_sd.audit.report import SCHEMA, Run, check_same_prompts, images_of, in_pairs, settings_of
from salun_sd.errors import SalunError, UsageError
from salun_sd.report.escape import code
from salun_sd.report.gate import AGAINST
from salun_sd.report.markdown import table as markdown_table
from salun_sd.report.words import in_words, plain, quoted, rate

COUNTING = ("concepts", "labels", "threshold", "detector", "classifier", "classifier_sha256")  # pairs rest on them
OF_CONCEPT = "ua of "
VALUE = 60  # most letters of a setting's value in a sentence
AGAIN = "Run its evaluate command again: nothing is drawn twice."


@dataclass(frozen=True)
class Audit:
    """A report, and the lines of manifest.jsonl and detections.jsonl where they lie beside a report.json."""

    file: Path
    report: dict
    run: Run | None


@dataclass(frozen=True)
class Column:
    """A model, by the name that its table has for it; `report` is the file its numbers are from."""

    name: str
    model: str
    report: str
    is_base: bool


@dataclass(frozen=True)
class Table:
    """The audits of one prompt set, the bases last.

    A row has a cell for each column: a share, a metric of quality, a count, or None where nothing was measured.
    `differs` has of each setting that is not the same in all: value => names. `paired` has the pairs of each model, by
    name, with the first one; `unpaired` why there are none. `namesake`: another table has other prompts of that name.
    """

    prompts: str
    prompts_sha256: str
    namesake: bool
    columns: list[Column]
    rows: dict[str, list]
    differs: dict[str, dict[str, list[str]]]
    paired: dict[str, dict[str, dict | None]]
    unpaired: dict[str, str]


def read(path: Path) -> Audit:
    """An audit by its folder or its report.json. UsageError where there is none, SalunError where it cannot be read."""
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"There is no {file}: give the folder that `salun-sd evaluate` wrote, or its report.json.")
    report = _report(file)
    tables = [file.parent / name for name in ("manifest.jsonl", "detections.jsonl")]
    if file.name != "report.json" or not all(table.is_file() for table in tables):
        return Audit(file, report, None)
    return Audit(file, report, Run(report["model"], file.parent, *map(_lines, tables)))


def _report(file: Path) -> dict:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise SalunError(f"{file} is damaged: it is no JSON. {AGAIN}") from e
    if not isinstance(report, dict) or not isinstance(schema := report.get("schema"), int) or "metrics" not in report:
        raise SalunError(f"{file} is no report of an audit: give one that `salun-sd evaluate` wrote.")
    if schema != SCHEMA:
        other = f"of another salun-sd, and this one reads {SCHEMA}. {AGAIN if schema < SCHEMA else 'Update it.'}"
        raise SalunError(f"{file} has schema {schema}, {other}")
    try:
        sides = [report, report["against"]] if report["against"] else [report]
        for side in sides:
            [text(cell) for cell in _cells(side).values()]
            os.fspath(side["model"])
        os.fspath(report["prompts"]), os.fspath(report["settings"]["prompts_sha256"])
        [_settings(report)[name] for name in COUNTING]
        return report
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise SalunError(f"{file} is damaged: it is not what `salun-sd evaluate` wrote. {AGAIN}") from e


def _lines(file: Path) -> list[dict]:
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except ValueError as e:
        raise SalunError(f"{file} is damaged: a line is no JSON. {AGAIN}") from e


def compare(paths: Sequence[Path]) -> list[Table]:
    """A table for each prompt set that the audits are of, in their order.

    Raises UsageError where fewer than two are given, or one twice; SalunError where no two are of the same prompts.
    """
    audits = [read(path) for path in paths]
    files = [audit.file.resolve() for audit in audits]
    if twice := [audit.file for i, audit in enumerate(audits) if files[i] in files[:i]]:
        raise UsageError(f"{twice[0]} is given twice: give each audit once.")
    if len(audits) < 2:
        raise UsageError("compare takes two audits or more: give the folders that `salun-sd evaluate` wrote.")
    groups: dict[str, list[Audit]] = {}
    for audit in audits:
        groups.setdefault(audit.report["settings"]["prompts_sha256"], []).append(audit)
    if len(groups) == len(audits):
        of = ", ".join(f"{a.file} is of {a.report['prompts']!r} ({sha256[:8]})" for sha256, [a] in groups.items())
        raise SalunError(f"No two of these audits are of the same prompts: {of}. Evaluate with the same --prompts.")
    models, places = _short([a.report["model"] for a in audits]), _short([_place(a.file) for a in audits])
    called = [group[0].report["prompts"] for group in groups.values()]
    return [
        _table(group, _names(group, models, places), called.count(name) > 1)
        for name, group in zip(called, groups.values(), strict=True)
    ]


def _short(names: Sequence[str]) -> dict[str, str]:
    """Name => what is left of it without the folders that all of several names begin with."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    shared = len(os.path.commonprefix([split[:-1] for split in parts.values()])) if len(parts) > 1 else 0
    return {name: "/".join(split[shared:]) for name, split in parts.items()}


def _place(file: Path) -> str:
    """An audit's folder; of a report that has another name, its file without the ending."""
    return str(file.resolve().parent if file.name == "report.json" else file.resolve().with_suffix(""))


def _names(group: list[Audit], models: dict[str, str], places: dict[str, str]) -> list[str]:
    """The columns' names of a group, each once: the models', with their audits' places where two have the same, with
    their numbers in the group where that does not tell them apart."""
    names = [models[audit.report["model"]] for audit in group]
    placed = [f"{name} ({places[_place(audit.file)]})" for name, audit in zip(names, group, strict=True)]
    numbered = [f"{n}. {name}" for n, name in enumerate(placed, 1)]
    return next(told for told in (names, placed, numbered) if len(set(told)) == len(told))


def _table(group: list[Audit], names: list[str], namesake: bool) -> Table:
    of_name = dict(zip(names, group, strict=True))
    columns = [Column(name, audit.report["model"], str(audit.file), False) for name, audit in of_name.items()]
    bases: dict[str, tuple[dict, list[str]]] = {}  # what was measured => the base, and whose it is
    for name, audit in of_name.items():
        if base := audit.report["against"]:
            same = json.dumps([base["model"], *(text(cell) for cell in _cells(base).values())])
            bases.setdefault(same, (base, []))[1].append(name)
    for base, whose in bases.values():
        name = f"base: {base['model']}" if len(bases) == 1 else f"base of {', '.join(whose)}: {base['model']}"
        columns.append(Column(name, base["model"], str(of_name[whose[0]].file), True))
    cells = [_cells(side) for side in (*(audit.report for audit in group), *(base for base, _ in bases.values()))]
    order = sorted(dict.fromkeys(key for own in cells for key in own), key=lambda key: key[0])
    rows = {key: [own.get(key) for own in cells] for key in order}
    if len([name for _, name in order if name.startswith(OF_CONCEPT)]) == 1:
        rows = {key: row for key, row in rows.items() if not key[1].startswith(OF_CONCEPT)}
    paired, unpaired = _paired(of_name)
    return Table(
        group[0].report["prompts"], group[0].report["settings"]["prompts_sha256"], namesake, columns,
        {name: row for (_, name), row in rows.items()}, _differs(of_name), paired, unpaired,
    )  # fmt: skip


def _cells(side: dict) -> dict[tuple[int, str], object]:
    """(place, name) => cell of each row that a model's side of a report fills."""
    rows = (
        side["metrics"],
        {f"{OF_CONCEPT}{name}": own["ua"] for name, own in side["concepts"].items()},
        {f"{name}, {count['unit']}": count["n"] for name, count in side["protocols"].items()},
        {metric["name"]: metric for metric in side["quality"].values() if metric},
        {"images": images_of(side), "broken": len(side["broken"])},
    )
    return {(place, name): cell for place, part in enumerate(rows) for name, cell in part.items()}


def _settings(report: dict) -> dict[str, object]:
    """What the numbers of a table rest on, by name: the settings, what each protocol counts, the reference of FID, the
    number of images, the version."""
    counting = {
        f"protocols.{name}.{key}": own[key]
        for name, own in report["settings"]["protocols"].items()
        for key in ("labels", "threshold", "unit")
    }
    weights = {f"{key} sha256": metric and metric["sha256"] for key, metric in report["quality"].items()}
    reference = (report["quality"]["fid"] or {}).get("reference")
    return (
        settings_of(report) | counting | weights
        | {"reference": reference, "images": images_of(report), "salun_sd": report["salun_sd"]}
    )  # fmt: skip


def _differs(of_name: dict[str, Audit]) -> dict[str, dict[str, list[str]]]:
    """Each setting that is not the same in all audits: value => names; one of the base, of those that have a base."""
    settings = {name: _settings(audit.report) for name, audit in of_name.items()}
    found: dict[str, dict[str, list[str]]] = {}
    for setting in dict.fromkeys(key for own in settings.values() for key in own if key not in ("where", "limit")):
        values: dict[str, list[str]] = {}
        for name, own in settings.items():
            if setting in own or not setting.startswith(AGAINST):
                values.setdefault(plain(own.get(setting)), []).append(name)
        if len(values) > 1:
            found[setting] = values
    return found


def _paired(of_name: dict[str, Audit]) -> tuple[dict[str, dict], dict[str, str]]:
    """Each model's images beside the first one's of the same case and k: the pairs of each metric; or why there are
    none."""
    (_, first), *others = of_name.items()
    paired, unpaired = {}, {}
    own = first.report["settings"]
    for name, other in others:
        differ = [name for name in COUNTING if own[name] != other.report["settings"][name]]
        if lacking := [audit.file.parent for audit in (first, other) if audit.run is None]:
            unpaired[name] = f"{lacking[0]} holds no manifest.jsonl and detections.jsonl"
        elif differ:
            unpaired[name] = f"other {', other '.join(differ)}"
        elif newer := [audit.file.parent for audit in (first, other) if not _is_whole(audit)]:
            unpaired[name] = f"the .jsonl files of {newer[0]} are not those of its report"
        else:
            try:
                check_same_prompts(other.run, first.run)
                paired[name] = in_pairs(other.run, first.run, own["concepts"], own["labels"], own["threshold"])
            except SalunError as e:
                unpaired[name] = str(e).partition(". ")[0].rstrip(".")
            except (KeyError, TypeError) as e:
                raise SalunError(
                    f"The .jsonl files of {first.file.parent} or {other.file.parent} are damaged. {AGAIN}"
                ) from e
    return paired, unpaired


def _is_whole(audit: Audit) -> bool:
    """Whether the .jsonl files are those that the report counts; a run that was not finished leaves newer ones."""
    settings, images = audit.report["settings"], images_of(audit.report) + len(audit.report["broken"])
    by = {(found.get("detector"), found.get("classifier")) for found in audit.run.detections}
    return by == {(settings["detector"], settings["classifier_sha256"])} and len(audit.run.manifest) == images


def _cut(value: str) -> str:
    """A setting's value in one line of at most VALUE letters."""
    line = " ".join(value.split())
    return line if len(line) <= VALUE else line[: VALUE - 1] + "…"


def sentences(table: Table, shown: Callable[[str], str] = quoted) -> list[str]:
    """What makes the numbers of a table not compare, and which models have no pairs; names as `shown` makes them."""

    def all_of(names: list[str]) -> str:
        return ", ".join(map(shown, names))

    said = []
    if table.namesake:
        said.append(f"Another table has other prompts of the name {shown(table.prompts)}: they do not compare.")
    for setting, values in table.differs.items():
        each = [f"{shown(_cut(v))} for {all_of(n)}" for v, n in values.items()]
        said.append(f"Not the same: {setting}: {'; '.join(each)}.")
    first = table.columns[0].name
    said += [f"No pairs of {shown(name)} and {shown(first)}: {shown(why)}." for name, why in table.unpaired.items()]
    if table.paired:
        said.append(
            f"p: exact McNemar, image by image, against {shown(first)}; in brackets the images that count there only : "
            "here only. With several images of a prompt p is too small."
        )
    return said


def text(cell: dict | int | None) -> str:
    """A cell in one line."""
    if isinstance(cell, dict):
        return rate(cell) if "of" in cell else in_words(cell)
    return "not measured" if cell is None else f"{cell:,}"


def lines(table: Table) -> list[list[str]]:
    """A table's rows as text, the name first; those of the pairs follow the metrics they are of."""
    found = []
    for name, row in table.rows.items():
        found.append([name, *map(text, row)])
        pairs = [
            table.paired.get(column.name, {}).get(name) if not column.is_base else None for column in table.columns
        ]
        if any(pairs):
            found.append([f"{name}: p", *(_pairs(p) if p else "" for p in pairs)])
    return found


def _pairs(pairs: dict) -> str:
    return f"{pairs['p']:.3g} ({pairs['only_base']} : {pairs['only_model']})"


def as_markdown(tables: Sequence[Table]) -> str:
    parts = ["# Audits side by side\n"]
    for table in tables:
        parts.append(f"## {code(table.prompts)}\n")
        if said := sentences(table, code):
            parts.append("".join(f"- {sentence}\n" for sentence in said))
        rows = [[code(name), *cells] for name, *cells in lines(table)]
        parts.append(markdown_table(["metric", *(code(column.name) for column in table.columns)], rows))
    return "\n".join(parts)


def as_csv(tables: Sequence[Table]) -> str:
    """A line for each cell; p is of the pairs with the first model of the same prompts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["prompts", "prompts_sha256", "model", "base", "metric", "value", "n", "of", "low", "high", "p"])
    for table in tables:
        for name, row in table.rows.items():
            for column, cell in zip(table.columns, row, strict=True):
                pairs = None if column.is_base else table.paired.get(column.name, {}).get(name)
                own = cell if isinstance(cell, dict) else {}
                value = own.get("rate", own.get("value", cell))
                low_high = own.get("ci95") or ("", "")
                known = [table.prompts, table.prompts_sha256, column.name, int(column.is_base), name]
                writer.writerow([*known, value, own.get("n"), own.get("of"), *low_high, pairs and pairs["p"]])
    return out.getvalue()


def as_json(tables: Sequence[Table]) -> str:
    kept = {"salun_sd": __version__, "tables": [asdict(table) for table in tables]}
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


FORMS = {".md": as_markdown, ".csv": as_csv, ".json": as_json}
