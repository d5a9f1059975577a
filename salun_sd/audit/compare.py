"""Several audits side by side: a table for each prompt set, and the settings that differ."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salun_sd.audit.report import ATTACK, check_same_prompts, in_pairs
from salun_sd.audit.saved import OF_CONCEPT, PAIRING, Audit, cells, is_whole, read, settings
from salun_sd.errors import SalunError, UsageError
from salun_sd.report.gate import AGAINST
from salun_sd.report.words import cell, plain
from salun_sd.runtime.texts import check_given


@dataclass(frozen=True)
class Column:
    """A model, by its name in the table; `report` is the file of its numbers."""

    name: str
    model: str
    report: str
    is_base: bool


@dataclass(frozen=True)
class Table:
    """The audits of one prompt set. The columns of bases come last.

    A row has a value for each column: a share, a metric of quality, a count, or None if it was not measured. `differs`
    has each setting that differs: value => names. `paired` has the pairs of each model with the first one, by metric;
    `unpaired` why a model has none. `namesake`: another table has other prompts with the same name.
    """

    prompts: str
    prompts_sha256: str
    namesake: bool
    columns: list[Column]
    rows: dict[str, list]
    differs: dict[str, dict[str, list[str]]]
    paired: dict[str, dict[str, dict | None]]
    unpaired: dict[str, str]


def compare(audits: Sequence[str | Path]) -> list[Table]:
    """A table for each prompt set of the audits, in their order. An audit is given by its folder or its report.json.

    Raises UsageError for fewer than two audits or one given twice, SalunError if no two have the same prompts.
    """
    check_given(audits=audits)
    compared = [read(Path(audit)) for audit in audits]
    if shards := [a.file for a in compared if (a.report.get("part") or {}).get("shard")]:
        raise UsageError(f"{shards[0]} is of one shard of an audit: merge the shards with salun-sd merge, and compare "
                         "the result.")  # fmt: skip
    files = [audit.file.resolve() for audit in compared]
    if twice := [audit.file for i, audit in enumerate(compared) if files[i] in files[:i]]:
        raise UsageError(f"{twice[0]} is given twice: give each audit once.")
    if len(compared) < 2:
        raise UsageError("compare takes two audits or more: give the folders that `salun-sd evaluate` wrote.")
    groups: dict[str, list[Audit]] = {}
    for audit in compared:
        groups.setdefault(audit.report["settings"]["prompts_sha256"], []).append(audit)
    if len(groups) == len(compared):
        each = ", ".join(f"{a.file} is of {a.report['prompts']!r} ({sha256[:8]})" for sha256, [a] in groups.items())
        raise SalunError(f"No two of these audits have the same prompts: {each}. Evaluate with the same --prompts.")
    models, places = _short([a.report["model"] for a in compared]), _short([_place(a.file) for a in compared])
    prompt_sets = [group[0].report["prompts"] for group in groups.values()]
    return [
        _table(dict(zip(_names(group, models, places), group, strict=True)), prompt_sets.count(name) > 1)
        for name, group in zip(prompt_sets, groups.values(), strict=True)
    ]


def _short(names: Sequence[str]) -> dict[str, str]:
    """Name => the name without the folders that all names begin with."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    shared = len(os.path.commonprefix([split[:-1] for split in parts.values()])) if len(parts) > 1 else 0
    return {name: "/".join(split[shared:]) for name, split in parts.items()}


def _place(file: Path) -> str:
    """The folder of a report.json; the path of another file, without its ending."""
    return str(file.resolve().parent if file.name == "report.json" else file.resolve().with_suffix(""))


def _names(group: list[Audit], models: dict[str, str], places: dict[str, str]) -> list[str]:
    """The names of a group's columns, each once: the models'; if two are the same, with the audits' places; if that is
    not enough, with numbers, too."""
    names = [models[audit.report["model"]] for audit in group]
    placed = [f"{name} ({places[_place(audit.file)]})" for name, audit in zip(names, group, strict=True)]
    numbered = [f"{n}. {name}" for n, name in enumerate(placed, 1)]
    return next(each for each in (names, placed, numbered) if len(set(each)) == len(each))


