"""`evaluate` as it is typed: what it draws, keeps, refuses and says."""

import json
import re
import shutil

import pytest
import torch
from helpers.commands import spawn, until
from helpers.models import damage, write_pipeline
from helpers.runs import write_photographs
from PIL import Image
from skimage import data

import salun_sd
from salun_sd.audit.compare import compare
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.draw.generate import PROVENANCE
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import UsageError


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluate(*argv) -> dict:
    """The report of an audit, as typed."""
    cli.run(["evaluate", *map(str, argv)])
    return json.loads((argv[-1] / "report.json").read_text())


def refused(capsys, *argv, code: int = 2) -> str:
    """What an audit that must fail, as typed, says on stderr."""
    with pytest.raises(SystemExit) as e:
        cli.run(["evaluate", *map(str, argv)])
    said = capsys.readouterr().err
    assert e.value.code == code, said
    return said


@pytest.fixture
def photographs(tmp_path):
    """Three crops of a photograph with a face, and the prompts that some program made them from."""
    (tmp_path / "p.csv").write_text(prompts.as_csv([Prompt(i, "a face", i, 7.5) for i in range(3)]))
    (tmp_path / "photographs").mkdir()
    for i in range(3):
        crop = Image.fromarray(data.astronaut()[: 300 - i, : 300 + i])
        crop.save(tmp_path / "photographs" / f"{i}_0.png")
    return ["--images", tmp_path / "photographs", "--prompts", tmp_path / "p.csv", "--out", tmp_path / "audit"]


def test_an_audit_into_a_linked_folder_finds_its_images(photographs, tmp_path):
    whole = evaluate(*photographs)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away", target_is_directory=True)
    assert evaluate(*photographs[:-1], tmp_path / "link" / "audit") == whole and not whole["broken"]


def test_an_audit_of_which_no_image_can_be_read_fails(photographs, tmp_path, capsys):
    for i in range(3):
        (tmp_path / "photographs" / f"{i}_0.png").write_bytes(b"")
    said = refused(capsys, *photographs, code=1)
    assert "3 images" in said and "0_0.png" in said and not (tmp_path / "audit" / "report.json").exists()


def test_another_classifier_judges_anew(photographs, tmp_path):
    """The pocket's judge answers for sneakers; a set without classes has none, and takes nothing over from it."""
    rows = prompts.read(str(tmp_path / "p.csv"))
    for name, labels in (("judged", ["sneaker"] * 3), ("renamed", ["bag", "coat", "coat"]), ("plain", [None] * 3)):
        of_class = [p._replace(label=label) for p, label in zip(rows, labels, strict=True)]
        (tmp_path / f"{name}.csv").write_text(prompts.as_csv(of_class))
        evaluate(*photographs[:2], "--prompts", tmp_path / f"{name}.csv", *photographs[4:])
        found = lines_of(tmp_path / "audit" / "detections.jsonl")
        assert [line["predicted"] is None for line in found] == [name == "plain"] * 3
        assert [line["classifier"] is None for line in found] == [name == "plain"] * 3


def test_base_images_are_drawn_once_for_every_model_that_is_audited_against_it(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    write_pipeline(tmp_path / "erased", "sd1", seed=1)
    rows = [p._replace(label=None) for p in prompts.read("pocket", limit=3)]
    (tmp_path / "p.csv").write_text(
        prompts.as_csv([rows[0], rows[1]._replace(size=(40, 24)), rows[2]._replace(guidance=9)])
    )
    argv = ["--against", tiny, "--prompts", tmp_path / "p.csv", "--denoising-steps", "1", "--out"]
    first = evaluate(tiny, *argv, tmp_path / "a")
    second = evaluate(tmp_path / "erased", *argv, tmp_path / "b")
    assert first["settings"]["sampling_against"] == second["settings"]["sampling_against"]
    names = {f"{p.case}_0.png" for p in rows}
    kept = list((tmp_path / "cache" / "audited").rglob("*.png"))
    assert len(kept) == len(names) == 3
    for name in names:
        own, a, b = (tmp_path / place / name for place in ("a/images", "a/against/images", "b/against/images"))
        assert own.read_bytes() == a.read_bytes()  # as it is drawn without a cache
        assert b.read_bytes() == a.read_bytes()
        assert own.read_bytes() != (tmp_path / "b" / "images" / name).read_bytes()

    values = [found["change"] for found in lines_of(tmp_path / "b" / "detections.jsonl")]
    for kind, name in (("pixels", "change"), ("ssim", "change_ssim")):  # of three prompts without classes
        mean = sum(value[kind] for value in values) / 3
        assert second["quality"][name]["value"] == pytest.approx(mean, abs=1e-6) and 0 < mean < 1
        assert first["quality"][name]["value"] == (name == "change_ssim")

    cli.run(["cache"])
    assert "audited" in capsys.readouterr().out
    cli.run(["cache", "--clear"])
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "b").rglob("*.png")}
    evaluate(tmp_path / "erased", *argv, tmp_path / "b")  # an audit that is whole needs no cache
    assert len(before) == 6 and before == {f: f.stat().st_mtime_ns for f in before}
    assert not (tmp_path / "cache" / "audited").is_dir() or not any((tmp_path / "cache" / "audited").rglob("*.png"))


