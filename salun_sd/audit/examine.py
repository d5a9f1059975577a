"""What the detectors and the classifier find in an audit's images, and how they differ from the base's: passes that are
all resumable.

Each pass keeps a line for each image, written as soon as it is found. An image whose bytes (their SHA-256) have a line
of the same model, or beside the same image of the base, is not looked at again. Nor are its bytes read again while the
file has the same size and times.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from salun_sd.audit.change import between
from salun_sd.audit.classify import UNSEEN, Judge
from salun_sd.audit.detect import detect
from salun_sd.audit.detectors import Detectors, Flagger
from salun_sd.audit.measure import by_image
from salun_sd.audit.report import Run
from salun_sd.audit.saved import SEEN
from salun_sd.audit.vision import BATCH
from salun_sd.draw.images import in_order
from salun_sd.errors import SalunError
from salun_sd.runtime import ranks, seals
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.contents import hash_into
from salun_sd.runtime.files import named_where_full, write_atomic
from salun_sd.runtime.stamps import Stamps, state_of

logger = logging.getLogger(__name__)

BOXES = ("width", "height", "blank", "boxes")  # what a line of detections.jsonl has of the detector
ONE_COLOUR = "it is one colour, so it shows nothing"
CLASSES = (*UNSEEN, "concepts")  # and of the classifier, the last only where it is asked for concepts by name


class Image(NamedTuple):
    """One image of the manifest."""

    file: Path
    sha256: str | None  # of the file's bytes; None where they cannot be read
    error: str | None  # why it is not looked at, if the manifest says so


def examine(
    model: str, manifest: list[dict], judge: Judge | None, detectors: Detectors, out: Path, base: Run | None = None,
    is_shard: bool = False,
) -> Run:  # fmt: skip
    """Detect and classify the images of a manifest, and compare them with the base's; write manifest.jsonl and
    detections.jsonl into `out`.

    `model` names what drew the images. Several processes share each pass, and all return the same. A line of the
    detections has `error` where the image is broken: it cannot be read, it is one colour, or its line of the manifest
    says so. It has `change` where neither the image nor the base's of the same case and k is broken. Raises SalunError
    if all images are, but not for a shard: others have the rest.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamps, lines = Stamps(out), list(_lines(out))
    ranks.wait()  # no process writes a line before all have read the same ones
    images = [_image(line, out, stamps) for line in Bar(manifest, desc="read", unit="image", leave=None)]
    found = _detected(images, detectors, lines, out)
    boxes = [one | ({"error": ONE_COLOUR} if one.get("blank") else {}) for one in found]
    classes = _classified(images, judge, lines, out)
    flags = [_flagged(images, flagger, lines, out) for flagger in detectors.flaggers]
    changes = _changed(images, _twins(manifest, boxes, base), lines, out)
    by = {"detector": detectors.name, "classifier": judge and judge.digest}

    def answers(n: int) -> dict:
        if "error" in boxes[n]:
            return boxes[n] | UNSEEN
        of_all = {name: flag for of_one in flags for name, flag in of_one[n]["flags"].items()}
        return boxes[n] | classes[n] | ({"flags": of_all} if flags else {})

    detections = [
        {"file": line["file"], "case": line["case"], "k": line["k"], "sha256": images[n].sha256}
        | by | answers(n) | changes[n]
        for n, line in enumerate(manifest)
    ]  # fmt: skip
    if ranks.is_main():
        if not write_lines(out, manifest, detections):
            logger.info(f"{out} has the results of all {len(detections)} images of {model} already.")
    run = Run(model, out, manifest, detections)
    if not is_shard:
        check_some(run)
    return run


def check_some(run: Run) -> None:
    """Raise SalunError if all images of a run are broken."""
    if all("error" in line for line in run.detections):
        name, why = Path(run.detections[0]["file"]).name, run.detections[0]["error"]
        raise SalunError(f"All {len(run.detections)} images of {run.model} are broken; {name}: {why}.")


def _image(line: dict, out: Path, stamps: Stamps) -> Image:
    name, file = line["file"], out / line["file"]
    if "error" in line:
        return Image(file, None, line["error"])
    if (sha256 := stamps.of(name)) is None:
        state, sha256 = state_of(file), _digest(file)
        if sha256 and ranks.is_main():
            stamps.add(name, state, sha256)
    return Image(file, sha256, None)


def _digest(file: Path) -> str | None:
    """The SHA-256 of a file; None where it cannot be read."""
    whole = hashlib.sha256()
    try:
        hash_into(whole, file)
    except OSError:
        return None
    return whole.hexdigest()


def _detected(images: list[Image], detectors: Detectors, lines: list[dict], out: Path) -> list[dict]:
    """The first pass: BOXES of each image, none if NudeNet does not look; or its `error`."""
    by = {"detector": detectors.name}
    known = _known(images, partial(_of_model, by, BOXES), lines)
    known |= {n: {"error": image.error} for n, image in enumerate(images) if image.error}
    mine = [n for n in ranks.share(len(images), BATCH, known) if n not in known]
    boxes = detect([images[n].file for n in mine], detectors.weights, detectors.detects) if mine else ()
    results = Bar(zip(mine, boxes, strict=True), total=len(mine), desc="detect", unit="image", disable=not mine)
    return _completed(known, results, images, by, out)


