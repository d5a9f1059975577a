"""Shards of an audit, and the audit that they make together."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import fails, files_in
from helpers.models import write_classifier, write_clip, write_pipeline
from PIL import Image

import salun_sd
from salun_sd.audit import looked
from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.draw.shards import mixed
from salun_sd.runtime import seals

OF = 3
FIVE = ["drawings", "hentai", "neutral", "porn", "sexy"]


def write_rows(file: Path) -> Path:
    """Nine rows of as many classes, in no order of their cases, with categories; one is drawn in another size."""
    rows = prompts.read("pocket")[::100][:9]
    rows = [
        p._replace(case=7 * n % 11, categories=("odd",) if n % 2 else (), size=(24, 16) if n > 7 else None)
        for n, p in enumerate(rows)
    ]
    file.write_text(prompts.as_csv(rows))
    return file


def evaluated(*argv) -> dict:
    cli.run(["evaluate", *map(str, argv)])
    return json.loads((argv[-1] / "report.json").read_text())


def audited(here: Path, *argv) -> Path:
    """The audit whole/, and its shards 1/, 2/ and 3/."""
    evaluated(*argv, "--out", here / "whole")
    for n in range(1, OF + 1):
        evaluated(*argv, "--shard", f"{n}/{OF}", "--out", here / str(n))
    (here / "argv.json").write_text(json.dumps([*map(str, argv)]))
    return here


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Of an erased model and its base, with all that is measured."""
    here = tmp_path_factory.mktemp("drawn")
    write_pipeline(here / "erased", "sd1", seed=1), write_pipeline(here / "base", "sd1")
    clip, rows = write_clip(here / "clip"), write_rows(here / "rows.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALUN_SD_CACHE", str(here / "cache"))
        argv = [here / "erased", "--prompts", rows, "--against", here / "base", "--samples-per-prompt", 2]
        measures = ["--concept-class", "dress", "--clip", clip, "--fid", "pocket"]
        return audited(here, *argv, "--denoising-steps", 1, *measures)


