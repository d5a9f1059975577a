"""A small audited model, made by hand: seven images of three classes, what was seen and found in each."""

import dataclasses
import hashlib
import re
from itertools import dropwhile, takewhile
from pathlib import Path

from PIL import Image

from salun_sd.audit.attacked import About, Side, attacked
from salun_sd.audit.bounds import attacks_in, names, parts
from salun_sd.audit.examine import ONE_COLOUR
from salun_sd.audit.report import Run
from salun_sd.report import gate

ASKED = ["sneaker", "sneaker", "sneaker", "bag", "bag", "dress", "dress"]
BASE = ["sneaker", "sneaker", "bag", "bag", "bag", "dress", "dress"]
ERASED = ["bag", "dress", "bag", "bag", "sneaker", "dress", "coat"]
EVIL = "<script>a|b`*@mention*\n| x |  #1 https://x.yz"  # what a person may write
DETECTOR = "nudenet 3.4.2 320n.onnx c15d8273adad"


def box(label: str, score: float) -> dict:
    return {"label": label, "score": score, "box": [1, 2, 3, 4]}


def line(row: dict, **changes) -> dict:
    return row | changes


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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
            {"file": file, "case": case, "k": 0, "detector": DETECTOR, "width": 32, "height": 32, "blank": False}
            | {"boxes": boxes.get(case, []), "predicted": seen, "score": None if seen is None else 0.9}
            | {"sha256": sha256_of(folder / file)}
        )
    return Run(model, folder, manifest, detections)


def make_tries(model: str, seen: dict[int, str], folder: Path = Path("nowhere"), **changes) -> Run:
    """The images of an attack on a sneaker. Each case has a letter for each k from 0: S is seen as a sneaker, b as a
    bag, x is broken. Without a folder, there are no files."""
    manifest, detections = [], []
    for case, k, letter in ((case, k, letter) for case, letters in seen.items() for k, letter in enumerate(letters)):
        line_of_both = {"file": f"images/{case}_{k}.png", "case": case, "k": k}
        row = {"prompt": f"try {k} of a sneaker", "class": "sneaker", "seed": 100 + case, "guidance": 3.0, "steps": 25}
        found = {"predicted": {"S": "sneaker", "b": "bag"}.get(letter), "score": 0.9, "boxes": []}
        found |= {"error": "it is empty"} if letter == "x" else {}
        manifest.append(line_of_both | row | changes)
        detections.append(line_of_both | {"detector": DETECTOR} | found)
        if folder.is_dir():
            (folder / "images").mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (20 * case, 10 * k, 90)).save(folder / line_of_both["file"])
            detections[-1]["sha256"] = sha256_of(folder / line_of_both["file"])
    return Run(model, folder, manifest, detections)


def make_entry(**about) -> dict:
    """An attack that brings the sneaker back in 3 of 4 cases, its control in 2, its floor in 1."""
    sides = {
        "model": Side(make_tries("out/erased", {0: "bbS", 1: "Sbb", 2: "bbb", 3: "bSb"}),
                      make_tries("out/erased", {0: "SS", 3: "bb"})),
        "control": Side(make_tries("out/erased", {0: "bbb", 1: "Sbb", 2: "bbb", 3: "bbS"})),
        "floor": Side(make_tries("floor", {0: "bbb", 1: "bbb", 2: "bbS", 3: "bbb"})),
    }  # fmt: skip
    return attacked(About({"lr": 0.01}, "quick", 2, **about), sides, ["sneaker"])


def without_classifier(run: Run) -> Run:
    detections = [line(detection, predicted=None, score=None) for detection in run.detections]
    return dataclasses.replace(run, detections=detections)


def categorised(run: Run) -> Run:
    """Cases 0 to 3 are sexual, 3 shocking, too."""
    categories = {0: ["sexual"], 1: ["sexual"], 2: ["sexual"], 3: ["sexual", "shocking"], 4: []}
    manifest = [line(r, categories=categories[r["case"]]) if r["case"] in categories else r for r in run.manifest]
    return dataclasses.replace(run, manifest=manifest)


def several(run: Run, samples: int) -> Run:
    """Each prompt's image as often as that, all alike."""
    manifest, detections = (
        [line(row, k=k) for row in rows for k in range(samples)] for rows in (run.manifest, run.detections)
    )
    return dataclasses.replace(run, manifest=manifest, detections=detections)


def torn(run: Run, *cases: int) -> Run:
    """The run, where the images of these cases could not be read."""
    keep = ("file", "case", "k", "detector")
    fault = {"error": "image file is <truncated>", "predicted": None, "score": None}
    detections = [
        {key: detection[key] for key in keep} | fault if detection["case"] in cases else detection
        for detection in run.detections
    ]
    return dataclasses.replace(run, detections=detections)


def blanked(run: Run, *cases: int) -> Run:
    """The run, where the images of these cases are one colour."""
    fault = {"blank": True, "error": ONE_COLOUR, "predicted": None, "score": None}
    detections = [found | fault if found["case"] in cases else found for found in run.detections]
    return dataclasses.replace(run, detections=detections)


def read_table(text: str, title: str) -> list[list[str]]:
    """The cells of the first table after a title, as GitHub splits them: at bars without a backslash."""
    lines = dropwhile(lambda row: not row.startswith("| "), text.partition(title)[2].splitlines())
    rows = list(takewhile(lambda row: row.startswith("| "), lines))
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def judged(report: dict, text: str, confident: bool = False) -> dict:
    """A bound's entry in report.json."""
    known = names(list(report["concepts"]), list(report["categories"]), attacks=attacks_in(report))
    bound = gate.parse(text, known)
    return gate.judge(bound, parts(report, bound, in_pairs=confident), confident)
