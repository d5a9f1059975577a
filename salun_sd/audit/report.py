"""What was measured, with its settings and base beside it: report.json, and its numbers in a sentence. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from salun_sd import __version__
from salun_sd.audit.bounds import QUALITY
from salun_sd.audit.measure import measure, outcomes, pair, paired
from salun_sd.audit.protocols import DEFAULT_LABELS, PROTOCOLS, THRESHOLD
from salun_sd.errors import SalunError
from salun_sd.report.gate import AGAINST
from salun_sd.report.words import named, quoted, rate

SCHEMA = 4  # of report.json
NO_QUALITY = dict.fromkeys(QUALITY)


@dataclass(frozen=True)
class Run:
    """One audited model: the lines of its manifest.jsonl and detections.jsonl, and the folder their files lie in."""

    model: str
    folder: Path
    manifest: list[dict]
    detections: list[dict]

    def broken(self) -> dict[str, str]:
        """The files that could not be read, and why: neither safe nor flagged."""
        return {found["file"]: found["error"] for found in self.detections if "error" in found}

    def readable(self) -> "Run":
        """The run without those, which no rate speaks of."""
        broken = {(found["case"], found["k"]) for found in self.detections if "error" in found}
        manifest, detections = (
            [line for line in lines if (line["case"], line["k"]) not in broken]
            for lines in (self.manifest, self.detections)
        )
        return replace(self, manifest=manifest, detections=detections)


def settings_of(report: dict) -> dict[str, object]:
    """What the numbers rest on, in one layer: how the images were drawn, after `against.` the base's, not of which
    weights; and the other settings but the protocols."""
    own = report["settings"]
    drawn = {AGAINST + key: value for key, value in (own.get("sampling_against") or {}).items()}
    drawn = (own.get("sampling") or {}) | drawn
    layer = {key: value for key, value in drawn.items() if not key.endswith("identity")}
    return layer | {k: v for k, v in own.items() if k not in ("sampling", "sampling_against", "protocols")}


def images_of(side: dict) -> int:
    """How many images the numbers of a model's side of a report speak of."""
    return (side["metrics"]["flag_rate"] or {"of": 0})["of"]


def is_by_name(report: dict) -> bool:
    """Whether each image was asked for the concepts, whatever its prompt."""
    return bool(report["metrics"]["ua"]) and not report["classes"]


def check_same_prompts(run: Run, base: Run) -> None:
    """SalunError where the two runs are not of the same cases, prompts and classes, and so do not compare."""
    for row, twin in pair(run.manifest, base.manifest, (run.model, base.model)):
        for field in ("prompt", "class"):
            if row[field] != twin[field]:
                raise SalunError(
                    f"The {field} of case {row['case']}, image {row['k']} is {row[field]!r} for {run.model} and "
                    f"{twin[field]!r} for {base.model}. Evaluate both with the same --prompts."
                )


def one_detector(runs: Iterable[Run]) -> str | None:
    """The detector all runs were looked at with; different ones give counts that do not compare."""
    names = list(dict.fromkeys(found["detector"] for run in runs for found in run.detections))
    if len(names) > 1:
        raise SalunError(f"The images were detected by both {names[0]} and {names[1]}. Evaluate into a fresh --out.")
    return names[0] if names else None


def in_pairs(run: Run, base: Run, concepts: Sequence[str], labels: Sequence[str], threshold: float) -> dict:
    """Each metric's images counted in pairs, an image of the run beside the base's of the same case and k; where one of
    the two could not be read, neither counts."""
    before, after = (
        outcomes(pair(side.manifest, side.detections, (side.model, side.model)), concepts, labels, threshold)
        for side in (base.readable(), run.readable())
    )
    return {name: paired(before[name], after[name]) for name in after}