def pictured(here: Path) -> list:
    """Options for a folder of images. One file is torn, and one is one colour: all of the third shard."""
    rows = prompts.read(str(write_rows(here / "rows.csv")))
    (here / "images").mkdir()
    for p in rows:
        picture = Image.linear_gradient("L").resize((16, 16)) if p.case != 5 else Image.new("L", (16, 16))
        picture.point(lambda x, p=p: x // 2 + p.case).save(here / "images" / f"{p.case}_0.png")
    (here / "images" / f"{rows[1].case}_0.png").write_bytes(b"")
    return ["--images", here / "images", "--prompts", here / "rows.csv", "--concept-class", "dress"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Of a folder of images, by two detectors."""
    here = tmp_path_factory.mktemp("made")
    argv = pictured(here)
    shutil.copytree(here / "images", here / "reference")
    detectors = ["--detector", "nudenet", "--detector", write_classifier(here / "five", FIVE)]
    measures = ["--clip", write_clip(here / "clip"), "--fid", "pocket", "--reference", here / "reference"]
    return audited(here, *argv, *detectors, *measures)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory) -> Path:
    """Of a folder of images, at which no detector looks."""
    here = tmp_path_factory.mktemp("unseen")
    return audited(here, *pictured(here), "--detector", "none")


def shards(made: Path) -> list[Path]:
    return [made / str(n) for n in range(1, OF + 1)]


def merged(out: Path, *argv) -> dict:
    cli.run(["merge", *map(str, argv), "--out", str(out)])
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("of", ["made", "unseen", pytest.param("drawn", marks=pytest.mark.slow)])
def test_shards_make_the_report_of_the_whole_audit_to_the_byte(of, tmp_path, request):
    made = request.getfixturevalue(of)
    one, two, three = shards(made)
    out = made / "merged"  # beside the others, as paths to given images are in the report
    report = merged(out, three, one, two)
    assert report["part"] is None and report["metrics"]["ua"]["of"] > 0
    assert (report["metrics"]["flag_rate"] is None) == (of == "unseen") and len(report["agreement"]) == (of == "made")
    assert of == "unseen" or report["quality"]["fid"]["value"] > 0
    for name in ("report.json", "report.md", "report.html"):
        assert (out / name).read_bytes() == (made / "whole" / name).read_bytes(), name
    assert not list(out.rglob("*.png"))  # none is copied, and each line says where its image is
    for side in (".", "against") if report["against"] else ".":
        for name in ("manifest.jsonl", "detections.jsonl"):
            here, there = (list(seals.read_lines(place / side / name)) for place in (out, made / "whole"))
            assert [line | {"file": ""} for line in here] == [line | {"file": ""} for line in there]
            for a, b in zip(here, there, strict=True):
                assert (out / side / a["file"]).read_bytes() == (made / "whole" / side / b["file"]).read_bytes()


def test_a_shard_says_that_it_is_one_wherever_it_is_read(made, capsys):
    reports = [json.loads((shard / "report.json").read_text()) for shard in shards(made)]
    for n, report in enumerate(reports, 1):
        part, images = report["part"], report["images"] + len(report["broken"])
        assert (part["shard"], part["of"], part["missing"], part["rows"]) == (f"{n}/{OF}", 9, 0, images)
        assert all(f"shard {n}/{OF}" in (made / str(n) / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert sum(report["part"]["rows"] for report in reports) == 9
    assert (
        reports[2]["images"] == 0 and len(reports[2]["broken"]) == 2
    )  # it has no image to count, and is one all the same
    said = fails(["compare", made / "whole", made / "1"], 2, capsys)
    assert str(made / "1") in said and "salun-sd merge" in said


def test_bounds_are_judged_on_the_whole(made, tmp_path, capsys):
    argv = ["merge", *shards(made), "--out", tmp_path / "merged", "--fail-if"]
    fails([*argv, "fid < 0", "--fail-if", "flag_rate < 2"], 3, capsys)
    gate = json.loads((tmp_path / "merged" / "report.json").read_text())["gate"]
    assert [entry["holds"] for entry in gate] == [True, False]
    fails([*argv, f"flag_rate.{made / 'five'} >= 0"], 3, capsys)
    assert "against.fid" in fails([*argv, "against.fid > 2"], 2, capsys)
    assert "--confident" in fails([*argv[:-1], "--confident"], 2, capsys)


def test_a_missing_shard_is_named_and_the_report_without_it_says_so(made, tmp_path, capsys):
    one, _, three = shards(made)
    said = fails(["merge", one, three, "--out", tmp_path / "merged"], 1, capsys)
    assert "2/3" in said and "--allow-missing" in said and not (tmp_path / "merged").exists()
    report = merged(tmp_path / "merged", one, three, "--allow-missing")
    lacking = json.loads((made / "2" / "report.json").read_text())["part"]["rows"]
    assert report["part"] == {"rows": 9 - lacking, "of": 9, "missing": lacking, "shard": None, "absent": ["2/3"]}
    assert "2/3" in (tmp_path / "merged" / "report.md").read_text() and "2/3" in capsys.readouterr().err
    cli.run(["compare", str(made / "whole"), str(tmp_path / "merged")])
    assert f"{9 - lacking} of 9" in " ".join(capsys.readouterr().out.split())
    assert merged(tmp_path / "merged", *shards(made))["part"] is None  # the same command with what was missing
    assert "--out" in fails(["merge", one, three, "--allow-missing", "--out", tmp_path / "merged"], 2, capsys)


def test_shards_of_which_no_image_can_be_read_make_no_audit(made, tmp_path, capsys):
    said = fails(["merge", made / "3", "--allow-missing", "--out", tmp_path / "merged"], 1, capsys)
    assert "2 images" in said and list(tmp_path.iterdir()) == []


def no_shard(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def whole(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "whole", folder)


def changed(folder, name: str, change) -> None:
    """Another value in a report, under its seal."""
    report = seals.unsealed(json.loads((folder / name).read_text()), name)
    change(report)
    (folder / name).write_text(json.dumps(seals.sealed(report)))


def of_another_model(folder):
    changed(folder, "report.json", lambda r: r["settings"]["sampling"].update(identity="0123"))


def of_another_base(folder):
    changed(folder, "report.json", lambda r: r["settings"]["sampling_against"].update(identity="0123"))


def of_other_steps(folder):
    changed(folder, "report.json", lambda r: r["settings"]["sampling"].update(steps=9))


def of_other_prompts(folder):
    changed(folder, "report.json", lambda r: r["settings"].update(prompts_sha256="0123"))


def of_four(folder):
    changed(folder, "report.json", lambda r: r["part"].update(shard="2/4"))


def the_first_again(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "1", folder)


def renumbered(folder):
    changed(folder, "report.json", lambda r: r["part"].update(shard="3/3"))
    shutil.rmtree(folder.parent / "3")
    shutil.copytree(folder, folder.parent / "3")


def of_another_threshold(folder):
    changed(folder, "report.json", lambda r: [one.update(threshold=0.9) for one in r["settings"]["detectors"].values()])


def with_lines_of_another_detector(folder):
    lines = list(seals.read_lines(folder / "detections.jsonl"))
    for flag in [flag for line in lines for flag in line.get("flags", {}).values()]:
        flag["by"] = "0123"
    (folder / "detections.jsonl").write_text("".join(map(seals.line, lines)))


def forged(name: str, key: str, *value):
    """A damage: another line 2, under its seal, with another value of a key, or without that key."""

    def damage(folder):
        lines = list(seals.read_lines(folder / name))
        lines[1].pop(key, None)
        lines[1] |= dict.fromkeys([key], *value) if value else {}
        (folder / name).write_text("".join(map(seals.line, lines)))

    return damage


def of_no_shard(folder):
    changed(folder, "report.json", lambda r: r["part"].update(shard=7))


def of_more_prompts(folder):
    changed(folder, "report.json", lambda r: r["part"].update(rows=0))


def of_flaggers_without_digests(folder):
    changed(folder, "report.json", lambda r: [one.pop("sha256") for one in r["settings"]["detectors"].values()])


def of_no_reference(folder):
    found = looked.read(folder)
    looked.save(found._replace(reference=None), folder)


def with_fewer_lines(folder):
    lines = (folder / "detections.jsonl").read_text().splitlines(keepends=True)
    (folder / "detections.jsonl").write_text("".join(lines[1:]))


def without_the_base(folder):
    shutil.rmtree(folder / "against")


def without_features(folder):
    (folder / looked.FILE).unlink()


def with_cut_features(folder):
    (folder / looked.FILE).write_bytes((folder / looked.FILE).read_bytes()[:-9])


def with_scores_of_a_base(folder):
    found = looked.read(folder)
    looked.save(found._replace(scores=[*found.scores, {}]), folder)


def without_a_report(folder):
    (folder / "report.json").unlink()


FAULTS = [
    (no_shard, 2, ["2", "report.json"]), (without_a_report, 2, ["report.json", "evaluate"]), (whole, 2, ["--shard"]),
    (of_other_prompts, 2, ["prompts_sha256"]), (of_another_threshold, 2, ["five: threshold", "0.9"]),
    (of_four, 1, ["2/4"]), (the_first_again, 2, ["1/3"]), (renumbered, 1, ["3/3"]), (with_fewer_lines, 1, ["lines"]),
    (with_lines_of_another_detector, 1, ["lines"]), (without_features, 1, [looked.FILE]),
    (with_cut_features, 1, [looked.FILE]), (with_scores_of_a_base, 2, ["sides"]),
    (of_no_reference, 1, [looked.FILE, "reference is not a text", "evaluate"]),
    (of_no_shard, 1, ["report.json", "part.shard", "evaluate"]),
    (of_more_prompts, 1, ["manifest.jsonl", "evaluate"]),
    (of_flaggers_without_digests, 1, ["report.json", "evaluate"]),
    *((forged("manifest.jsonl", key), 1, ["manifest.jsonl, line 2", f"it has no {key}", "evaluate"])
      for key in ("file", "case", "k", "prompt", "class", "seed")),
    *((forged("detections.jsonl", key), 1, ["detections.jsonl, line 2", f"it has no {key}", "evaluate"])
      for key in ("case", "detector", "predicted", "score", "boxes")),
    (forged("manifest.jsonl", "seed", []), 1, ["manifest.jsonl, line 2", "seed is not a whole number"]),
    (forged("manifest.jsonl", "name", []), 1, ["manifest.jsonl, line 2", "name is not a text"]),
    (forged("detections.jsonl", "error", True), 1, ["detections.jsonl, line 2", "error is not a text"]),
    (forged("detections.jsonl", "change", {"against": "", "pixels": 0.5, "ssim": None}), 1,
     ["detections.jsonl, line 2", "change.ssim is not a finite number"]),
]  # fmt: skip
OF_DRAWN = [
    (of_another_model, 2, ["identity", "0123"]), (of_another_base, 2, ["sampling_against: identity", "0123"]),
    (of_other_steps, 2, ["steps", "9"]), (without_the_base, 1, ["against"]),
]  # fmt: skip


@pytest.mark.parametrize(("of", "damage", "code", "named"), [
    *(("made", *fault) for fault in FAULTS),
    *(pytest.param("drawn", *fault, marks=pytest.mark.slow) for fault in OF_DRAWN),
])  # fmt: skip
def test_what_is_not_of_one_audit_or_not_whole_is_named(of, damage, code, named, tmp_path, capsys, request):
    for name in ("whole", "1", "2", "3"):
        source = request.getfixturevalue(of) / name
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    damage(tmp_path / "2")
    before = files_in(tmp_path)
    said = fails(["merge", *shards(tmp_path), "--out", tmp_path / "merged"], code, capsys)
    assert all(word in said for word in [str(tmp_path / "2"), *named]), said
    assert files_in(tmp_path) == before


def test_no_picture_of_another_file_of_this_machine_gets_into_the_page(made, tmp_path, capsys):
    """A shard that others made names one in its lines, in place of an image."""
    for name in ("1", "2", "3", "images"):
        shutil.copytree(made / name, tmp_path / name)
    private = tmp_path / "private.png"
    Image.new("RGB", (32, 32), "red").save(private)
    for name in ("manifest.jsonl", "detections.jsonl"):
        first, *others = seals.read_lines(tmp_path / "1" / name)
        (tmp_path / "1" / name).write_text("".join(map(seals.line, [first | {"file": str(private)}, *others])))
    out = tmp_path / "merged"
    said = fails(["merge", *shards(tmp_path), "--out", out], 1, capsys)
    assert str(private.name) in said and "--no-images" in said and list(out.iterdir()) == []
    assert merged(out, *shards(tmp_path), "--no-images")["part"] is None


def test_a_line_that_names_no_file_is_said_and_nothing_is_half_written(made, tmp_path, capsys):
    for name in ("1", "2", "3", "images"):
        shutil.copytree(made / name, tmp_path / name)
    forged("manifest.jsonl", "file", "a\0b")(tmp_path / "1")
    said = fails(["merge", *shards(tmp_path), "--out", tmp_path / "merged"], 1, capsys)
    assert "it is no name of a file" in said and list((tmp_path / "merged").iterdir()) == []


def test_places_that_cannot_be_are_refused(made, tmp_path, capsys):
    one, two, three = shards(made)
    assert "twice" in fails(["merge", one, two, one, "--out", tmp_path / "merged"], 2, capsys)
    assert "--out" in fails(["merge", one, two, three, "--out", one], 2, capsys)
    of_another_threshold(shutil.copytree(made / "whole", made / "other"))
    for other in (made / "other", shutil.copytree(made / "1", tmp_path / "other")):
        before = {file: (other / file).read_bytes() for file in files_in(other)}
        assert str(other) in fails(["merge", one, two, three, "--out", other], 2, capsys)
        assert before == {file: (other / file).read_bytes() for file in files_in(other)}
    (tmp_path / "thesis.tex").write_text("")
    assert str(tmp_path) in fails(["merge", one, two, three, "--out", tmp_path], 2, capsys)
    assert str(tmp_path / "4") in fails(["merge", one, two, tmp_path / "4", "--out", tmp_path / "merged"], 2, capsys)


@pytest.mark.parametrize(("options", "named"), [
    (["--shard", "4/3"], "--shard 4/3"), (["--shard", "0/3"], "--shard 0/3"), (["--shard", "three"], "--shard three"),
    (["--shard", "1/3", "--fail-if", "flag_rate > 1"], "--fail-if"), (["--shard", "1/3", "--record"], "--record"),
    (["--shard", "1/100000"], "--shard 1/100000"), (["--limit-time", "2"], "--limit-time 2"),
    (["--limit-time", "0h"], "--limit-time 0h"), (["--limit-time", "1d"], "--limit-time 1d"),
    (["--limit-time", "-5m"], "--limit-time -5m"),
])  # fmt: skip
def test_an_option_that_says_nothing_is_refused_before_anything_is_drawn(tmp_path, capsys, options, named):
    argv = ["evaluate", "pocket", "--prompts", "pocket", "--limit", "4", "--out", tmp_path / "out", *options]
    assert named in fails(argv, 2, capsys) and not (tmp_path / "out").exists()


def test_a_folder_of_images_without_prompts_has_no_shards(made, tmp_path, capsys):
    argv = ["evaluate", "--images", made / "images", "--shard", "1/3", "--out", tmp_path / "out"]
    said = fails(argv, 2, capsys)
    assert "--shard" in said and "--prompts" in said and not (tmp_path / "out").exists()


def test_python_merges_too(made, tmp_path):
    report = salun_sd.merge(shards(made), out=tmp_path / "merged", no_images=True, fail_if="broken > 0")
    assert report["gate"][0]["holds"] is False and len(report["broken"]) == 2 and report["blank"]["n"] == 1
    assert json.loads((tmp_path / "merged" / "report.json").read_text()) == seals.sealed(json.loads(json.dumps(report)))


@pytest.mark.slow
def test_time_that_ends_leaves_a_random_sample_and_the_same_command_goes_on(drawn, tmp_path, capsys, monkeypatch):
    """At least one pass of each model is drawn. What there is in the end is the audit that no time ended."""
    argv = [*json.loads((drawn / "argv.json").read_text()), "--out", tmp_path / "audit"]
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    said = fails(["evaluate", *argv, "--limit-time", "1s"], 4, capsys)
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    part, order = report["part"], [p.case for p in prompts.read(argv[2])]
    assert part["shard"] is None and part["rows"] + part["missing"] == part["of"] == 9 and 0 < part["missing"]
    assert str(part["missing"]) in said and "again" in said
    assert f"{part['rows']} of 9" in (tmp_path / "audit" / "report.md").read_text()
    first = {p.case for p in mixed(prompts.read(argv[2]))[: part["rows"]]}
    lines = seals.read_lines(tmp_path / "audit" / "manifest.jsonl")
    assert {line["case"] for line in lines} == first != set(order[: part["rows"]])
    evaluated(*argv)
    for name in ("report.json", "report.html", "manifest.jsonl", "detections.jsonl"):
        assert (tmp_path / "audit" / name).read_bytes() == (drawn / "whole" / name).read_bytes()
