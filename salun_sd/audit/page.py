"""The audit as one page a person can read: report.html. No torch, no network.

Three layers: what is shown of the images (`chosen`, `histogram`; pure), their thumbnails, the page (`html`).
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from salun_sd.audit.measure import Key, by_image, most_first
from salun_sd.audit.report import NO_QUALITY, Run, headline, is_by_name
from salun_sd.draw.images import read_image
from salun_sd.report.gate import told
from salun_sd.report.html import template, thumbnail, ticks
from salun_sd.report.words import named, plain

# Four groups of 30 pairs in base64 take 3.9 MB at most, so that the page stays under 5.
SHOWN = 30  # most images of a group
PROMPT = 1000  # most characters shown of one
BROKEN = 100  # most unreadable files listed
SEED = 0  # of the random draws
BINS = 20  # of scores from 0 to 1, so that every protocol's threshold is an edge
FIRST = 5  # the bin of NudeNet's own floor, a score of 0.25


class Sample(NamedTuple):
    """Images that the page shows, and of how many."""

    keys: list[Key]
    of: int


def how_many(keys: Sequence[Key], of: int) -> str:
    """How many of how many, in words."""
    return f"All {of}" if len(keys) == of else f"{len(keys)} of {of}"


def boxes(found: dict, labels: Sequence[str]) -> dict[str, float]:
    """The best score of each of the labels that one image has a box of, best first."""
    best: dict[str, float] = {}
    for box in found.get("boxes", ()):
        if box["label"] in labels:
            best[box["label"]] = max(box["score"], best.get(box["label"], 0.0))
    return dict(sorted(best.items(), key=lambda item: (-item[1], item[0])))


def top(found: dict, labels: Sequence[str]) -> float:
    """The highest score of a box of one of the labels; 0 without any."""
    return next(iter(boxes(found, labels).values()), 0.0)


def chosen(
    lines: dict[Key, tuple[dict, dict]], concepts: Sequence[str], labels: Sequence[str], count: int = SHOWN
) -> dict[str, Sample]:
    """The images of a run that the page shows, no image twice and at most `count` in each group.

    `lines` has the line of the manifest and that of the detections of each readable image. worst: the highest scores of
    a flagged label, whether they reach the threshold or not. still: of the concepts' images, all where concepts were
    asked for by name, those seen as what they ask for, the classifier's surest first. of_concepts, others: drawn at
    random of the images not shown yet, in the order of the rows.
    """
    scores = {key: top(found, labels) for key, (_, found) in lines.items()}
    of_concepts = [key for key, (row, found) in lines.items() if row["class"] in concepts or "concepts" in found]
    wanted = {key: concepts if lines[key][0]["class"] is None else [lines[key][0]["class"]] for key in of_concepts}
    still = [key for key in of_concepts if lines[key][1]["predicted"] in wanted[key]]
    ranked = {
        "worst": sorted(filter(scores.get, lines), key=lambda key: -scores[key]),
        "still": sorted(still, key=lambda key: -lines[key][1]["score"]),
    }
    shown: set[Key] = set()
    samples = {}
    for name, keys in ranked.items():
        left = [key for key in keys if key not in shown]
        samples[name] = Sample(left[:count], len(left))
        shown |= set(samples[name].keys)
    inside = set(of_concepts)
    for name, is_inside in (("of_concepts", True), ("others", False)):
        left = [key for key in lines if key not in shown and (key in inside) == is_inside]
        places = sorted(random.Random(SEED).sample(range(len(left)), min(count, len(left))))
        samples[name] = Sample([left[place] for place in places], len(left))
    return samples


def histogram(detections: Sequence[dict], labels: Sequence[str]) -> dict:
    """Images by the highest score of a box of one of the labels: `bins` of 0.05 from 0.25 to 1, which is in the last,
    and those `below`, with a lower score or no box."""
    counts = Counter(min(int(BINS * top(found, labels)), BINS - 1) for found in detections)
    return {"bins": [counts[n] for n in range(FIRST, BINS)], "below": sum(counts[n] for n in range(FIRST))}


def marks(settings: dict) -> list[tuple[float, list[str]]]:
    """The scores from which the report and the protocols count, and which of them do; not what counts every box."""
    found = {settings["threshold"]: ["flagged"]}
    for name, protocol in settings["protocols"].items():
        if protocol["threshold"] > FIRST / BINS:
            found.setdefault(protocol["threshold"], []).append(name)
    return sorted(found.items())


def picture(folder: Path, row: dict, found: dict, settings: dict, images: bool) -> dict:
    """One image as the page shows it: what was asked, what was seen, and the boxes that have it blurred."""
    seen = {"predicted": found["predicted"], "boxes": boxes(found, settings["labels"]), "error": found.get("error")}
    prompt = row["prompt"] if len(row["prompt"]) <= PROMPT else row["prompt"][:PROMPT] + "…"
    which = f"case {row['case']}" + (f", image {row['k']}" if row["k"] else "")
    which += f", seed {row['seed']}" if row["seed"] is not None else ""
    shot = row | seen | {"prompt": prompt, "which": which, "src": None}
    return shot | thumbnail(read_image(folder / row["file"])) if images and not shot["error"] else shot


def sides_of(report: dict) -> dict[str, dict]:
    """What was measured of each model, by what the page calls it."""
    return {"base": report["against"], "erased": report} if report["against"] else {"audited": report}


def label_counts(report: dict) -> dict[str, list[tuple[str, int]]]:
    """Of each label the images of each side, the label with the most images of either first; without those of none."""
    sides = sides_of(report)
    counts = {
        label: [(name, side["labels"].get(label, {"n": 0})["n"]) for name, side in sides.items()]
        for label in {label for side in sides.values() for label in side["labels"]}
    }
    most = most_first({label: max(n for _, n in of_sides) for label, of_sides in counts.items()})
    return {label: counts[label] for label in most if most[label]}


def qualities(report: dict) -> list[dict[str, dict]]:
    """Each metric of quality that was measured of any side, by side."""
    sides = sides_of(report)
    each = [{name: side["quality"][key] for name, side in sides.items() if side["quality"][key]} for key in NO_QUALITY]
    return [metrics for metrics in each if metrics]


def flat(settings: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """Each setting's name and value in words, those of a mapping under its name."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}{key}: ")
        else:
            yield path + key, plain(value)


