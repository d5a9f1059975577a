"""report.json: the numbers of a model and its base, with all settings; and the headline. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from salun_sd import __version__
from salun_sd.audit.bounds import QUALITY, attacks_in, rates_of_attacks
from salun_sd.audit.measure import FLAG_RATE, measure, outcomes, pair, paired, protocols_of, share
from salun_sd.audit.protocols import DEFAULT_LABELS, THRESHOLD
from salun_sd.errors import SalunError, some
from salun_sd.report.gate import AGAINST
from salun_sd.report.words import in_words, named, quoted, rate
from salun_sd.runtime.texts import is_hub_id

SCHEMA = 8  # of report.json
READ = (5, 6, 7, SCHEMA)  # those that can be compared; 5 has no change, before 7 images of one colour counted
ATTACK = "attack "  # begins the names of an attack's settings
NO_QUALITY = dict.fromkeys(QUALITY)


@dataclass(frozen=True)
class Run:
    """One audited model: its name, the lines of its manifest.jsonl and detections.jsonl, and the folder of both. The
    files in the lines are relative to that folder."""

    model: str
    folder: Path
    manifest: list[dict]
    detections: list[dict]

    def broken(self) -> dict[str, str]:
        """Each file that cannot be read or shows nothing, and the reason."""
        return {line["file"]: line["error"] for line in self.detections if "error" in line}

    def readable(self) -> "Run":
        """The run without the broken images, which count in no rate."""
        broken = {(line["case"], line["k"]) for line in self.detections if "error" in line}
        manifest, detections = (
            [line for line in lines if (line["case"], line["k"]) not in broken]
            for lines in (self.manifest, self.detections)
        )
        return replace(self, manifest=manifest, detections=detections)

    def blank(self) -> dict | None:
        """The share of images that are one colour, of all that can be read, with their `files`; None without images."""
        lines = [line for line in self.detections if "blank" in line]
        images = share({(line["case"], line["k"]): line["blank"] for line in lines})
        return images and images | {"files": [line["file"] for line in lines if line["blank"]]}


def settings_of(report: dict) -> dict[str, object]:
    """The settings of a report in one layer, without protocols and the identities of weights. The base's sampling has
    `against.` before its names, an attack's settings have `attack` and its name."""
    settings = report["settings"]
    model, base = (
        each and {"dtype": "float32"} | each  # the only one of older reports
        for each in (settings.get("sampling"), settings.get("sampling_against"))
    )  # fmt: skip
    sampling = (model or {}) | {AGAINST + key: value for key, value in (base or {}).items()}
    layer = {key: value for key, value in sampling.items() if not key.endswith("identity")}
    of_detectors = settings.get("detectors") or {}
    groups = (of_detectors | attack_settings(report)).items()
    named = {f"{name} {key}": value for name, of_one in groups for key, value in of_one.items()}
    of_layers = ("sampling", "sampling_against", "detectors", "protocols")
    return layer | {key: value for key, value in settings.items() if key not in of_layers} | named


def attack_settings(report: dict) -> dict[str, dict]:
    """For each attack of a report all that its rates depend on, but for the number of tries."""
    settings = {}
    for name, entry in attacks_in(report).items():
        models = {f"{side} model": of["model"] for side, of in entry["sides"].items() if side in ("base", "floor")}
        about = {"judge": report["attacks"]["judged_by"], "budget": entry["budget"]}
        settings[f"{ATTACK}{name}"] = about | models | entry["settings"]
    return settings


def images_of(side: dict) -> int:
    """The number of images of a model that are not broken; `side` is its part of the report."""
    return side.get("images", (side["metrics"][FLAG_RATE] or {"of": 0})["of"])  # the latter of schemas before 7


def is_by_name(report: dict) -> bool:
    """Whether every image was asked for the concepts by name, whatever its prompt."""
    return bool(report["metrics"]["ua"]) and not report["classes"]


def check_same_prompts(run: Run, base: Run) -> None:
    """Raise SalunError if the two runs have other cases, prompts or classes, and so cannot be compared. Images that are
    paired by their path may have other prompts in their metadata."""
    for row, twin in pair(run.manifest, base.manifest, (run.model, base.model)):
        for field in ("prompt", "class"):
            if row[field] != twin[field] and not (field == "prompt" and "name" in row):
                raise SalunError(
                    f"The {field} of case {row['case']}, image {row['k']} is {row[field]!r} for {run.model} and "
                    f"{twin[field]!r} for {base.model}. Evaluate both with the same --prompts."
                )


def one_detector(runs: Iterable[Run]) -> str | None:
    """The detector of all runs; None without images, or if NudeNet did not look. Raises SalunError if there are
    several, whose counts cannot be compared."""
    names = list(dict.fromkeys(line["detector"] for run in runs for line in run.detections))
    if len(names) > 1:
        raise SalunError(f"The images were detected by both {names[0]} and {names[1]}. Evaluate into a fresh --out.")
    return names[0] if names else None


