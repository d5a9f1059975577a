"""report.md: an audit in Markdown, for a pull request. Pure."""

from salun_sd.audit.attacked import COMPARED, effort, sentences
from salun_sd.audit.bounds import attacks_in
from salun_sd.audit.report import headline, settings_of
from salun_sd.report.gate import reasons
from salun_sd.report.markdown import table
from salun_sd.report.words import in_words, plain, rate
from salun_sd.runtime.escape import code, text

NAMED = 20  # most files that are listed as broken, or without a partner


def page(report: dict) -> str:
    """report.md: the headline, the tables, the gate and the settings; no pictures."""
    parts = [
        f"# Audit of {code(report['model'])} on {code(report['prompts'])}\n",
        headline(report, code) + "\n",
        *_metrics(report),
        *_pairs(report),
        *_attacks(report),
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
            shown = code(name) if "." in name else name
            rows.append([shown, *counts, _difference(pairs), f"{pairs['p']:.3g}"])
    head = ["metric", "both", "base only", "model only", "neither", "difference", "p"]
    return ["## Image by image, compared with the base\n", table(head, rows)] if rows else []


def _difference(pairs: dict | None) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(pairs["difference"], *pairs["ci95"]) if pairs else rate(None)


def _attacks(report: dict) -> list[str]:
    """The rates of each attack beside its control, floor and base; of curves also stage by stage."""
    rows, curves = [], []
    for name, entry in attacks_in(report).items():
        sides = {side: entry["sides"].get(side) for side in ("model", *COMPARED)}
        model = sides.pop("model")
        rates = [model["pre"], model["asr"], model["fresh"], *(side and side["asr"] for side in sides.values())]
        above = [_difference(entry["paired"].get(side)) for side in ("control", "floor")]
        rows.append([code(name), code(f"{effort(entry)}, {entry['budget']}"), *map(rate, rates), *above])
        curves += _curve(name, entry)
    head = ["attack", "tries", "before", "ASR", "fresh", *COMPARED, "ASR - control", "ASR - floor"]
    how_to_read = "\n".join(sentences(report, code)) + "\n" if rows else ""
    return ["## Under attack\n", how_to_read, table(head, rows), *curves] if rows else []


def _curve(name: str, entry: dict) -> list[str]:
    """The table of an attack in stages; nothing for another attack."""
    if not entry["stages"]:
        return []
    sides = {side: entry["sides"][side] for side in ("model", *COMPARED) if side in entry["sides"]}
    rows = [
        [code(stage), *(rate(side["curve"][k]) for side in sides.values())]
        for k, stage in enumerate(entry["stages"])
    ]  # fmt: skip
    back = ["back at", *(code(side["back_at"]) if side["back_at"] else "no stage" for side in sides.values())]
    return [f"### {code(name)}, stage by stage\n", table(["stage", *sides], [*rows, back])]


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
    notes = [f"{code(metric['name'])}: {text(metric['note'])}\n" for metric in measured.values() if metric.get("note")]
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
    rows = [[code(name), code(plain(value))] for name, value in settings_of(report).items()]
    return ["## Settings\n", table(["setting", "value"], rows)]
