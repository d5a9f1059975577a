"""report.md: an audit in Markdown, for a pull request. Pure."""

from salun_sd.audit.report import headline, settings_of
from salun_sd.report.gate import reasons
from salun_sd.report.markdown import table
from salun_sd.report.words import in_words, plain, rate
from salun_sd.runtime.escape import code

NAMED = 20  # most files that are listed as broken, or without a partner


def page(report: dict) -> str:
    """report.md: the headline, the tables, the gate and the settings; no pictures."""
    parts = [
        f"# Audit of {code(report['model'])} on {code(report['prompts'])}\n",
        headline(report, code) + "\n",
        *_metrics(report),
        *_pairs(report),
        *_agreement(report),
        *_gate(report),
        *_became(report),
        *_shares(report, "classes", "Seen as what was asked for, by class", "class"),
        *_shares(report, "categories", "Flagged, by category", "category"),
        *_labels(report),
        *_protocols(report),
        *_quality(report),
        *_unpaired(report),
        *_broken(report),
        *_settings(report),
    ]
    return "\n".join(parts)


def _sides(report: dict) -> dict[str, dict]:
    """Name of a column => the report's part on the base, if there is one, and on the model."""
    base = report["against"]
    return ({f"base: {code(base['model'])}": base} if base else {}) | {code(report["model"]): report}


def _metrics(report: dict) -> list[str]:
    sides = _sides(report)
    metrics = {name: code(name) if "." in name else name for name in report["metrics"]}
    rows = [[metrics[name], *(rate(side["metrics"].get(name)) for side in sides.values())] for name in metrics]
    for name in report["concepts"] if len(report["concepts"]) > 1 else ():
        rows.append([f"ua of {code(name)}", *(rate(side["concepts"][name]["ua"]) for side in sides.values())])
    return [table(["metric", *sides], rows)]


def _pairs(report: dict) -> list[str]:
    rows = []
    for name, pairs in (report["paired"] or {}).items():
        if pairs:
            counts = [str(pairs[kind]) for kind in ("both", "only_base", "only_model", "neither")]
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(pairs["difference"], *pairs["ci95"])
            shown = code(name) if "." in name else name
            rows.append([shown, *counts, difference, f"{pairs['p']:.3g}"])
    head = ["metric", "both", "base only", "model only", "neither", "difference", "p"]
    return ["## Image by image, compared with the base\n", table(head, rows)] if rows else []


def _agreement(report: dict) -> list[str]:
    rows = []
    for name, side in _sides(report).items():
        for table_of in side.get("agreement", ()):
            counts = [str(table_of[kind]) for kind in ("both", "only_first", "only_second", "neither")]
            value, ends = table_of["kappa"], table_of["ci95"]
            interval = " [{:.3f}, {:.3f}]".format(*ends) if ends else ""
            kappa = "none: both say the same of all" if value is None else f"{value:.3f}{interval}"
            rows.append([f"{code(table_of['first'])}, {code(table_of['second'])}", name, *counts, kappa])
    head = ["detectors", "model", "both flag", "first only", "second only", "neither", "Cohen's kappa"]
    return ["## Where the detectors agree\n", table(head, rows)] if rows else []


def _became(report: dict) -> list[str]:
    parts, sides = [], _sides(report)
    for name in report["concepts"]:
        became = [side["classes"].get(name, {}).get("became", {}) for side in sides.values()]
        seen = dict.fromkeys(label for counts in reversed(became) for label in counts)
        if seen:
            rows = [[code(label), *(str(counts.get(label, 0)) for counts in became)] for label in seen]
            parts += [f"## What {code(name)} became\n", table(["seen as", *sides], rows)]
    return parts


def _shares(report: dict, key: str, title: str, head: str) -> list[str]:
    """The table of the shares under a key of the report."""
    sides = _sides(report)
    rows = [[code(name), *(rate(side[key].get(name)) for side in sides.values())] for name in report[key]]
    return [f"## {title}\n", table([head, *sides], rows)] if rows else []


def _labels(report: dict) -> list[str]:
    sides, flagged = _sides(report), report["settings"]["labels"]
    shares = {name: [side["labels"].get(name) for side in sides.values()] for name in report["labels"]}
    rows = [
        [code(name) + (", flagged" if name in flagged else ""), *map(rate, of_sides)]
        for name, of_sides in shares.items()
        if any(share and share["n"] for share in of_sides)
    ]
    return ["## Images that show a label\n", table(["label", *sides], rows)] if rows else []


def _protocols(report: dict) -> list[str]:
    sides = _sides(report)
    rows = [
        [code(name), count["unit"], *(str(side["protocols"][name]["n"]) for side in sides.values())]
        for name, count in report["protocols"].items()
    ]
    return ["## Counts of each paper's protocol\n", table(["protocol", "unit", *sides], rows)] if rows else []


def _quality(report: dict) -> list[str]:
    sides = _sides(report)
    measured = {key: metric for key, metric in report["quality"].items() if metric}
    rows = [
        [code(metric["name"]), *(in_words(side["quality"][key]) for side in sides.values())]
        for key, metric in measured.items()
    ]
    notes = [f"{code(metric['name'])}: {metric['note']}\n" for metric in measured.values() if metric.get("note")]
    references = {metric["reference"] for metric in measured.values() if "reference" in metric}
    if "change" in measured:
        which = "paths" if report.get("unpaired") else "seeds"
        notes.append(f"Change is from the base's images of the same {which}: 0 is none, and 1 for SSIM.\n")
    notes += [f"FID and KID compare with {code(reference)}.\n" for reference in references]
    return ["## Quality\n", table(["metric", *sides], rows), *notes] if rows else []


def _unpaired(report: dict) -> list[str]:
    parts, alone = [], report.get("unpaired") or {}
    for name, files in zip(_sides(report), map(alone.get, ("against", "model")), strict=False):
        if files:
            more = f", the first {NAMED}" if len(files) > NAMED else ""
            parts += [f"## Images without a partner\n\n{len(files)} of {name}{more}, in no count:\n"]
            parts += [table(["file"], [[code(file)] for file in files[:NAMED]])]
    return parts


def _broken(report: dict) -> list[str]:
    parts = []
    for name, side in _sides(report).items():
        broken = [[code(file), code(reason)] for file, reason in side["broken"].items()]
        if broken:
            more = f", the first {NAMED}" if len(broken) > NAMED else ""
            parts += [f"## Broken images\n\n{len(broken)} of {name}{more}:\n"]
            parts += [table(["file", "reason"], broken[:NAMED])]
    return parts


def _gate(report: dict) -> list[str]:
    rows = [
        [code(entry["bound"]), "passed" if entry["holds"] else "**failed**", code(reasons(entry))]
        for entry in report.get("gate") or ()
    ]
    return ["## Gate\n", table(["fails if", "result", "values"], rows)] if rows else []


def _settings(report: dict) -> list[str]:
    rows = [[name, code(plain(value))] for name, value in settings_of(report).items()]
    return ["## Settings\n", table(["setting", "value"], rows)]
