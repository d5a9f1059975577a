"""Audits on disk: report.json and the lines beside it, read and checked."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from salun_sd.audit.report import SCHEMA, Run, images_of, settings_of
from salun_sd.errors import SalunError, UsageError
from salun_sd.report.words import cell

# The settings that two audits must share for pairs of their images.
PAIRING = ("concepts", "labels", "threshold", "detector", "classifier", "classifier_sha256")
OF_CONCEPT = "ua of "
AGAIN = "Run its evaluate command again: nothing is drawn twice."


@dataclass(frozen=True)
class Audit:
    """A report and its file. `run` has the lines of manifest.jsonl and detections.jsonl; None unless both lie beside a
    report.json."""

    file: Path
    report: dict
    run: Run | None


def read(path: Path) -> Audit:
    """The audit of a folder or of a report file. Raises UsageError if there is none, SalunError if it cannot be
    read."""
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
        raise SalunError(f"{file} is damaged: it is not JSON. {AGAIN}") from e
    if not isinstance(report, dict) or not isinstance(schema := report.get("schema"), int) or "metrics" not in report:
        raise SalunError(f"{file} is no report of an audit: give one that `salun-sd evaluate` wrote.")
    if schema != SCHEMA:
        advice = AGAIN if schema < SCHEMA else "Update it."
        raise SalunError(f"{file} has schema {schema}, of another salun-sd, and this one reads {SCHEMA}. {advice}")
    try:
        _read_all(report)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise SalunError(f"{file} is damaged: it is not what `salun-sd evaluate` wrote. {AGAIN}") from e
    return report


def _read_all(report: dict) -> None:
    """Read all that a table takes from a report, to raise here what would be raised there."""
    for side in filter(None, (report, report["against"])):
        [cell(value) for value in cells(side).values()]
        os.fspath(side["model"])
    os.fspath(report["prompts"]), os.fspath(report["settings"]["prompts_sha256"])
    [settings(report)[name] for name in PAIRING]


def _lines(file: Path) -> list[dict]:
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except ValueError as e:
        raise SalunError(f"{file} is damaged: a line is not JSON. {AGAIN}") from e


def cells(side: dict) -> dict[tuple[int, str], object]:
    """(place, name) => value, of each row of a table that a model's part of a report fills. Rows are sorted by
    place."""
    groups = (
        side["metrics"],
        {f"{OF_CONCEPT}{name}": metrics["ua"] for name, metrics in side["concepts"].items()},
        {f"{name}, {count['unit']}": count["n"] for name, count in side["protocols"].items()},
        {metric["name"]: metric for metric in side["quality"].values() if metric},
        {"images": images_of(side), "broken": len(side["broken"])},
    )
    return {(place, name): value for place, group in enumerate(groups) for name, value in group.items()}


def settings(report: dict) -> dict[str, object]:
    """All that the numbers of a report depend on, by name: its settings, what each protocol counts, the models and the
    reference of quality, the number of images, the version."""
    protocols = {
        f"protocols.{name}.{key}": protocol[key]
        for name, protocol in report["settings"]["protocols"].items()
        for key in ("labels", "threshold", "unit")
    }
    weights = {f"{key} sha256": metric and metric["sha256"] for key, metric in report["quality"].items()}
    reference = (report["quality"]["fid"] or {}).get("reference")
    return (
        settings_of(report) | protocols | weights
        | {"reference": reference, "images": images_of(report), "salun_sd": report["salun_sd"]}
    )  # fmt: skip


def is_whole(audit: Audit) -> bool:
    """Whether the lines are those that the report counts. A run that did not finish leaves newer ones."""
    by, images = audit.report["settings"], images_of(audit.report) + len(audit.report["broken"])
    models = {(line.get("detector"), line.get("classifier")) for line in audit.run.detections}
    return models == {(by["detector"], by["classifier_sha256"])} and len(audit.run.manifest) == images
