"""Audits on disk: report.json and the lines beside it, read and checked."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from salun_sd.audit.attacked import effort
from salun_sd.audit.bounds import attacks_in, rates_of_attacks
from salun_sd.audit.report import READ, SCHEMA, Run, blank_files, images_of, in_part, settings_of
from salun_sd.errors import SalunError, UsageError
from salun_sd.report.words import cell
from salun_sd.runtime import seals
from salun_sd.runtime.documents import read_json

# The settings that two audits must share for pairs of their images.
PAIRING = ("concepts", "labels", "threshold", "detector", "classifier", "classifier_sha256")
OF_CONCEPT = "ua of "
DIGITS = 1e-6  # the numbers of a report are rounded to so much
AT = {"file": str, "case": int, "k": int}  # which image a line is of
ROW = AT | {  # a line of manifest.jsonl: those that others made are compared and merged
    "prompt": (str, None), "class": (str, None), "seed": (int, None), "categories?": ([str], None), "name?": str,
}  # fmt: skip
SEEN = {  # what was found of an image, as far as it was looked for
    "sha256?": (str, None), "detector?": (str, None), "classifier?": (str, None), "error?": str, "blank?": bool,
    "boxes?": [{"label": str, "score": float}], "flags?": {str: {"score": float, "by": str}},
    "predicted?": (str, None), "score?": (float, None), "concepts?": {str: float},
    "change?": ({"against": str, "pixels": float, "ssim": float}, {"against": str, "pixels": None, "ssim": None}),
}  # fmt: skip
FOUND = tuple(  # a line of detections.jsonl: an image has boxes, or an error
    AT | SEEN | dict.fromkeys(("detector", "predicted", "score", either), object) for either in ("boxes", "error")
)
AGAIN = "Run its evaluate or attack command again: nothing is drawn twice."


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
    return Audit(file, report, run_in(file.parent, report["model"]) if file.name == "report.json" else None)


def run_in(folder: Path, model: str) -> Run | None:
    """The lines of a model's images; None unless both files are there. Raises SalunError for damaged ones."""
    tables = {folder / "manifest.jsonl": ROW, folder / "detections.jsonl": FOUND}
    if not all(table.is_file() for table in tables):
        return None
    manifest, detections = (list(seals.read_lines(table, shape, AGAIN)) for table, shape in tables.items())
    return Run(model, folder, manifest, detections)


def _report(file: Path) -> dict:
    report = read_json(file, dict, seals.advising(AGAIN))
    if not isinstance(schema := report.get("schema"), int) or "metrics" not in report:
        raise SalunError(f"{file} is no report of an audit: give one that `salun-sd evaluate` wrote.")
    if schema not in READ:
        advice = AGAIN if schema < SCHEMA else "Update it."
        raise SalunError(f"{file} has schema {schema}, of another salun-sd, and this one reads "
                         f"{', '.join(map(str, READ))}. {advice}")  # fmt: skip
    try:
        faults = [fault for side in (report, report["against"]) if side for fault in contradictions(side)]
        if not faults:
            _read_all(report)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        raise SalunError(f"{file} is damaged: it is not what `salun-sd evaluate` wrote. {AGAIN}") from e
    if faults:
        raise SalunError(f"{file} contradicts itself: {faults[0]}. {AGAIN}")
    return seals.unsealed(report, str(file), AGAIN)


def _read_all(report: dict) -> None:
    """Read all that a table takes from a report, to raise here what would be raised there."""
    for side in filter(None, (report, report["against"])):
        [cell(value) for value in cells(side).values()]
        os.fspath(side["model"])
    in_part(report), os.fspath(report["prompts"]), os.fspath(report["settings"]["prompts_sha256"])
    are_counted(report, Run(report["model"], Path(), [], []), report["settings"])
    [settings(report)[name] for name in PAIRING]