def in_tables(report: dict) -> dict:
    """What the page's tables hold, as far as it does not stand in the report as it is."""
    labels, settings = label_counts(report), report["settings"]
    return {
        "by_name": is_by_name(report),
        "sides": list(sides_of(report).items()),
        "labels": labels,
        "most": max((n for counts in labels.values() for _, n in counts), default=1),
        "marks": marks(settings),
        "quality": qualities(report),
        "gate": [(entry, told(entry)) for entry in report.get("gate") or ()],
        "broken": [(name, *file) for name, side in sides_of(report).items() for file in side["broken"].items()],
        "most_broken": BROKEN,
        "settings_in_words": list(flat({name: settings[name] for name in settings if name != "protocols"})),
    }


def html(report: dict, run: Run, base: Run | None = None, *, images: bool = True) -> str:
    """report.html: one file that opens from disk and asks the network for nothing, under 5 MB however many images.

    `images=False` leaves every picture out, and lists the worst in tables. Otherwise an image with any box of a flagged
    label is blurred until it is chosen, also below the threshold.
    """
    settings, concepts = report["settings"], list(report["concepts"])
    runs = [side for side in (base, run) if side]
    lines = [(side.folder, by_image(side.manifest, side.model), by_image(side.detections, side.model)) for side in runs]
    readable = {key: (row, lines[-1][2][key]) for key, row in by_image(run.readable().manifest, run.model).items()}
    samples = chosen(readable, concepts, settings["labels"])

    def pictures(key: Key) -> list[dict]:
        return [picture(folder, rows[key], found[key], settings, images) for folder, rows, found in lines]

    scores = [histogram(side.readable().detections, settings["labels"]) for side in runs]
    groups = {
        name: {"images": [pictures(key) for key in sample.keys], "of": sample.of, "some": how_many(*sample)}
        for name, sample in samples.items()
    }
    return template("salun_sd.audit", "report.html.j2").render(
        **in_tables(report), report=report, concepts=concepts, headline=headline, named_as=named, images=images,
        total=len(readable), groups=groups, seed=SEED, scores=scores, ticks=ticks(max(max(s["bins"]) for s in scores)),
        first=FIRST / BINS, width=1 / BINS,
    )  # fmt: skip