def in_pairs(run: Run, base: Run, concepts: Sequence[str], labels: Sequence[str], threshold: float) -> dict:
    """The report's `paired`: for each metric, the run's images beside the base's of the same case and k. A pair counts
    only if both images can be read."""
    before, after = (
        outcomes(pair(side.manifest, side.detections, (side.model, side.model)), concepts, labels, threshold)
        for side in (base.readable(), run.readable())
    )
    return {name: paired(before.get(name, {}), after[name]) for name in after}


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
    part: dict | None = None,
    unpaired: dict | None = None,
) -> dict:
    """report.json without its `gate`: the numbers of a run and of its base, and every setting behind them; no attacks.

    `prompts` is the name of the prompt set, `quality` the quality of the run and of its base, `part` what `part_of`
    gives, `unpaired` the files without a partner in the other folder. Raises SalunError if the two runs cannot be
    compared.
    """
    if base:
        check_same_prompts(run, base)

    flagging = {"concepts": list(concepts), "labels": list(labels), "threshold": threshold}
    detector = one_detector([run, base] if base else [run])
    protocols = {name: protocol._asdict() for name, protocol in protocols_of(run.detections).items()}
    absent = dict.fromkeys(f"{FLAG_RATE}.{name}" for name in settings.get("detectors", ()))

    def of_each(metrics: dict) -> dict:
        """The metrics, also those of detectors that no line names, because all images of a side are broken."""
        return metrics | absent | metrics

    def measured(side: Run, quality: dict) -> dict:
        readable = side.readable()
        numbers = measure(readable.manifest, readable.detections, concepts, labels=labels, threshold=threshold)
        numbers["metrics"] = of_each(numbers["metrics"])
        numbers["protocols"] = {name: numbers["protocols"][name] for name in protocols}
        return numbers | {"quality": quality, "broken": side.broken(), "blank": side.blank()}

    return {
        "schema": SCHEMA,
        "salun_sd": __version__,
        "model": run.model,
        "prompts": prompts,
        "part": part,
        "settings": settings | flagging | {"detector": detector, "protocols": protocols},
        **measured(run, quality[0]),
        "against": base and {"model": base.model, **measured(base, quality[1])},
        "paired": base and of_each(in_pairs(run, base, concepts, labels, threshold)),
        "unpaired": unpaired,
        "attacks": None,
    }


def _elsewhere(report: dict, metric: str) -> str:
    """The name of a metric where it leaves this machine: a detector goes by its hub id; or by the last part of its path
    and the beginning of its digest, which tells two of one name apart."""
    group, dot, detector = metric.partition(".")
    weights = (report["settings"].get("detectors") or {}).get(detector)
    if not weights or is_hub_id(detector):
        return metric
    return f"{group}{dot}{Path(detector).name}-{weights['sha256'][:8]}"


def headline_metrics(report: dict) -> dict:
    """The measured numbers of an audit in words, with the base's beside them, for the record of a checkpoint."""

    def by_name(side: dict) -> dict[str, dict | None]:
        concepts = side["concepts"] if len(side["concepts"]) > 1 else {}
        metrics = side["metrics"] | {f"ua of {name}": metrics["ua"] for name, metrics in concepts.items()}
        return {_elsewhere(report, name): metric for name, metric in metrics.items()}

    def shown(name: str) -> str:
        return quoted(_elsewhere(report, f"{FLAG_RATE}.{name}").removeprefix(f"{FLAG_RATE}."))

    changes = {name: in_words(m) for name, m in report["quality"].items() if m and name.startswith("change")}
    measured, against = {name: metric for name, metric in by_name(report).items() if metric}, report["against"]
    return {
        "prompts": report["prompts"],
        "headline": headline(report, shown),
        "images": images_of(report),
        "metrics": {name: rate(metric) for name, metric in measured.items()} | changes,
        "detector": report["settings"]["detector"],
        "against": against
        and {"model": against["model"], "metrics": {name: rate(by_name(against)[name]) for name in measured}},
    }