@pytest.mark.slow
def test_audits_that_draw_images_of_one_base_at_once_do_not_wait_for_each_other(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    write_photographs(tmp_path / "photographs", 2)
    argv = {}
    for case, count in ((0, 300), (1, 1)):
        (tmp_path / str(case)).mkdir()
        rows = [Prompt(case + 10 * n, "a face", case + 10 * n, 7.5) for n in range(count)]
        (tmp_path / f"{case}.csv").write_text(prompts.as_csv(rows))
        for p in rows:
            shutil.copy(tmp_path / "photographs" / f"{case}.png", tmp_path / str(case) / f"{p.case}_0.png")
        argv[case] = ["--images", tmp_path / str(case), "--prompts", tmp_path / f"{case}.csv", "--against", tiny,
                      "--detector", "none", "--denoising-steps", "30", "--out", tmp_path / f"audit{case}"]  # fmt: skip
    first = spawn(["evaluate", *argv[0]])
    until(lambda: any((tmp_path / "audit0").rglob("*.png")), first)
    evaluate(*argv[1])
    assert first.poll() is None and "waiting" not in capsys.readouterr().err
    first.kill()
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 1


def test_who_changes_an_image_of_one_audit_or_of_the_cache_changes_no_other_audit(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "p.txt").write_text("a photo of a bag\na sneaker\n")
    argv = [tiny, "--against", tiny, "--prompts", tmp_path / "p.txt", "--denoising-steps", "1", "--out"]
    first = evaluate(*argv, tmp_path / "a")
    names = sorted(f.name for f in (tmp_path / "a" / "against" / "images").glob("*.png"))
    kept = {f: f.read_bytes() for f in (tmp_path / "cache" / "audited").rglob("*.png")}
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "against" / "images" / names[0])  # as one blurs it, in place
    assert kept == {f: f.read_bytes() for f in kept} and len(kept) == 2
    Image.new("RGB", (32, 32)).save(next(iter(kept)))
    assert evaluate(*argv, tmp_path / "b") == first
    for name in names:
        own, base = (tmp_path / place / name for place in ("a/images", "b/against/images"))
        assert own.read_bytes() == base.read_bytes()


def test_what_is_typed_is_drawn_and_recorded(tiny, tmp_path):
    rows = [p._replace(size=(512, 384)) for p in prompts.read("pocket", limit=2)]  # as I2P's
    (tmp_path / "p.csv").write_text(prompts.as_csv(rows))
    argv = [tiny, "--prompts", tmp_path / "p.csv", "--size", "40x24", "--guidance", "5", "--scheduler", "dpm++",
            "--denoising-steps", "3", "--out", tmp_path / "audit"]  # fmt: skip
    report = evaluate(*argv)
    drawn = report["settings"]["sampling"]
    assert (drawn["scheduler"], drawn["steps"], drawn["safety_checker"]) == ("DPMSolverMultistepScheduler", 3, "off")
    assert (report["settings"]["guidance"], report["settings"]["size"]) == (5, "40x24")
    for line in lines_of(tmp_path / "audit" / "manifest.jsonl"):
        assert (line["guidance"], line["size"], line["steps"]) == (5, [40, 24], 3)
        with Image.open(tmp_path / "audit" / line["file"]) as image:
            assert image.size == (40, 24)
            assert "scheduler=DPMSolverMultistepScheduler steps=3 size=40x24 guidance=5.0" in image.info[PROVENANCE]


