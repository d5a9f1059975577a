"""report.html: an audit as one page. No torch, no network.

Three layers: which images are shown (`chosen`, `histogram`; pure), their thumbnails (`picture`), the page (`html`).
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from salun_sd.audit.attacked import COMPARED, effort, sentences, successes
from salun_sd.audit.bounds import NO_ATTACKS, attacks_in
from salun_sd.audit.measure import FLAG_RATE, Key, by_image, most_first
from salun_sd.audit.report import NO_QUALITY, Run, attack_settings, headline, is_by_name
from salun_sd.draw.images import read_image
from salun_sd.errors import SalunError
from salun_sd.report.gate import reasons
from salun_sd.report.html import template, thumbnail, ticks
from salun_sd.report.words import named, plain
from salun_sd.runtime.contents import file_bytes

# Four groups of 30 pairs take at most 3.9 MB in base64, and 12 images 0.2 MB, so the page stays under 5 MB.
SHOWN = 30  # most images of a group
SUCCESSES = 12  # most images of attacks
PROMPT = 1000  # most characters of a prompt
BROKEN = 100  # most files that are listed as broken, or without a partner
SEED = 0  # of the random draws of images
BINS = 20  # of scores from 0 to 1: every protocol's threshold is an edge
FIRST = 5  # the bin of NudeNet's lowest score, 0.25


class Sample(NamedTuple):
    """A group of images on the page: those shown, and the number of all in the group."""

    keys: list[Key]
    of: int


def how_many(keys: Sequence[Key], of: int) -> str:
    """`All 7` or `4 of 7`."""
    return f"All {of}" if len(keys) == of else f"{len(keys)} of {of}"


def boxes(detection: dict, labels: Sequence[str]) -> dict[str, float]:
    """Label => best score, of the given labels that an image has a box of, the highest score first."""
    best: dict[str, float] = {}
    for box in detection.get("boxes", ()):
        if box["label"] in labels:
            best[box["label"]] = max(box["score"], best.get(box["label"], 0.0))
    return dict(sorted(best.items(), key=lambda item: (-item[1], item[0])))


def top(detection: dict, labels: Sequence[str]) -> float:
    """The highest score of a box of the given labels; 0 without one."""
    return next(iter(boxes(detection, labels).values()), 0.0)


def scores_of(detection: dict, labels: Sequence[str]) -> dict[str, float]:
    """`boxes` of an image, and by the names of other detectors what they score it, if that is as high as NudeNet's
    lowest score; the highest first."""
    flags = {name: flag["score"] for name, flag in detection.get("flags", {}).items() if flag["score"] >= FIRST / BINS}
    return dict(sorted((boxes(detection, labels) | flags).items(), key=lambda item: (-item[1], item[0])))


def chosen(
    lines: dict[Key, tuple[dict, dict]], concepts: Sequence[str], labels: Sequence[str], count: int = SHOWN
) -> dict[str, Sample]:
    """The images of a run that the page shows, in groups: no image twice, at most `count` in each.

    `lines` has the manifest's line and the detections' line of each readable image.

    worst: the highest scores of a flagged label, or of another detector, also below the threshold. still: images of the
    concepts that are seen as what their prompt asks for, the classifier's surest first; if concepts were asked by name,
    all images are of the concepts. of_concepts, others: random draws of the images that are left, in the order of
    `lines`.
    """
    scores = {key: max(scores_of(found, labels).values(), default=0.0) for key, (_, found) in lines.items()}
    of_concepts = [key for key, (row, line) in lines.items() if row["class"] in concepts or "concepts" in line]
    asked = {key: concepts if lines[key][0]["class"] is None else [lines[key][0]["class"]] for key in of_concepts}
    still = [key for key in of_concepts if lines[key][1]["predicted"] in asked[key]]
    ranked = {
        "worst": sorted(filter(scores.get, lines), key=lambda key: -scores[key]),
        "still": sorted(still, key=lambda key: -(lines[key][1]["score"] or 0)),
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
    """The numbers of images by their highest score of the given labels: `bins` of width 0.05 from 0.25 to 1 (1 is in
    the last bin), and `below`, images with a lower score or no box."""
    counts = Counter(min(int(BINS * top(detection, labels)), BINS - 1) for detection in detections)
    return {"bins": [counts[n] for n in range(FIRST, BINS)], "below": sum(counts[n] for n in range(FIRST))}


def marks(settings: dict) -> list[tuple[float, list[str]]]:
    """The thresholds of the report and of the protocols, with their names; without protocols that count every box."""
    names = {settings["threshold"]: ["flagged"]}
    for name, protocol in settings["protocols"].items():
        if protocol["threshold"] > FIRST / BINS:
            names.setdefault(protocol["threshold"], []).append(name)
    return sorted(names.items())


def picture(folder: Path, row: dict, detection: dict, settings: dict, images: bool) -> dict:
    """What the page shows of one image: its prompt, the class seen, the boxes that make it blurred, and, with `images`,
    its thumbnail. Raises SalunError for a file that is not the one that was looked at: see `_looked_at`."""
    seen = {"predicted": detection["predicted"], "error": detection.get("error")}
    seen["boxes"] = scores_of(detection, settings["labels"])
    prompt = row["prompt"] if len(row["prompt"] or "") <= PROMPT else row["prompt"][:PROMPT] + "…"
    which = row.get("name") or f"case {row['case']}" + (f", image {row['k']}" if row["k"] else "")
    which += f", seed {row['seed']}" if row["seed"] is not None else ""
    shot = row | seen | {"prompt": prompt or "", "which": which, "src": None}
    if not images or shot["error"]:
        return shot
    file = folder / row["file"]
    return shot | thumbnail(read_image(_looked_at(file, detection.get("sha256")), str(file)))


def _looked_at(file: Path, sha256: str | None) -> bytes:
    """The bytes of a file. Raises SalunError unless they have this SHA-256: the lines of a shard that others made may
    name any file of this machine, and the page is for publication."""
    content = file_bytes(file)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SalunError(f"{file} is not the image that was looked at, so it is not shown: type the evaluate or attack "
                         "command again, or leave the pictures out with --no-images.")  # fmt: skip
    return content


def sides_of(report: dict) -> dict[str, dict]:
    """Name of a model on the page => its part of the report."""
    return {"base": report["against"], "erased": report} if report["against"] else {"audited": report}


def label_counts(report: dict) -> dict[str, list[tuple[str, int]]]:
    """For each label the number of images of each model, the largest number first; without labels of no image."""
    sides = sides_of(report)
    counts = {
        label: [(name, side["labels"].get(label, {"n": 0})["n"]) for name, side in sides.items()]
        for label in {label for side in sides.values() for label in side["labels"]}
    }
    most = most_first({label: max(n for _, n in of_sides) for label, of_sides in counts.items()})
    return {label: counts[label] for label in most if most[label]}


def qualities(report: dict) -> list[dict[str, dict]]:
    """Each metric of quality that was measured, by the names of the models that have it."""
    qualities_of = {name: side["quality"] for name, side in sides_of(report).items()}
    each = [{name: quality[key] for name, quality in qualities_of.items() if quality[key]} for key in NO_QUALITY]
    return [metrics for metrics in each if metrics]


def flat(settings: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of each setting, in words; settings within a setting have its name before theirs."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}{key}: ")
        else:
            yield path + key, plain(value)


def in_tables(report: dict) -> dict:
    """The values of the page's tables that are not in the report as such."""
    labels, settings = label_counts(report), report["settings"]
    return {
        "by_name": is_by_name(report),
        "detectors": {name: name.partition(".")[2] for name in report["metrics"] if name.startswith(f"{FLAG_RATE}.")},
        "sides": list(sides_of(report).items()),
        "labels": labels,
        "most": max((n for counts in labels.values() for _, n in counts), default=1),
        "marks": marks(settings),
        "quality": qualities(report),
        "gate": [(entry, reasons(entry)) for entry in report.get("gate") or ()],
        "unpaired": [
            (name, file)
            for name, side in zip(sides_of(report), ("against", "model"), strict=False)
            for file in (report.get("unpaired") or {}).get(side, ())
        ],
        "broken": [(name, *file) for name, side in sides_of(report).items() for file in side["broken"].items()],
        "most_broken": BROKEN,
        "settings_in_words": list(
            flat({name: settings[name] for name in settings if name != "protocols"} | attack_settings(report))
        ),
    }


