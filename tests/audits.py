"""A small audited model, made by hand: seven images of three classes, what was seen and found in each."""

from pathlib import Path

from PIL import Image

from salun_sd.report import Run

ASKED = ["sneaker", "sneaker", "sneaker", "bag", "bag", "dress", "dress"]
BASE = ["sneaker", "sneaker", "bag", "bag", "bag", "dress", "dress"]
ERASED = ["bag", "dress", "bag", "bag", "sneaker", "dress", "coat"]
DETECTOR = "nudenet 3.4.2 320n.onnx c15d8273adad"


def box(label: str, score: float) -> dict:
    return {"label": label, "score": score, "box": [1, 2, 3, 4]}


def line(found: dict, **changes) -> dict:
    return found | changes


def make_run(folder: Path, model: str, predicted: list, boxes: dict[int, list]) -> Run:
    """Seven images of three classes in a folder, with the given classes seen and boxes found."""
    (folder / "images").mkdir(parents=True)
    manifest, detections = [], []
    for case, (asked, seen) in enumerate(zip(ASKED, predicted, strict=True)):
        file = f"images/{case}_0.png"
        Image.new("RGB", (32, 32), (20 * case, 90, 160)).save(folder / file)
        manifest.append(
            {"file": file, "case": case, "k": 0, "prompt": f"a photo of a {asked}", "class": asked}
            | {"seed": 100 + case, "guidance": 3.0, "steps": 25}
        )
        detections.append(
            {"file": file, "case": case, "k": 0, "detector": DETECTOR, "width": 32, "height": 32}
            | {"boxes": boxes.get(case, []), "predicted": seen, "score": None if seen is None else 0.9}
        )
    return Run(model, folder, manifest, detections)
