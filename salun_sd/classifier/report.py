"""The numbers of a run to a report: assembled, judged, written as JSON, Markdown, CSV and a page."""

import csv
import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from salun_sd import __version__
from salun_sd.classifier import measure, page
from salun_sd.classifier.measure import PARTS
from salun_sd.classifier.request import EXACT, ORIGINAL, Job, Row
from salun_sd.classifier.settings import METHODS, in_words
from salun_sd.report import gate, stats
from salun_sd.report.markdown import table as markdown_table
from salun_sd.runtime import seals
from salun_sd.runtime.escape import code, in_csv
from salun_sd.runtime.files import write_atomic

if TYPE_CHECKING:
    from salun_sd.classifier.folder import Run

COLUMNS = ("ua", "ra", "ta", "mia", "gap", "seconds")  # of the table
CSV = ["method", "density", "metric", "mean", "sd", "low", "high", "seeds"]


def assemble(run: "Run", table: Sequence[Row], seeds: int, parsed: Sequence[gate.Bound]) -> dict:
    """What report.json holds. Values are in percent, of METRICS and the gap in percentage points, times in seconds."""
    rows = [Row(ORIGINAL, ORIGINAL), *table]
    results = {row.label: [run.result(Job(row, seed)) for seed in range(seeds)] for row in rows}
    content = {
        "salun_sd": __version__, "data": run.whole.data.name, "classes": run.whole.data.classes,
        "forget": run.whole.forget.text, "sizes": run.whole.split(0).as_json()["sizes"], "model": run.whole.name,
        "training": run.training, "keep_statistics": run.keep_statistics, "seeds": seeds,
        "rows": {row.label: _row(run, row, results, seeds) for row in rows},
    }  # fmt: skip
    content["gate"] = [gate.judge(bound, _numbers(bound, content), False) for bound in parsed] or None
    return content


def _row(run: "Run", row: Row, results: dict[str, list[dict]], seeds: int) -> dict:
    own, exact = results[row.label], results.get(EXACT)
    values = {name: measure.summary([r["metrics"][name] for r in own]) for name in own[0]["metrics"]}
    compared = exact is not None and row.label != EXACT
    gaps = [measure.gap(a["metrics"], b["metrics"]) for a, b in zip(own, exact, strict=True)] if compared else None
    published = METHODS.get(row.method)
    search = run.search(row) if published else {"tried": []}
    return {
        "method": row.method, "density": row.density, "summary": published.summary if published else "not changed",
        "source": published.source if published else None, "settings": own[0]["run"].get("settings", {}),
        "used": {name: [r["used"][name] for r in own if name in r["used"]] for name in own[-1]["used"]},
        "tried": search["tried"], "rule": search.get("rule"), "changed": own[0]["changed"], "metrics": values,
        "gap": measure.summary(gaps) if gaps else None, "seconds": measure.summary([r["seconds"] for r in own]),
        "paired": _paired(run, row, seeds) if compared else None,
    }  # fmt: skip


def _paired(run: "Run", row: Row, seeds: int) -> dict[str, dict]:
    """Image by image against Retrain of the same forget set: how many images of a part both, one or none recognise,
    over all seeds, and the difference of the rates, a method's less Retrain's, with its 95 % interval. An image is a
    cluster: it comes once for each seed that has it in this part."""
    counts = {part: {} for part in PARTS}
    for seed in range(seeds):
        mine, exact = run.answers(Job(row, seed)), run.answers(Job(Row(EXACT, EXACT), seed))
        parts = run.whole.split(seed)
        for part in PARTS:
            places = getattr(parts, part).index.numpy()
            # 0: both, 1: Retrain alone, 2: the method alone, 3: neither
            kinds = 3 - 2 * exact[f"{part}/correct"].astype(int) - mine[f"{part}/correct"].astype(int)
            for place, kind in zip(places, kinds, strict=True):
                counts[part].setdefault(place, [0, 0, 0, 0])[kind] += 1
    paired = {}
    for part, clusters in counts.items():
        table = np.array(list(clusters.values()))
        rates = table.sum(0) / table.sum()
        kind, (low, high) = stats.difference_interval(table)
        paired[part] = dict(zip(("both", "only_retrain", "only_method", "neither"), table.sum(0).tolist(), strict=True))
        paired[part] |= {"difference": float(rates[2] - rates[1]), "ci95": [float(low), float(high)], "interval": kind}
    return paired