def headline(report: dict, shown: Callable[[str], str] = quoted) -> str:
    """The main numbers in a sentence, and how many images are broken. `shown` formats the names of concepts."""
    metrics, base = report["metrics"], (report["against"] or {}).get("metrics", {})
    concepts = [name for name, metric in report["concepts"].items() if metric["ua"]]
    names, several = named(concepts, shown), len(concepts) > 1

    def clause(name: str, words: str) -> str:
        of_base = f" (base: {base[name]['n']} of {base[name]['of']})" if base.get(name) else ""
        return f"{metrics[name]['n']} of {metrics[name]['of']} {words}{of_base}"

    clauses = []
    if is_by_name(report):
        clauses.append(clause("ua", f"images are {'seen as none of' if several else 'not seen as'} {names}"))
    elif metrics["ua"]:
        gone = "do not show what was asked for" if several else "are not recognised as it"
        clauses.append(clause("ua", f"images whose prompts ask for {names} {gone}"))
    if metrics["ra"]:
        others = "other images" if metrics["ua"] else "images"
        clauses.append(clause("ra", f"{others} show what was asked for"))
    rates = [name for name in metrics if name.startswith(FLAG_RATE) and metrics[name]]
    flagged = [side[name]["n"] for side in (metrics, base) for name in rates if side.get(name)]
    for name in rates if any(flagged) or not clauses else ():
        other = name.partition(".")[2]
        threshold = THRESHOLD if other else report["settings"]["threshold"]
        whose = shown(other) if other else "the detector" if len(rates) == 1 else "NudeNet"
        clauses.append(clause(name, f"images are flagged by {whose} at a score of {threshold} or more"))
    nothing = "No rate was measured." if images_of(report) else "There are no images to report on."
    sentence = "; ".join(clauses) + "." if clauses else nothing
    sentence += _furthest_attack(report, shown)
    sides = [report, *filter(None, [report["against"]])]
    sentence += _broken([len(side["broken"]) for side in sides])
    return f"{sentence} {in_part(report)}".rstrip()


def _furthest_attack(report: dict, shown: Callable[[str], str]) -> str:
    """The sentence on the attack that stands furthest above its floor or, without a floor, its control; empty without
    attacks."""
    entries = attacks_in(report)
    side = "floor" if any("floor" in entry["paired"] for entry in entries.values()) else "control"
    pairs = {name: entry["paired"].get(side) for name, entry in entries.items()}
    if not (above := {name: of["difference"] for name, of in pairs.items() if of}):
        return ""
    name = max(above, key=above.get)
    if above[name] <= 0:
        return f" Under attack, nothing succeeds on more prompts than its {side}."
    model, other = (entries[name]["sides"][which]["asr"] for which in ("model", side))
    low, high = pairs[name]["ci95"]
    return (f" Under attack, {shown(name)} stands furthest above its {side}: it succeeds on {model['n']} of "
            f"{model['of']} prompts, and there on {other['n']} of {other['of']} (difference {above[name]:+.2f}, 95 % "
            f"interval {low:.2f} to {high:.2f}).")  # fmt: skip


def part_of(rows: int, of: int, missing: int, shard: str | None = None, absent: Sequence[str] = ()) -> dict | None:
    """The report's `part`: the audit has `rows` of the `of` prompts of its set, a random sample, and would have so many
    more that are `missing`. `shard` is its own, `absent` are those that were not merged; None for a whole audit."""
    if shard is None and rows == of:
        return None
    return {"rows": rows, "of": of, "missing": missing, "shard": shard, "absent": list(absent)}


def in_part(report: dict) -> str:
    """What part of its prompt set an audit has, as a sentence; empty for a whole one."""
    if not (part := report.get("part")):
        return ""
    shard = f"shard {part['shard']} of the audit, " if part["shard"] else ""
    missing = f"; {part['missing']:,} are missing" if part["missing"] else ""
    absent = f", with those of {some([f'shard {name}' for name in part['absent']])}" if part["absent"] else ""
    return f"This is {shard}{part['rows']:,} of {part['of']:,} prompts, a random sample{missing}{absent}."


def blank_files(side: dict) -> list[str]:
    """The images of a model that are one colour; `side` is its part of the report."""
    return side["blank"]["files"] if side["blank"] else []


def _broken(counts: Sequence[int]) -> str:
    """The sentence on how many images of the model, and of its base, are broken; empty without any."""
    each = [
        f"{n} {'image' if n == 1 else 'images'}{whose}"
        for n, whose in zip(counts, ("", " of the base"), strict=False)
        if n
    ]
    be = "is" if sum(counts) == 1 else "are"
    return f" {' and '.join(each)} {be} broken and excluded from every count." if each else ""


def numbers(report: dict) -> dict[str, float]:
    """The metrics of a report, of its base and its attacks as plain numbers, each with the ends of its interval: "ua",
    "ua/low", "ua/high", "against/ua" and so on; without those that were not measured, and without a path."""
    found = {}
    for prefix, side in (("", report), ("against/", report["against"] or {})):
        for name, metric in {**side.get("metrics", {}), **side.get("quality", {}), **rates_of_attacks(side)}.items():
            if metric:
                place = prefix + _elsewhere(report, name)
                found[place] = metric["rate"] if "rate" in metric else metric["value"]
                ends = metric.get("ci95") or ()
                found |= {f"{place}/{end}": x for end, x in zip(("low", "high"), ends, strict=False)}
    return found
