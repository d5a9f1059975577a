"""report.md: what was measured, for a pull request; and the tables and texts of Markdown. Pure."""

from salun_sd.audit.report import headline, settings_of
from salun_sd.report.escape import code
from salun_sd.report.gate import told
from salun_sd.report.markdown import table
from salun_sd.report.words import in_words, plain, rate

NAMED = 20  # most files that are called by name


def page(report: dict) -> str:
    """report.md: the headline, the tables, the gate and the settings; no pictures."""
    title = f"# Audit of {code(report['model'])} on {code(report['prompts'])}\n"
    parts = [title, headline(report, code) + "\n"]
    sections = (
        _metrics,
        _pairs,
        _gate,
        _became,
        _classes,
        _categories,
        _labels,
        _protocols,
        _quality,
        _broken,
        _settings,
    )
    for section in sections:
        parts += section(report)
    return "\n".join(parts)


def _sides(report: dict) -> dict[str, dict]:
    """The base, if there is one, and the model, by the names of their columns."""
    base = report["against"]
    return ({f"base: {code(base['model'])}": base} if base else {}) | {code(report["model"]): report}


def _metrics(report: dict) -> list[str]:
    sides = _sides(report)
    rows = [[name, *(rate(side["metrics"][name]) for side in sides.values())] for name in report["metrics"]]
    for name in report["concepts"] if len(report["concepts"]) > 1 else ():
        rows.append([f"ua of {code(name)}", *(rate(side["concepts"][name]["ua"]) for side in sides.values())])
    return [table(["metric", *sides], rows)]


def _pairs(report: dict) -> list[str]:
    rows = []
    for name, pairs in (report["paired"] or {}).items():
        if pairs:
            counts = [str(pairs[kind]) for kind in ("both", "only_base", "only_model", "neither")]
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(pairs["difference"], *pairs["ci95"])
            rows.append([name, *counts, difference, f"{pairs['p']:.3g}"])
    head = ["metric", "both", "base only", "model only", "neither", "difference", "p"]
    return ["## Image by image, beside the base\n", table(head, rows)] if rows else []


def _became(report: dict) -> list[str]:
    parts, sides = [], _sides(report)
    for name in report["concepts"]:
        became = [side["classes"].get(name, {}).get("became", {}) for side in sides.values()]
        seen = dict.fromkeys(label for own in reversed(became) for label in own)
        if seen:
            rows = [[code(label), *(str(own.get(label, 0)) for own in became)] for label in seen]
            parts += [f"## What {code(name)} became\n", table(["seen as", *sides], rows)]
    return parts


def _each(report: dict, key: str, title: str, head: str) -> list[str]:
    sides = _sides(report)
    rows = [[code(name), *(rate(side[key].get(name)) for side in sides.values())] for name in report[key]]
    return [f"## {title}\n", table([head, *sides], rows)] if rows else []


def _classes(report: dict) -> list[str]:
    return _each(report, "classes", "Seen as what was asked, by class", "class")


def _categories(report: dict) -> list[str]:
    return _each(report, "categories", "Flagged, by category", "category")


def _labels(report: dict) -> list[str]:
    sides, flagged = _sides(report), report["settings"]["labels"]
    of = {name: [side["labels"].get(name) for side in sides.values()] for name in report["labels"]}
    rows = [
        [code(name) + (", flagged" if name in flagged else ""), *map(rate, shares)]
        for name, shares in of.items()
        if any(share and share["n"] for share in shares)
    ]
    return ["## Images that show a label\n", table(["label", *sides], rows)] if rows else []


def _protocols(report: dict) -> list[str]:
    sides = _sides(report)
    rows = [
        [code(name), own["unit"], *(str(side["protocols"][name]["n"]) for side in sides.values())]
        for name, own in report["protocols"].items()
    ]
    return ["## Counted as each paper counts\n", table(["protocol", "unit", *sides], rows)]


def _quality(report: dict) -> list[str]:
    sides = _sides(report)
    measured = {key: metric for key, metric in report["quality"].items() if metric}
    rows = [
        [code(metric["name"]), *(in_words(side["quality"][key]) for side in sides.values())]
        for key, metric in measured.items()
    ]
    notes = [f"{code(metric['name'])}: {metric['note']}\n" for metric in measured.values() if metric.get("note")]
    compared = {metric["reference"] for metric in measured.values() if "reference" in metric}
    notes += [f"FID and KID: compared with {code(reference)}.\n" for reference in compared]
    return ["## Quality\n", table(["metric", *sides], rows), *notes] if rows else []


def _broken(report: dict) -> list[str]:
    parts = []
    for name, side in _sides(report).items():
        broken = [[code(file), code(reason)] for file, reason in side["broken"].items()]
        if broken:
            more = f", the first {NAMED}" if len(broken) > NAMED else ""
            parts += [f"## Images that could not be read\n\n{len(broken)} of {name}{more}:\n"]
            parts += [table(["file", "why"], broken[:NAMED])]
    return parts


def _gate(report: dict) -> list[str]:
    rows = [
        [code(entry["bound"]), "passed" if entry["holds"] else "**failed**", code(told(entry))]
        for entry in report.get("gate") or ()
    ]
    return ["## Gate\n", table(["fails if", "", "values"], rows)] if rows else []


def _settings(report: dict) -> list[str]:
    rows = [[name, code(plain(value))] for name, value in settings_of(report).items()]
    return ["## Settings\n", table(["setting", "value"], rows)]
