import json

import pytest
from helpers.models import write_pipeline
from PIL import Image
from skimage import data

from salun_sd.audit import run as audit
from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.draw.generate import PROVENANCE
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import SalunError

ROWS = [Prompt(3, "a", 1, 7.5, None, ("sexual", "shocking")), Prompt(5, "b", 2, 7.5, "bag")]


def test_images_of_prompts_that_a_filter_left_out_are_passed_over_and_no_others(tmp_path):
    for name in ("3_0.png", "5_0.png", "8_0.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SalunError, match="8_0.png is of no prompt"):
        audit._collected(tmp_path, ROWS, tmp_path, subset=False)
    assert [line["file"] for line in audit._collected(tmp_path, ROWS, tmp_path, subset=True)] == ["3_0.png", "5_0.png"]
    (tmp_path / "cover.png").write_bytes(b"")
    with pytest.raises(SalunError, match="cover.png is of no prompt"):
        audit._collected(tmp_path, ROWS, tmp_path, subset=True)


def test_missing_images_are_counted_and_the_first_is_named_however_large_k_is(tmp_path):
    for name in ("3_0.png", "5_0.png", "3_4294967295.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SalunError, match=r"has no 3_1.png \(8,589,934,589 of 8,589,934,592 images missing\)"):
        audit._collected(tmp_path, ROWS, tmp_path, subset=False)


def test_a_line_of_the_manifest_has_categories_where_its_prompt_has_any(tmp_path):
    for name in ("3_0.png", "5_0.png"):
        (tmp_path / name).write_bytes(b"")
    first, second = audit._collected(tmp_path, ROWS, tmp_path, subset=False)
    assert first["categories"] == ["sexual", "shocking"] and "categories" not in second


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluate(*argv) -> dict:
    """The report of an audit, as typed."""
    cli.run(["evaluate", *map(str, argv)])
    return json.loads((argv[-1] / "report.json").read_text())


@pytest.fixture
def photographs(tmp_path):
    """Three crops of a photograph with a face, and the prompts that some program made them from."""
    (tmp_path / "p.csv").write_text(prompts.write([Prompt(i, "a face", i, 7.5) for i in range(3)]))
    (tmp_path / "photographs").mkdir()
    for i in range(3):
        crop = Image.fromarray(data.astronaut()[: 300 - i, : 300 + i])
        crop.save(tmp_path / "photographs" / f"{i}_0.png")
    return ["--images", tmp_path / "photographs", "--prompts", tmp_path / "p.csv", "--out", tmp_path / "audit"]


def test_a_run_that_was_killed_while_it_detected_goes_on_to_the_same_bytes(photographs, tmp_path):
    evaluate(*photographs)
    out = tmp_path / "audit"
    whole = {f.name: f.read_bytes() for f in out.iterdir()}
    first, second, third = whole["detections.jsonl"].decode().splitlines()
    assert "FACE_FEMALE" in first
    (out / "detections.jsonl").unlink()
    (out / ".detections.0.partial").write_text(f"{second}\n{third[:-5]}")  # the kill came within the third
    evaluate(*photographs)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == whole


def test_an_image_that_could_not_be_read_is_looked_at_again(photographs, tmp_path):
    """It may have been the machine: what it says of the file is not kept."""
    evaluate(*photographs)
    file = tmp_path / "audit" / "detections.jsonl"
    whole = file.read_bytes()
    failed, *others = lines_of(file)
    del failed["boxes"], failed["width"], failed["height"]
    lines = [failed | {"error": "Too many open files"}, *others]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(*photographs)
    assert file.read_bytes() == whole


def test_what_was_found_is_not_looked_at_again_unless_the_image_or_the_detector_is_another(photographs, tmp_path):
    evaluate(*photographs)
    file = tmp_path / "audit" / "detections.jsonl"
    before = lines_of(file)
    marked = [line | {"boxes": []} for line in before]  # what no detector would find
    marked[1]["detector"] = "another"
    file.write_text("".join(json.dumps(line) + "\n" for line in marked))
    Image.fromarray(data.astronaut()[:301]).save(tmp_path / "photographs" / "2_0.png")
    evaluate(*photographs)
    after = lines_of(file)
    assert after[0]["boxes"] == [] and after[1] == before[1]
    assert after[2]["boxes"] and after[2]["sha256"] != before[2]["sha256"]


def test_an_audit_into_a_linked_folder_finds_its_images(photographs, tmp_path):
    whole = evaluate(*photographs)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away", target_is_directory=True)
    assert evaluate(*photographs[:-1], tmp_path / "link" / "audit") == whole and not whole["broken"]


def test_an_audit_of_which_no_image_can_be_read_fails(photographs, tmp_path, capsys):
    for i in range(3):
        (tmp_path / "photographs" / f"{i}_0.png").write_bytes(b"")
    with pytest.raises(SystemExit) as e:
        evaluate(*photographs)
    said = capsys.readouterr().err
    assert e.value.code == 1 and "photographs could be read; 0_0.png: it is empty." in said
    assert "None of the 3 images of" in said and not (tmp_path / "audit" / "report.json").exists()


def test_boxes_hang_on_the_detector_alone_and_classes_on_the_classifier_alone(tmp_path):
    """Marked lines show which of the two was found anew: no detector finds, no judge says what they hold."""
    (tmp_path / "p.csv").write_text(prompts.write(prompts.read("pocket", ["class=sneaker"], 2)))
    argv = ["pocket", "--steps", "1", "--prompts", tmp_path / "p.csv", "--out", tmp_path / "audit"]
    evaluate(*argv)
    file = tmp_path / "audit" / "detections.jsonl"
    plain, box = lines_of(file), {"label": "FEET_COVERED", "score": 0.75, "box": [0, 0, 1, 1]}
    marks = {"boxes": [box], "predicted": "coat"}
    for other, kept in (("classifier", "boxes"), ("detector", "predicted")):
        file.write_text("".join(json.dumps(line | marks | {other: "another"}) + "\n" for line in plain))
        evaluate(*argv)
        assert lines_of(file) == [line | {kept: marks[kept]} for line in plain]


def test_another_classifier_judges_anew(tmp_path):
    """The pocket's judge answers for sneakers; a set without classes has none, and takes nothing over from it."""
    rows = prompts.read("pocket", ["class=sneaker"], 2)
    for name, labels in (("judged", ["sneaker"] * 2), ("renamed", ["bag", "sneaker"]), ("plain", [None] * 2)):
        named = [p._replace(label=label) for p, label in zip(rows, labels, strict=True)]
        (tmp_path / f"{name}.csv").write_text(prompts.write(named))
        evaluate("pocket", "--steps", "1", "--prompts", tmp_path / f"{name}.csv", "--out", tmp_path / "audit")
        found = lines_of(tmp_path / "audit" / "detections.jsonl")
        assert [line["predicted"] is None for line in found] == [name == "plain"] * 2
        assert [line["classifier"] is None for line in found] == [name == "plain"] * 2


def test_base_images_are_drawn_once_for_every_model_that_is_audited_against_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    write_pipeline(tmp_path / "erased", "sd1")
    rows = prompts.read("pocket", limit=4)
    (tmp_path / "p.csv").write_text(
        prompts.write([*rows[:2], rows[2]._replace(size=(40, 24)), rows[3]._replace(guidance=9)])
    )
    argv = ["--against", "pocket", "--prompts", tmp_path / "p.csv", "--steps", "1", "--out"]
    first = evaluate("pocket", *argv, tmp_path / "a")
    second = evaluate(tmp_path / "erased", *argv, tmp_path / "b")
    assert first["settings"]["sampling_against"] == second["settings"]["sampling_against"]
    names = {f"{p.case}_0.png" for p in rows}
    kept = list((tmp_path / "cache" / "audited").rglob("*.png"))
    assert len(kept) == len(names) == 4
    for name in names:
        own, a, b = (tmp_path / place / name for place in ("a/images", "a/against/images", "b/against/images"))
        assert own.read_bytes() == a.read_bytes()  # as it is drawn without a cache
        assert b.read_bytes() == a.read_bytes()
        assert own.read_bytes() != (tmp_path / "b" / "images" / name).read_bytes()

    cli.run(["cache"])
    assert "audited" in capsys.readouterr().out
    cli.run(["cache", "--clear"])
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "b").rglob("*.png")}
    evaluate(tmp_path / "erased", *argv, tmp_path / "b")  # an audit that is whole needs no cache
    assert len(before) == 8 and before == {f: f.stat().st_mtime_ns for f in before}
    assert not (tmp_path / "cache" / "audited").is_dir() or not any((tmp_path / "cache" / "audited").rglob("*.png"))