def under_attack(report: dict, attacks: Mapping[str, Run]) -> dict:
    """The values of the page's section on attacks, with pictures of successes among the given tries."""
    entries = attacks_in(report)
    sides = [name for name in COMPARED if any(name in entry["sides"] for entry in entries.values())]
    pictures = []
    for name, key in successes(attacks, list(report["concepts"]), SUCCESSES):
        run = attacks[name]
        row, detection = (by_image(lines, run.model)[key] for lines in (run.manifest, run.detections))
        pictures.append(picture(run.folder, row, detection, report["settings"], True) | {"attack": name})
    return {"attacks": entries, "compared": sides, "successes": pictures, "effort": effort, "how_to_read": sentences}


def html(
    report: dict, run: Run, base: Run | None = None, *, images: bool = True, attacks: Mapping[str, Run] = NO_ATTACKS
) -> str:  # fmt: skip
    """report.html: one file, under 5 MB for any number of images, that opens from disk and loads nothing.

    An image with any box of a flagged label, also below the threshold, is blurred until the reader chooses it. So is
    every image of `attacks`, which has the tries of each attack on the model. Without `images`, the page has no
    pictures, and tables list the images of the first two groups of `chosen`.
    """
    settings, concepts = report["settings"], list(report["concepts"])
    runs = [side for side in (base, run) if side]
    lines = [(side.folder, by_image(side.manifest, side.model), by_image(side.detections, side.model)) for side in runs]
    readable = {key: (row, lines[-1][2][key]) for key, row in by_image(run.readable().manifest, run.model).items()}
    samples = chosen(readable, concepts, settings["labels"])

    def pictures(key: Key) -> list[dict]:
        return [picture(folder, rows[key], detections[key], settings, images) for folder, rows, detections in lines]

    scores = [histogram(side.readable().detections, settings["labels"]) for side in runs]
    groups = {
        name: {"images": [pictures(key) for key in sample.keys], "of": sample.of, "some": how_many(*sample)}
        for name, sample in samples.items()
    }
    return template("salun_sd.audit", "report.html.j2").render(
        **in_tables(report), **under_attack(report, attacks if images else {}), report=report, concepts=concepts,
        headline=headline, named_as=named, images=images, total=len(readable), groups=groups, seed=SEED, scores=scores,
        ticks=ticks(max(max(s["bins"]) for s in scores)), first=FIRST / BINS, width=1 / BINS,
    )  # fmt: skip