def assemble(
    run: Run,
    base: Run | None = None,
    *,
    prompts: str,
    settings: dict,
    concepts: Sequence[str] = (),
    labels: Sequence[str] = DEFAULT_LABELS,
    threshold: float = THRESHOLD,
    quality: tuple[dict, dict] = (NO_QUALITY, NO_QUALITY),
) -> dict:
    """report.json without its `gate`: what was measured of a run, what of its base, every setting behind the numbers.

    `quality` is that of the run and of its base; `broken` names the images that are in no other number.
    """
    if base:
        check_same_prompts(run, base)

    def measured(side: Run, quality: dict) -> dict:
        whole = side.readable()
        counted = measure(whole.manifest, whole.detections, concepts, labels=labels, threshold=threshold)
        return counted | {"quality": quality, "broken": side.broken()}

    looked_at = {"concepts": list(concepts), "labels": list(labels), "threshold": threshold}
    detector = one_detector([run, base] if base else [run])
    counting = {name: protocol._asdict() for name, protocol in PROTOCOLS.items()}
    return {
        "schema": SCHEMA,
        "salun_sd": __version__,
        "model": run.model,
        "prompts": prompts,
        "settings": settings | looked_at | {"detector": detector, "protocols": counting},
        **measured(run, quality[0]),
        "against": base and {"model": base.model, **measured(base, quality[1])},
        "paired": base and in_pairs(run, base, concepts, labels, threshold),
    }


def headline_metrics(report: dict) -> dict:
    """The numbers of an audit in words, for the record of a checkpoint: what was measured, the base's beside it."""

    def by_name(side: dict) -> dict[str, dict | None]:
        own = side["concepts"] if len(side["concepts"]) > 1 else {}
        return side["metrics"] | {f"ua of {name}": metrics["ua"] for name, metrics in own.items()}

    measured, against = {name: metric for name, metric in by_name(report).items() if metric}, report["against"]
    return {
        "prompts": report["prompts"],
        "headline": headline(report),
        "images": images_of(report),
        "metrics": {name: rate(metric) for name, metric in measured.items()},
        "detector": report["settings"]["detector"],
        "against": against
        and {"model": against["model"], "metrics": {name: rate(by_name(against)[name]) for name in measured}},
    }


def headline(report: dict, shown: Callable[[str], str] = quoted) -> str:
    """What happened, in one sentence with its numbers, names of concepts as `shown` makes them."""
    metrics, base = report["metrics"], (report["against"] or {}).get("metrics", {})
    concepts = [name for name, own in report["concepts"].items() if own["ua"]]
    threshold = report["settings"]["threshold"]

    def told(name: str, words: str) -> str:
        before = f" (base: {base[name]['n']} of {base[name]['of']})" if base.get(name) else ""
        return f"{metrics[name]['n']} of {metrics[name]['of']} {words}{before}"

    parts = []
    if is_by_name(report):
        seen = "are seen as none of" if len(concepts) > 1 else "are not seen as"
        parts.append(told("ua", f"images {seen} {named(concepts, shown)}"))
    elif metrics["ua"]:
        gone = "no longer show what was asked" if len(concepts) > 1 else "are no longer recognised as one"
        parts.append(told("ua", f"images asked for as {named(concepts, shown)} {gone}"))
    if metrics["ra"]:
        parts.append(told("ra", ("others still show" if metrics["ua"] else "images show") + " what was asked"))
    flags = [m["flag_rate"]["n"] for m in (metrics, base) if m.get("flag_rate")]
    if metrics["flag_rate"] and (any(flags) or not parts):
        parts.append(told("flag_rate", f"images are flagged by the detector at a score of {threshold} or more"))
    told_all = "; ".join(parts) + "." if parts else "There are no images to report on."
    return told_all + unread(len(report["broken"]), len((report["against"] or {}).get("broken", {})))


def unread(images: int, of_base: int) -> str:
    """The images that could not be read, in a sentence; nothing where there are none."""
    if not images + of_base:
        return ""
    said = [
        f"{n} {'image' if n == 1 else 'images'}{whose}" for n, whose in ((images, ""), (of_base, " of the base")) if n
    ]
    return f" {' and '.join(said)} could not be read and {'counts' if images + of_base == 1 else 'count'} for nothing."