def test_images_of_one_dtype_are_never_taken_for_those_of_another(tiny, tmp_path, monkeypatch, capsys):
    """Not in the audit's own folder, and not in the cache of the base's images."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    (tmp_path / "p.txt").write_text("a face")
    argv = [tiny, "--against", tiny, "--prompts", tmp_path / "p.txt", "--denoising-steps", "1"]
    wide = evaluate(*argv, "--out", tmp_path / "wide")
    half = evaluate(*argv, "--dtype", "bfloat16", "--out", tmp_path / "half")
    assert re.search("drawn in float32: .*drawn in bfloat16: ", capsys.readouterr().err, re.DOTALL)
    for report, dtype in ((wide, "float32"), (half, "bfloat16")):
        assert {report["settings"][key]["dtype"] for key in ("sampling", "sampling_against")} == {dtype}
    for place in ("", "against"):
        assert len({(tmp_path / run / place / "images/0_0.png").read_bytes() for run in ("wide", "half")}) == 2
    assert "0_0.png" in refused(capsys, *argv, "--out", tmp_path / "half")
    [table] = compare([tmp_path / "wide", tmp_path / "half"])
    assert list(table.differs["dtype"]) == list(table.differs["against.dtype"]) == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--dtype", "half"], ["--dtype", "float16"]),
        (["--size", "big"], ["--size big", "512x384"]),
        (["--size", "30"], ["30 x 30", "pocket", "multiple", "--size 32"]),
        (["--guidance", "-1"], ["--guidance -1", "7.5"]),
        (["--guidance", "nan"], ["--guidance nan"]),
        (["--scheduler", "heun"], ["--scheduler heun", "ddim, dpm++, euler, lms, pndm"]),
        (["--denoising-steps", "1001"], ["--denoising-steps 1001", "1000", "pocket"]),
        (["--against", "pocket", "--fid", "pocket", "--limit", "1"], ["--fid", "two"]),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(tmp_path, capsys, option, named):
    said = refused(capsys, "pocket", "--prompts", "pocket", "--out", tmp_path / "out", *option)
    assert all(word in said for word in named) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        *((count, value) for count in ("limit", "samples_per_prompt", "denoising_steps") for value in (0, -1, 1.5)),
        *(("size", value) for value in (0, -512, "", 32.5)),
        *((path, "") for path in ("model", "against", "images", "reference", "detector_model", "out")),
        ("scheduler", ""),
    ],
)
def test_values_that_a_call_from_python_may_not_have(tmp_path, monkeypatch, parameter, value):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": "pocket", "prompts": "pocket", "out": "audit", parameter: value}
    if parameter == "images":
        arguments.pop("model")
    option = "MODEL" if parameter == "model" else f"--{parameter.replace('_', '-')}"
    with pytest.raises(UsageError, match=option):
        salun_sd.evaluate(**arguments)
    assert not list(tmp_path.iterdir())


def test_a_size_may_be_a_number_in_python(tiny, tmp_path):
    (tmp_path / "p.txt").write_text("a face")
    as_number, as_text = (
        salun_sd.evaluate(tiny, prompts=tmp_path / "p.txt", out=tmp_path / "audit", size=size, denoising_steps=1)
        for size in (40, "40")
    )
    assert as_number == as_text and as_number["settings"]["size"] == "40"
    assert [line["size"] for line in lines_of(tmp_path / "audit" / "manifest.jsonl")] == [[40, 40]]


def test_a_checkpoint_that_is_open_is_a_base_beside_a_model_by_name(tiny, tmp_path):
    """The variant is the model's; who gives a Checkpoint has chosen its own."""
    (tmp_path / "p.txt").write_text("a face")
    report = salun_sd.evaluate(str(tiny), against=find(str(tiny)), prompts=tmp_path / "p.txt", out=tmp_path / "audit",
                               variant="fp16", denoising_steps=1)  # fmt: skip
    sampling = report["settings"]["sampling"], report["settings"]["sampling_against"]
    assert sampling[0] == sampling[1]


ABSENT = "nobody/no-such-model"  # a hub id, which the tests' hub does not have: who opens it says so


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        (None, {}),
        ("--prompts|rompt set", {"prompts": "no-such-set"}),
        ("--where", {"where": "class"}),
        ("no column", {"where": "color=red"}),
        ("--size", {"size": "big"}),
        ("--guidance", {"guidance": -1}),
        ("--scheduler", {"scheduler": "heun"}),
        ("--dtype", {"dtype": "half"}),
        ("folder", {"model": None, "against": ABSENT, "images": "no-such-folder"}),
        ("--reference", {"fid": "pocket", "reference": "no-such-folder"}),
        ("--reference", {"reference": "no-such-folder"}),
        ("--fid", {"fid": "pocket"}),
        ("--detector-model", {"detector_model": "no-such-file.onnx"}),
    ],
)
def test_what_needs_no_model_is_checked_before_one_is_opened(tmp_path, option, wrong):
    with pytest.raises(UsageError) as caught:
        salun_sd.evaluate(**{"model": ABSENT, "prompts": "pocket", "out": tmp_path / "audit"} | wrong)
    assert (ABSENT in str(caught.value)) == (option is None)
    assert option is None or re.search(option, str(caught.value))


@pytest.mark.parametrize("option", [["--samples-per-prompt", "1"], ["--size", "32"], ["--guidance", "5"],
                                    ["--scheduler", "ddim"], ["--denoising-steps", "2"],
                                    ["--dtype", "float32"]])  # fmt: skip