def contradictions(side: dict) -> Iterator[str]:
    """What cannot be in a model's part of a report: numbers that are none; shares, counts and pairs that do not add
    up."""
    images = images_of(side)
    for key, value in _inside({key: value for key, value in side.items() if key not in ("against", "settings")}):
        keys = value.keys() if isinstance(value, dict) else ()
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}"
        most = images + len(side["broken"]) if key == "blank" else images
        most = math.inf if key.startswith("attacks.") else most  # these images are not the audit's
        if {"n", "of"}.issubset(keys) and not (0 <= value["n"] and 0 <= value["of"] <= most):
            yield f"{key} has {value['n']} of {value['of']}, and there are {images} images"
        if {"n", "of", "rate", "ci95"}.issubset(keys) and not _is_share(**value):
            yield f"{key} is {value['n']} of {value['of']}, with a rate of {value['rate']} in {value['ci95']}"
        if {"became", "of"}.issubset(keys) and sum(value["became"].values()) != value["of"]:
            yield f"{key}.became counts other images than the {value['of']} of the class"
        if {"only_base", "only_model"}.issubset(keys) and not _are_pairs(**value):
            yield f"{key} has a p or a difference that is not that of its counts"


def _is_share(n: int, of: int, rate: float, ci95: list[float], **_: object) -> bool:
    low, high = ci95
    return n <= of and abs(rate - n / of) < DIGITS and low - DIGITS < rate < high + DIGITS


def _are_pairs(
    both: int, only_base: int, only_model: int, neither: int, p: float, difference: float, **_: object
) -> bool:  # fmt: skip
    counts = both, only_base, only_model, neither
    of_counts = (only_model - only_base) / sum(counts)
    return min(counts) >= 0 and abs(difference - of_counts) < DIGITS and 0 <= p <= 1


def _inside(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """All that is inside a value, with its place in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        place = f"{key}.{name}".lstrip(".")
        yield place, inner
        yield from _inside(inner, place)


def cells(side: dict) -> dict[tuple[int, str], object]:
    """(place, name) => value, of each row of a table that a model's part of a report fills. Rows are sorted by
    place."""
    groups = (
        side["metrics"],
        {f"{OF_CONCEPT}{name}": metrics["ua"] for name, metrics in side["concepts"].items()},
        _attacked(side),
        {f"{name}, {count['unit']}": count["n"] for name, count in side["protocols"].items()},
        {metric["name"]: metric for metric in side["quality"].values() if metric},
        {f"kappa of {table['first']} and {table['second']}": _kappa(table) for table in side.get("agreement", ())},
        {"images": images_of(side), "broken": len(side["broken"]), "blank": len(blank_files(side))},
    )
    return {(place, name): value for place, group in enumerate(groups) for name, value in group.items()}


def _attacked(side: dict) -> dict[str, dict | None]:
    """The success rates of attacks, of their controls, floors and bases, by name and by what is counted."""
    rates, rows = rates_of_attacks(side), {}
    for attack, entry in attacks_in(side).items():
        for name in (f"{which}asr.{attack}" for which in ("", "control.", "floor.", "base.")):
            if name in rates:
                rows[f"{name}, {effort(entry)}"] = rates[name]
    return rows


def _kappa(table: dict) -> dict | None:
    """The kappa of two detectors, as a metric of quality is."""
    images = sum(table[kind] for kind in ("both", "only_first", "only_second", "neither"))
    return None if table["kappa"] is None else {"value": table["kappa"], "ci95": table["ci95"], "images": images}


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
        | {"part": in_part(report) or "all prompts"}
    )  # fmt: skip


def is_whole(audit: Audit) -> bool:
    """Whether the lines are those that the report counts. A run that did not finish leaves newer ones."""
    return are_counted(audit.report, audit.run, audit.report["settings"])


def are_counted(side: dict, run: Run, by: dict) -> bool:
    """Whether a model's part of a report, with these settings, counts the lines of a run."""
    images = images_of(side) + len(side["broken"])
    models = {(line.get("detector"), line.get("classifier")) for line in run.detections}
    is_all = len(run.manifest) == len(run.detections) == images
    flaggers = {name: one["sha256"] for name, one in by.get("detectors", {}).items()}
    flags = [line.get("flags", {}) for line in run.detections if "error" not in line]
    by_them = all({name: flag["by"] for name, flag in of_one.items()} == flaggers for of_one in flags)
    return is_all and by_them and [*models] == [(by["detector"], by["classifier_sha256"])]


def begins(file: Path, pattern: str) -> bool:
    """Whether this is a regular file whose first KiB begins as a regular expression says: so what was written here is
    told from what was not."""
    if not file.is_file():
        return False
    with file.open("rb") as f:
        return re.match(pattern, f.read(1024).decode(errors="replace")) is not None