def _numbers(bound: gate.Bound, report: dict) -> dict:
    """The factor and the number of each name in a bound."""
    numbers = {}
    for name, factor in bound.terms.items():
        kind, _, label = name.partition(".")
        row = report["rows"].get(label)
        number = row and (row[kind] if kind in ("gap", "seconds") else row["metrics"][kind])
        value = number and gate.Measured(Fraction(number["mean"]), number["ci95"] and (*map(Fraction, number["ci95"]),))
        numbers[name] = factor, value
    return numbers


def shown(number: dict | None, kind: str = "") -> str:
    """A number over seeds in words: mean ± standard deviation."""
    if number is None:
        return "not measured"
    digits = 1 if kind == "seconds" else 2
    spread = f" ± {number['sd']:.{digits}f}" if number["sd"] is not None else ""
    return f"{number['mean']:.{digits}f}{spread}"


def cells(row: dict) -> list[dict | None]:
    """A row's numbers in the order of COLUMNS."""
    return [row[name] if name in ("gap", "seconds") else row["metrics"][name] for name in COLUMNS]


def headline(report: dict) -> str:
    """The main result in a sentence."""
    rows = {name: row for name, row in report["rows"].items() if row["gap"] and name != ORIGINAL}
    if not rows:
        return "No average gap: it is the distance of another method to Retrain, and needs both."
    best = min(rows, key=lambda name: rows[name]["gap"]["mean"])
    others = ", ".join(f"{name} {shown(row['gap'])}" for name, row in rows.items() if name != best)
    return (f"Nearest to a model that never saw the images is {best}: its average gap is {shown(rows[best]['gap'])} "
            f"percentage points{f'; {others}' if others else ''}.")  # fmt: skip


def as_markdown(report: dict) -> str:
    sizes = ", ".join(f"{n:,} {name}" for name, n in report["sizes"].items())
    parts = [f"# Forgetting {code(report['forget'])} of {code(report['data'])}\n", headline(report) + "\n",
             f"Images: {sizes}. Mean ± standard deviation over {report['seeds']} seed(s).\n"]  # fmt: skip
    head = ["method", "UA %", "RA %", "TA %", "MIA %", "average gap", "seconds"]
    rows = [[code(name), *(shown(n, k) for n, k in zip(cells(row), COLUMNS, strict=True))]
            for name, row in report["rows"].items()]  # fmt: skip
    parts.append(markdown_table(head, rows))
    if paired := {name: row["paired"] for name, row in report["rows"].items() if row["paired"]}:
        parts.append("## Recognised images, less Retrain's, image by image\n")
        parts.append(markdown_table(["method", *PARTS], [
            [code(name), *("{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * v for v in (p["difference"], *p["ci95"])))
                           for p in (pairs[part] for part in PARTS))] for name, pairs in paired.items()
        ]))  # fmt: skip
    parts.append("## Settings\n")
    parts.append(markdown_table(["method", "settings", "from"], [
        [code(name), in_words(row["settings"], row["used"]), "a search" if row["tried"] else row["source"]]
        for name, row in report["rows"].items() if row["source"]
    ]))  # fmt: skip
    if report["gate"]:
        parts.append("## Bounds\n")
        parts.append(markdown_table(["bound", "holds", "because"], [
            [code(e["bound"]), "yes" if e["holds"] else "no", gate.reasons(e)] for e in report["gate"]
        ]))  # fmt: skip
    return "\n".join(parts)


def as_csv(report: dict) -> str:
    """A line for each number of each method."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV)
    for name, row in report["rows"].items():
        for metric, number in {**row["metrics"], "gap": row["gap"], "seconds": row["seconds"]}.items():
            if number:
                low, high = number["ci95"] or ("", "")
                line = [name, row["density"], metric, number["mean"], number["sd"], low, high, report["seeds"]]
                writer.writerow(map(in_csv, line))
    return out.getvalue()


def write(report: dict, run: "Run", out: Path) -> None:
    """Write report.json, report.md, report.csv and report.html."""
    answers = {
        name: run.answers(Job(Row(name, row["method"], row["density"]), 0)) for name, row in report["rows"].items()
    }
    write_atomic(out / "report.json", json.dumps(seals.sealed(report), indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "report.md", as_markdown(report))
    write_atomic(out / "report.csv", as_csv(report))
    write_atomic(out / "report.html", page.html(report, answers, headline(report), shown))