def _table(audits: dict[str, Audit], namesake: bool) -> Table:
    """The table of one prompt set's audits, by their names."""
    report = next(iter(audits.values())).report
    columns = [Column(name, audit.report["model"], str(audit.file), False) for name, audit in audits.items()]
    bases = _bases(audits)
    for base, models in bases:
        name = f"base: {base['model']}" if len(bases) == 1 else f"base of {', '.join(models)}: {base['model']}"
        columns.append(Column(name, base["model"], str(audits[models[0]].file), True))
    rows = _rows([*(audit.report for audit in audits.values()), *(base for base, _ in bases)])
    paired, unpaired = _paired(audits)
    return Table(
        report["prompts"], report["settings"]["prompts_sha256"], namesake, columns, rows, _differs(audits), paired,
        unpaired,
    )  # fmt: skip


def _bases(audits: dict[str, Audit]) -> list[tuple[dict, list[str]]]:
    """Each base's part of a report, and the names of its models. Bases with the same name and numbers are one."""
    bases: dict[str, tuple[dict, list[str]]] = {}
    for name, audit in audits.items():
        if base := audit.report["against"]:
            content = json.dumps([base["model"], *map(cell, cells(base).values())])
            bases.setdefault(content, (base, []))[1].append(name)
    return list(bases.values())


def _rows(sides: list[dict]) -> dict[str, list]:
    """Name of a row => its value in each column. A single concept has no row of its own: ua is the same."""
    columns = [cells(side) for side in sides]
    keys = sorted(dict.fromkeys(key for column in columns for key in column), key=lambda key: key[0])
    of_concepts = [key for key in keys if key[1].startswith(OF_CONCEPT)]
    if len(of_concepts) == 1:
        keys.remove(of_concepts[0])
    return {key[1]: [column.get(key) for column in columns] for key in keys}


def _differs(audits: dict[str, Audit]) -> dict[str, dict[str, list[str]]]:
    """Each setting that differs: value => names. Settings of the base and of an attack are compared among audits that
    have it."""
    of_audits = {name: settings(audit.report) for name, audit in audits.items()}
    differs: dict[str, dict[str, list[str]]] = {}
    for key in dict.fromkeys(key for each in of_audits.values() for key in each if key not in ("where", "limit")):
        values: dict[str, list[str]] = {}
        for name, each in of_audits.items():
            if key in each or not key.startswith((AGAINST, ATTACK)):
                values.setdefault(plain(each.get(key)), []).append(name)
        if len(values) > 1:
            differs[key] = values
    return differs


def _paired(audits: dict[str, Audit]) -> tuple[dict[str, dict], dict[str, str]]:
    """The pairs of each model's images with the first one's of the same case and k; or why there are none."""
    (_, first), *others = audits.items()
    paired, unpaired = {}, {}
    by = first.report["settings"]
    for name, other in others:
        if reason := _obstacle(first, other):
            unpaired[name] = reason
            continue
        try:
            check_same_prompts(other.run, first.run)
            paired[name] = in_pairs(other.run, first.run, by["concepts"], by["labels"], by["threshold"])
        except SalunError as e:
            unpaired[name] = str(e).partition(". ")[0].rstrip(".")
    return paired, unpaired


def _obstacle(first: Audit, other: Audit) -> str | None:
    """Why the images of two audits cannot be paired; None if they can."""
    if lacking := [audit.file.parent for audit in (first, other) if audit.run is None]:
        return f"{lacking[0]} holds no manifest.jsonl and detections.jsonl"
    if differing := [key for key in PAIRING if first.report["settings"][key] != other.report["settings"][key]]:
        return f"other {', other '.join(differing)}"
    of_both = [audit.report["settings"].get("detectors") or {} for audit in (first, other)]
    if another := [name for name in of_both[0].keys() & of_both[1].keys() if of_both[0][name] != of_both[1][name]]:
        return f"other weights of {another[0]}"
    if newer := [audit.file.parent for audit in (first, other) if not is_whole(audit)]:
        return f"the .jsonl files of {newer[0]} are not those of its report"
    return None