def test_who_changes_an_image_of_one_audit_or_of_the_cache_changes_no_other_audit(tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    argv = ["pocket", "--against", "pocket", "--prompts", "pocket", "--limit", "2", "--steps", "1", "--out"]
    first = evaluate(*argv, tmp_path / "a")
    names = sorted(f.name for f in (tmp_path / "a" / "against" / "images").iterdir())
    kept = {f: f.read_bytes() for f in (tmp_path / "cache" / "audited").rglob("*.png")}
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "against" / "images" / names[0])  # as one blurs it, in place
    assert kept == {f: f.read_bytes() for f in kept} and len(kept) == 2
    Image.new("RGB", (32, 32)).save(next(iter(kept)))
    assert evaluate(*argv, tmp_path / "b") == first
    for name in names:
        own, base = (tmp_path / place / name for place in ("a/images", "b/against/images"))
        assert own.read_bytes() == base.read_bytes()


def test_what_is_typed_is_drawn_and_recorded(tmp_path):
    rows = [p._replace(size=(512, 384)) for p in prompts.read("pocket", limit=2)]  # as I2P's
    (tmp_path / "p.csv").write_text(prompts.write(rows))
    argv = ["pocket", "--prompts", tmp_path / "p.csv", "--size", "40x24", "--guidance", "5", "--scheduler", "dpm++",
            "--steps", "2", "--out", tmp_path / "audit"]  # fmt: skip
    report = evaluate(*argv)
    said = report["settings"]["sampling"]
    assert (said["scheduler"], said["steps"], said["safety_checker"]) == ("DPMSolverMultistepScheduler", 2, "off")
    assert (report["settings"]["guidance"], report["settings"]["size"]) == (5, "40x24")
    for line in lines_of(tmp_path / "audit" / "manifest.jsonl"):
        assert (line["guidance"], line["size"], line["steps"]) == (5, [40, 24], 2)
        with Image.open(tmp_path / "audit" / line["file"]) as image:
            assert image.size == (40, 24)
            assert "scheduler=DPMSolverMultistepScheduler steps=2 size=40x24 guidance=5.0" in image.info[PROVENANCE]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--size", "big"], "--size big is no size: give pixels, as in 512, or width and height, as in 512x384"),
        (["--size", "30"], "is to be 30 x 30 pixels, and pocket draws multiples of 4: give --size 32"),
        (["--guidance", "-1"], "--guidance -1 is no guidance scale: give a number from 0 on"),
        (["--guidance", "nan"], "--guidance nan is no guidance scale"),
        (["--scheduler", "heun"], "There is no --scheduler heun; give one of ddim, dpm++, euler, lms, pndm"),
        (["--steps", "1001"], "--steps 1001 is more than the 1000 that pocket was trained on"),
        (["--against", "pocket", "--fid", "pocket", "--limit", "1"], "--fid needs two images or more that ask for no"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(tmp_path, capsys, option, said):
    with pytest.raises(SystemExit) as e:
        cli.run(["evaluate", "pocket", "--prompts", "pocket", "--out", str(tmp_path / "out"), *option])
    assert e.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_how_to_draw_is_not_said_of_images_that_are_there(photographs, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        cli.run(["evaluate", *map(str, photographs), "--samples-per-prompt", "1"])
    assert e.value.code == 2 and "--images has its own number: leave it out" in capsys.readouterr().err
    for option in (["--size", "32"], ["--guidance", "5"], ["--scheduler", "ddim"], ["--steps", "2"]):
        with pytest.raises(SystemExit) as e:
            cli.run(["evaluate", *map(str, photographs), *option])
        assert e.value.code == 2 and "are for images that are drawn: leave them out" in capsys.readouterr().err
    (tmp_path / "audit" / "images").mkdir(parents=True)
    with pytest.raises(SystemExit) as e:
        cli.run(["evaluate", *map(str, photographs)])
    assert e.value.code == 2 and "holds the audit of a model, with the images that it drew" in capsys.readouterr().err


def test_a_bound_that_this_audit_cannot_measure_is_refused_before_anything_is_drawn(photographs, tmp_path, capsys):
    pocket = ["pocket", "--prompts", "pocket", "--out", tmp_path / "audit"]
    for argv, bound, said in [
        ([*pocket, "--against", "pocket", "--fid", "pocket"], "fid > against.fid + 5", "give --reference, too"),
        (pocket, "ua < 0.9", "no prompt asks for a known one: give --concept, or others."),
        ([*pocket, "--where", "class=bag", "--concept", "bag"], "ra < 0.9", "and these prompts have none"),
        (photographs, "ra < 0.9", "ra needs a classifier, and prompts with classes"),
    ]:
        with pytest.raises(SystemExit) as e:
            cli.run(["evaluate", *map(str, argv), "--fail-if", bound])
        assert e.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "audit").exists()


def test_a_name_is_printed_as_it_is_and_never_as_markup(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "m[v1] :bug:[/v1]\\"
    folder.parent.mkdir()
    (tmp_path / "photographs").rename(folder)
    evaluate("--images", folder, *photographs[2:])
    assert str(folder) in capsys.readouterr().out