def _classified(images: list[Image], judge: Judge | None, lines: list[dict], out: Path) -> list[dict]:
    """The second pass: CLASSES of each image; UNSEEN if the image cannot be read or there is no judge."""
    if judge is None:
        return [UNSEEN] * len(images)
    by = {"classifier": judge.digest}
    return _asked(images, judge, _known(images, partial(_of_model, by, CLASSES), lines), by, out, "classify")


def _flagged(images: list[Image], flagger: Flagger, lines: list[dict], out: Path) -> list[dict]:
    """A pass of a detector beside NudeNet: its `flags` of each image."""

    def kept(line: dict) -> dict | None:
        flag = (line.get("flags") or {}).get(flagger.name, {})
        return {"flags": {flagger.name: flag}} if flag.get("by") == flagger.digest else None

    return _asked(images, flagger, _known(images, kept, lines), {}, out, f"detect by {Path(flagger.name).name}")


def _asked(
    images: list[Image], judge: Judge, known: dict[int, dict], by: dict, out: Path, desc: str
) -> list[dict]:  # fmt: skip
    """The answer of a judge for each image; `unseen` if the image cannot be read."""
    known = known | {n: judge.unseen for n, image in enumerate(images) if image.error}
    mine = [n for n in ranks.share(len(images), BATCH, known) if n not in known]
    answers = judge.classify([images[n].file for n in mine], BATCH)
    results = Bar(zip(mine, answers, strict=True), total=len(mine), desc=desc, unit="image", disable=not mine)
    return _completed(known, results, images, by, out)


def _twins(manifest: list[dict], boxes: list[dict], base: Run | None) -> list[Image | None]:
    """The base's image of the case and k of each line; None where one of the two cannot be read, or without a base."""
    lines = by_image(base.readable().detections, base.model) if base else {}
    found = [lines.get((line["case"], line["k"])) for line in manifest]
    return [
        Image(base.folder / line["file"], line["sha256"], None) if line and "error" not in boxes[n] else None
        for n, line in enumerate(found)
    ]


def _changed(images: list[Image], twins: list[Image | None], lines: list[dict], out: Path) -> list[dict]:
    """The third pass: the `change` of each image from its twin; empty without a twin."""
    if not any(twins):
        return [{}] * len(images)
    known = {
        n: result
        for n, result in _known(images, partial(_of_model, {}, ("change",)), lines).items()
        if twins[n] and result["change"]["against"] == twins[n].sha256
    }
    known |= {n: {} for n, twin in enumerate(twins) if twin is None}
    mine = [n for n in ranks.share(len(images), BATCH, known) if n not in known]
    changes = in_order(_change, [(images[n], twins[n]) for n in mine])
    results = Bar(zip(mine, changes, strict=True), total=len(mine), desc="change", unit="image", disable=not mine)
    return _completed(known, results, images, {}, out)


def _change(pair: tuple[Image, Image]) -> dict:
    image, twin = pair
    return {"change": {"against": twin.sha256} | between(image.file, twin.file)}


def _known(images: list[Image], kept: Callable[[dict], dict | None], lines: list[dict]) -> dict[int, dict]:
    """Position of an image => its result in the lines of earlier runs: what is `kept` of one, None for nothing."""
    of_sha256 = {}
    for line in lines:
        if line.get("sha256") and (result := kept(line)) is not None:
            of_sha256[line["sha256"]] = result
    return {n: of_sha256[image.sha256] for n, image in enumerate(images) if image.sha256 in of_sha256}


def _of_model(by: dict, keys: tuple[str, ...], line: dict) -> dict | None:
    """The `keys` of a line by the same model.

    A line that lacks some is of an image that could not be read, or of an earlier version. The first is not kept,
    either: the machine may have been the reason.
    """
    result = {key: line[key] for key in keys if line.get(key) is not None}
    return result if result.keys() >= {*keys} - {"concepts"} and by.items() <= line.items() else None


def _lines(out: Path) -> Iterator[dict]:
    """The lines of detections.jsonl, then those that unfinished runs left."""
    for file in filter(Path.is_file, [out / "detections.jsonl", *_partial(out)]):
        yield from seals.read_lines(file, SEEN, skip=True)  # a run that was killed leaves half a line


def _partial(out: Path) -> list[Path]:
    """The files that runs write into until they finish, one for each process."""
    return sorted(out.glob(".detections.*.partial"))


def _completed(
    known: dict[int, dict], results: Iterable[tuple[int, dict]], images: list[Image], by: dict, out: Path
) -> list[dict]:
    """The result of each image: those known, and the new (position, result) of all processes. Each new one is written
    down at once."""
    new = []
    file = out / f".detections.{ranks.rank()}.partial"
    with named_where_full(file), file.open("a", encoding="utf-8") as lines:
        lines.write("\n")  # a kill may have left half a line
        for n, result in results:
            lines.write(seals.line({"sha256": images[n].sha256, **by, **result}))
            lines.flush()
            new.append((n, result))
    complete = known | dict(ranks.gathered(new))
    return [complete[n] for n in range(len(images))]


def write_lines(out: Path, manifest: list[dict], detections: list[dict]) -> bool:
    """Write the lines; whether the detections are others than an earlier run's."""
    is_new = False
    for name, lines in (("manifest.jsonl", manifest), ("detections.jsonl", detections)):
        content = "".join(map(seals.line, lines)).encode()
        is_new = not (out / name).is_file() or (out / name).read_bytes() != content
        if is_new:
            write_atomic(out / name, content)
    for file in _partial(out):
        file.unlink()
    return is_new