def test_how_to_draw_is_not_said_of_images_that_are_there(photographs, capsys, option):
    said = refused(capsys, *photographs, *option)
    assert option[0] in said and "leave" in said


def test_images_that_are_there_have_no_audit_in_the_folder_of_a_model_that_drew(photographs, tmp_path, capsys):
    (tmp_path / "audit" / "images").mkdir(parents=True)
    said = refused(capsys, *photographs)
    assert str(tmp_path / "audit") in said and "--out" in said


def test_a_model_draws_into_no_audit_of_images_that_are_elsewhere(photographs, tmp_path, capsys):
    evaluate(*photographs)
    before = (tmp_path / "audit" / "report.json").read_bytes()
    said = refused(capsys, "pocket", *photographs[2:])
    assert str(tmp_path / "audit") in said and (tmp_path / "audit" / "report.json").read_bytes() == before


def test_a_bound_that_this_audit_cannot_measure_is_refused_before_anything_is_drawn(photographs, tmp_path, capsys):
    pocket = ["pocket", "--prompts", "pocket", "--out", tmp_path / "audit"]
    for argv, bound, named, give in [
        ([*pocket, "--against", "pocket", "--fid", "pocket"], "fid > against.fid + 5", "against.fid", "--reference"),
        (pocket, "ua < 0.9", "ua", "--concept-class"),
        ([*pocket, "--where", "class=bag", "--concept-class", "bag"], "ra < 0.9", "ra", "leave"),
        (photographs, "ra < 0.9", "ra", "--classifier"),
    ]:
        said = refused(capsys, *argv, "--fail-if", bound).rpartition(f"{bound!r}: ")[2]
        assert said.startswith(named) and give in said and not (tmp_path / "audit").exists()


def test_a_name_is_printed_as_it_is_and_never_as_markup(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "m[v1] :bug:[/v1]\\"
    folder.parent.mkdir()
    (tmp_path / "photographs").rename(folder)
    evaluate("--images", folder, *photographs[2:])
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [("unet", "conv_out.weight", float("nan"), "UNet"),
                                     ("unet", "conv_out.weight", 3e38, "UNet"),
                                     ("vae", "decoder.conv_out.weight", 3e38, "VAE"),
                                     ("text_encoder", "final_layer_norm.weight", 3e38, "text encoder")])  # fmt: skip
@pytest.mark.parametrize("side", ["model", "against"])
def test_a_model_that_draws_no_numbers_fails_its_audit_and_leaves_no_image(
    tiny, tmp_path, monkeypatch, capsys, damaged, side
):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    *where, words = damaged
    damage(write_pipeline(tmp_path / "broken", "sd1"), *where)
    (tmp_path / "p.txt").write_text("a photo of a bag\n")
    models = [tmp_path / "broken"] if side == "model" else [tiny, "--against", tmp_path / "broken"]
    argv = [*models, "--prompts", tmp_path / "p.txt", "--denoising-steps", "1", "--fail-if", "flag_rate > 0.01"]
    said = refused(capsys, *argv, "--out", tmp_path / "audit", code=1)
    assert words in said and str(tmp_path / "broken") in said
    assert {f.parent.name for f in tmp_path.rglob("*.png")} <= {"images"}
    assert len(list(tmp_path.rglob("*.png"))) == (side == "against") and not list(tmp_path.rglob("report.json"))


def test_images_of_one_colour_are_named_and_a_gate_can_ask_for_them(photographs, tmp_path, capsys):
    report = evaluate(*photographs)
    assert report["blank"]["n"] == 0 and "broken" not in capsys.readouterr().err
    Image.new("RGB", (30, 30)).save(tmp_path / "photographs" / "1_0.png")
    said = refused(capsys, "--fail-if", "blank > 0", *photographs, code=3)
    [line] = [line for line in said.splitlines() if "one colour" in line]
    assert "1 of 3" in line and "1_0.png" in line and "0_0.png" not in line
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert (report["blank"]["n"], report["blank"]["of"], report["metrics"]["flag_rate"]["of"]) == (1, 3, 2)
    assert report["blank"]["files"] == list(report["broken"]) and report["blank"]["files"][0].endswith("1_0.png")
    for i in (0, 2):
        Image.new("RGB", (30, 30), "white").save(tmp_path / "photographs" / f"{i}_0.png")
    assert "0_0.png" in refused(capsys, *photographs, code=1)


def test_prompts_that_the_model_does_not_read_to_their_end_are_counted(tiny, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a photo of a bag\n" + "a photo of a coat " * 9 + "\n")
    evaluate(tiny, "--prompts", tmp_path / "p.txt", "--denoising-steps", "1", "--out", tmp_path / "audit")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "1 of 2 prompts" in line]
    assert "24" in line and "'a photo of a coat a photo" in line
