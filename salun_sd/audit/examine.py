"""What the detector and the classifier find in an audit's images: each image once, kept line by line; resumable."""

import hashlib
import json
from itertools import repeat
from pathlib import Path

from tqdm import tqdm

from salun_sd.audit.classify import UNSEEN, Judge
from salun_sd.audit.detect import detect, detector_name
from salun_sd.audit.report import Run
from salun_sd.audit.vision import BATCH
from salun_sd.errors import SalunError
from salun_sd.runtime import ranks
from salun_sd.runtime.files import write_atomic

BOXES, CLASSES = ("width", "height", "boxes"), (*UNSEEN, "concepts")  # what a line has of each of the two
CHUNK = 2**20  # bytes of a file that are read at once


def examine(model: str, manifest: list[dict], judge: Judge | None, detector: Path | None, out: Path) -> Run:
    """Run the detector, and the judge if there is one, over the manifest's images, each process over its share; writes
    both .jsonl files.

    A line is written as soon as it is found, into a file for each process until all are. An image whose bytes, by their
    SHA-256, have a line already is not detected again by the same detector, nor classified by the same judge. A line of
    the manifest that has an `error` is not looked at. Raises SalunError where no image can be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    by = {"detector": detector_name(detector), "classifier": judge and judge.digest}
    digests = [None if "error" in line else _digest(out / line["file"]) for line in manifest]
    boxes, classes = ({n: known[digest] for n, digest in enumerate(digests) if digest in known}
                      for known in _known(out, by))  # fmt: skip
    for n, line in enumerate(manifest):
        if "error" in line:
            boxes[n], classes[n] = {"error": line["error"]}, UNSEEN
    ranks.wait()  # all know the same

    def found(n: int) -> dict:
        return {"sha256": digests[n], **by, **boxes[n], **classes[n]}

    mine = ranks.share(len(manifest), BATCH, boxes.keys() & classes.keys())
    batches = {n // BATCH for n in mine if n not in classes}
    asked = [out / manifest[n]["file"] for n in mine if n // BATCH in batches]
    answers = judge.classify(asked, BATCH) if judge else repeat(UNSEEN)
    unseen = [out / manifest[n]["file"] for n in mine if n not in boxes]
    seen = detect(unseen, detector) if unseen else iter(())
    left = [n for n in mine if n not in boxes or n not in classes]
    bar = tqdm(total=len(left), desc="examine", unit="image")
    with bar, (out / f".detections.{ranks.rank()}.partial").open("a", encoding="utf-8") as lines:
        lines.write("\n")  # a kill may have left half a line
        for n in mine:
            answer = next(answers) if n // BATCH in batches else None
            if n in boxes and n in classes:
                continue
            if n not in classes:
                classes[n] = answer
            if n not in boxes:
                boxes[n] = next(seen)
            lines.write(json.dumps(found(n), ensure_ascii=False) + "\n")
            lines.flush()
            bar.update()
    for n, *both in ranks.gathered([(n, boxes[n], classes[n]) for n in left]):
        boxes[n], classes[n] = both
    detections = [{key: line[key] for key in ("file", "case", "k")} | found(n) for n, line in enumerate(manifest)]
    if ranks.is_main():
        for name, rows in (("manifest.jsonl", manifest), ("detections.jsonl", detections)):
            write_atomic(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for file in _partial_detections(out):
            file.unlink()
    if all("error" in row for row in detections):
        name, why = Path(detections[0]["file"]).name, detections[0]["error"]
        raise SalunError(f"None of the {len(detections)} images of {model} could be read; {name}: {why}.")
    return Run(model, out, manifest, detections)


def _digest(image: Path) -> str | None:
    """SHA-256 of an image's file; None where it cannot be read, as its line will say."""
    whole = hashlib.sha256()
    try:
        with image.open("rb") as file:
            while chunk := file.read(CHUNK):
                whole.update(chunk)
    except OSError:
        return None
    return whole.hexdigest()


def _partial_detections(out: Path) -> list[Path]:
    return sorted(out.glob(".detections.*.partial"))


def _known(out: Path, by: dict) -> tuple[dict[str, dict], dict[str, dict]]:
    """What earlier runs into `out` found, by the SHA-256 of the image's bytes: this detector's BOXES, and this
    classifier's CLASSES."""
    boxes, classes = {}, {}
    for file in filter(Path.is_file, [out / "detections.jsonl", *_partial_detections(out)]):
        for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue  # half a line of a run that was killed
            judged = line.get("classifier") is None or line.get("predicted") is not None
            was_read = line.get("sha256") and "boxes" in line and judged  # else the reason may have been the machine's
            for known, who, keys in ((boxes, "detector", BOXES), (classes, "classifier", CLASSES)):
                if was_read and line.get(who) == by[who]:
                    known[line["sha256"]] = {key: line[key] for key in keys if key in line}
    return boxes, classes
