"""`evaluate` of a class-conditional model: all its classes by name, and UA of the one that was erased."""

import json

import pytest
from helpers.by_class import LABELS, write_ddpm
from helpers.runs import fails_with
from PIL import Image

from salun_sd.audit.request import Request
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.draw.prompts import Prompt
from salun_sd.edit.checks import named
from salun_sd.edit.concepts import Concept

JUDGED = ("bag", "coat", "sneaker")  # classes of the pocket judge


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, the same without its coat, one without a null class, and one whose labels no judge knows."""
    place = tmp_path_factory.mktemp("by-class")
    base, erased = write_ddpm(place / "base", JUDGED), place / "erased"
    cli.run(["erase", str(base), "--concept", "1", "--anchor", "bag", "--mask", "none", "--samples", "2", "--steps",
             "1", "--batch-size", "2", "--lr", "1e-2", "--out", str(erased)])  # fmt: skip
    bare = write_ddpm(place / "bare", None, embeddings=3, guidance=1.0)
    return {"base": base, "erased": erased, "bare": bare, "other": write_ddpm(place / "other", LABELS)}


@pytest.fixture(scope="module")
def audit(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "audit"
    cli.run(["evaluate", str(places["erased"]), "--prompts", "classes", "--against", str(places["base"]),
             "--samples-per-prompt", "2", "--out", str(out)])  # fmt: skip
    return out


def test_all_classes_are_drawn_by_name_and_number_and_the_erased_one_is_known_from_the_record(audit):
    report = json.loads((audit / "report.json").read_text())
    lines = [json.loads(line) for line in (audit / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"images/{n}_{k}.png" for n in range(3) for k in range(2)]
    assert [line["guidance"] for line in lines] == [3.0] * 6
    assert list(report["concepts"]) == ["coat"] and report["settings"]["classifier"] == "pocket judge"
    assert [report["metrics"][name]["of"] for name in ("ua", "ra")] == [2, 4]
    assert 0 < report["quality"]["change"]["value"] < 1


def test_grey_images_are_read_back_as_they_were_drawn(audit):
    for folder in (audit / "images", audit / "against" / "images"):
        for file in folder.glob("*.png"):
            with Image.open(file) as image:
                assert image.mode == "L" and image.size == (8, 8)
    first, second = ((audit / "images" / f"{n}_0.png").read_bytes() for n in (0, 1))
    assert first != second


def test_images_of_a_folder_go_with_the_classes_of_the_base(audit, places, tmp_path):
    cli.run(["evaluate", "--images", str(audit / "images"), "--against", str(places["base"]), "--prompts", "classes",
             "--concept-class", "coat", "--out", str(tmp_path / "again")])  # fmt: skip
    made = [json.loads((place / "report.json").read_text()) for place in (audit, tmp_path / "again")]
    assert made[0]["metrics"] == made[1]["metrics"]
    assert made[0]["quality"]["change"]["value"] == made[1]["quality"]["change"]["value"]


def test_a_model_without_a_null_class_is_drawn_without_guidance_alone(places, tmp_path, capsys):
    file = tmp_path / "p.csv"
    file.write_text(prompts.as_csv([Prompt(4, "1", 0, 7.5)]))
    line = "evaluate {bare} --prompts {file} --out {out}"
    fails_with(line, places | {"file": file, "out": tmp_path / "out"}, 2, "4 7.5 {bare} '--guidance 1'", capsys)
    assert not (tmp_path / "out").exists()
    cli.run(["evaluate", str(places["bare"]), "--prompts", str(file), "--guidance", "1", "--out", str(tmp_path / "o")])
    [line] = (tmp_path / "o" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["guidance"] == 1


REFUSED = {  # options, and what the refusal names
    "classes of images alone": ("--images {images} --prompts classes", "classes --against"),
    "classes of a text model": ("{tiny} --prompts classes", "classes {tiny}"),
    "classes of a text base": ("--images {images} --against {tiny} --prompts classes", "classes {tiny}"),
    "a set of texts": ("{base} --prompts pocket --limit 2", "{base} coat"),
    "another size": ("{base} --prompts classes --size 7x8", "7 x 8 '--size 8'"),
    "a class that it has not": ("{erased} --prompts classes --concept-class boot", "boot coat"),
    "a base of other classes": ("{base} --against {other} --prompts classes", "'sneaker' {other}"),
    "guidance": ("{bare} --prompts classes --guidance 3", "3 {bare} '--guidance 1'"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_drawn_is_refused_before_anything_is(audit, places, tiny, tmp_path, options, named, capsys):
    given = places | {"images": audit / "images", "tiny": tiny, "out": tmp_path / "out"}
    fails_with(f"evaluate {options} --out {{out}}", given, 2, named, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("labels", "concept", "label"), [
    ([str(n) for n in range(11)], "1", "1"),  # as in MNIST
    (["7", "70", "0"], "0", "0"),
    (["maillot, tank suit", "maillot", "suit"], "Tank suit", "maillot, tank suit"),
    (["maillot, tank suit", "maillot", "suit"], "1", "maillot"),
    (["crane", "bag", "crane"], "2", "2"),
    (["cafe\u0301", "C++ (book)", "t-shirt"], "caf\u00e9", "caf\u00e9"),
    (["cafe\u0301", "C++ (book)", "t-shirt"], "1", "C++ (book)"),
])  # fmt: skip
def test_the_class_of_a_record_is_found_among_all_classes(tmp_path, labels, concept, label):
    model = find(str(write_ddpm(tmp_path / "model", labels)))
    [recorded] = named(model, [Concept(concept, None)])
    request = Request.of("classes", (), None, None, None, model)
    assert request.judging((), None, {"concepts": [recorded.record()]}).concepts == [label]
    assert sum(row.label == label for row in request.rows) == 1
