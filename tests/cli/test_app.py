"""The commands as a person types them, on the bundled checkpoint."""

import json
import resource
import shutil
from functools import partial

import pytest
import torch
from helpers.commands import CONCEPT, ctrl_c_at, fails, files_in, spawn
from helpers.runs import PAIR, SHORT, write_photographs
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photos

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.model import POCKET
from salun_sd.cli import app as cli
from salun_sd.core import mask
from salun_sd.draw import prompts
from salun_sd.edit import maskfile
from salun_sd.errors import UsageError

BASE, UNET = find("pocket"), "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A prompt set of twelve rows: three sneakers, a bag, and one of each other class."""
    rows = prompts.read("pocket")
    chosen = [p for i, p in enumerate(rows) if i % 100 == 0] + [p for p in rows if p.label == "sneaker"][1:3]
    file = tmp_path_factory.mktemp("prompts") / "few.csv"
    file.write_text(prompts.as_csv(chosen))
    return file


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """Images to forget and to retain, so that none is drawn."""
    return [str(write_photographs(tmp_path_factory.mktemp(name) / "photographs")) for name in ("forget", "retain")]


@pytest.fixture(scope="module")
def masking(images) -> list[str]:
    return ["mask", "pocket", "--concept", CONCEPT, "--forget", images[0]]


@pytest.fixture(scope="module")
def erasing(images) -> list[str]:
    return ["erase", "pocket", *PAIR, "--forget", images[0], "--retain", images[1], *SHORT]


@pytest.fixture(scope="module")
def made(tmp_path_factory, few, masking, erasing):
    """mask, erase and evaluate, one after another."""
    out = tmp_path_factory.mktemp("made")
    cli.run([*masking, "--density", "0.5", "--density", "0.1", "--out", str(out / "m.safetensors")])
    cli.run([*erasing, "--mask", str(out / "m-0.1.safetensors"), "--out", str(out / "erased")])
    cli.run(["evaluate", str(out / "erased"), "--prompts", str(few), "--against", "pocket", "--denoising-steps", "2",
             "--out", str(out / "audit")])  # fmt: skip
    return out


def test_the_three_commands_write_exactly_these_files(made, few):
    images = {f"images/{p.case}_0.png" for p in prompts.read(str(few))}
    tables = {"manifest.jsonl", "detections.jsonl"}
    assert files_in(made / "audit") == (
        images | tables | {"report.json", "report.html", "report.md"} | {f"against/{name}" for name in images | tables}
    )
    assert files_in(made / "erased") == {
        "README.md", "model_index.json", "salun.json", "sampling.json",
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "unet/config.json", UNET, "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert files_in(made / "erased.run") == {"losses.jsonl", "mask.safetensors", "probe.svg", "run.json"}
    masks = {"m-0.5.safetensors", "m-0.1.safetensors"}
    assert {p.name for p in made.iterdir()} == {*masks, "erased", "erased.run", "audit"}


def test_mask_files_are_exact_and_say_where_they_come_from(made):
    total = sum(t.shape.numel() for t in BASE.unet.values())
    for density in (0.5, 0.1):
        m = maskfile.read(made / f"m-{density}.safetensors")
        assert mask.kept(m.bits) == (round(density * total), total)
        assert m.settings["base"] == BASE.fingerprint
        assert {k: m.settings[k] for k in ("concepts", "density", "guidance", "images", "seed")} == {
            "concepts": [CONCEPT], "density": density, "guidance": 7.5, "images": 3, "seed": 0}  # fmt: skip


def test_outside_the_mask_the_saved_bytes_are_the_bases_and_the_record_says_so(made):
    record = json.loads((made / "erased" / "salun.json").read_text())
    bits = maskfile.read(made / "m-0.1.safetensors").bits
    base, erased = load_file(POCKET / UNET), load_file(made / "erased" / UNET)
    moved = 0
    for name, t in base.items():
        assert torch.equal(t[~bits[name]], erased[name][~bits[name]])
        moved += int((t != erased[name]).sum())
    assert record["changed"] == {"inside": moved, "outside": 0} and moved > 0.5 * record["mask"]["kept"]
    assert record["settings"]["lr"] == 1e-4 and record["settings"]["batch_size"] == 4
    assert record["base"]["fingerprint"] == BASE.fingerprint
    assert record["erased"]["fingerprint"] == find(str(made / "erased")).fingerprint
    assert len((made / "erased.run" / "losses.jsonl").read_text().splitlines()) == record["settings"]["steps"] == 2


def test_the_erased_folder_opens_in_diffusers(made):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(made / "erased", safety_checker=None)
    [image] = pipeline(CONCEPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert image.size == (32, 32)


def test_the_report_counts_every_image(made):
    report = json.loads((made / "audit" / "report.json").read_text())
    metrics, base = report["metrics"], report["against"]["metrics"]
    assert report["settings"]["concepts"] == ["sneaker"]  # from the checkpoint's salun.json
    assert (metrics["ua"]["of"], metrics["ra"]["of"], metrics["flag_rate"]["of"]) == (3, 9, 12)
    assert base.keys() == metrics.keys() and report["model"] == str(made / "erased")
    page = (made / "audit" / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and page.count("data:image/png;base64,") == 24


def test_the_page_leaves_pictures_out_when_told_to_and_a_program_gets_the_numbers(made, few, tmp_path, capsys):
    cli.run(["evaluate", "--images", str(made / "audit" / "images"), "--prompts", str(few), "--no-images",
             "--out", str(tmp_path / "audit"), "--json"])  # fmt: skip
    numbers = json.loads(capsys.readouterr().err.splitlines()[-1])["numbers"]
    assert numbers["ra/low"] < numbers["ra"] == json.loads((tmp_path / "audit" / "report.json").read_text())["metrics"][
        "ra"]["rate"]  # fmt: skip
    page = (tmp_path / "audit" / "report.html").read_text()
    assert "<img" not in page and "base64" not in page and "--no-images" in page


def test_running_again_does_nothing_twice_and_changes_no_byte(made, few, erasing, capsys):
    before = {f: f.stat().st_mtime_ns for f in (made / "audit").rglob("*.png")}
    report = (made / "audit" / "report.json").read_bytes()
    cli.run(["evaluate", str(made / "erased"), "--prompts", str(few), "--against", "pocket", "--denoising-steps", "2",
             "--out", str(made / "audit")])  # fmt: skip
    assert len(before) == 24 and before == {f: f.stat().st_mtime_ns for f in before}
    assert (made / "audit" / "report.json").read_bytes() == report
    said = capsys.readouterr().err
    assert ": 0it [" not in said and "image/s" not in said  # no empty bars
    assert said.count(" 12 ") == 2  # but a line for each model
    erased = {f: f.stat().st_mtime_ns for f in (made / "erased").rglob("*")}
    capsys.readouterr()
    cli.run([*erasing, "--mask", str(made / "m-0.1.safetensors"), "--out", str(made / "erased")])
    assert erased == {f: f.stat().st_mtime_ns for f in (made / "erased").rglob("*")}
    said = capsys.readouterr()
    assert str(made / "erased") in said.err and str(made / "erased") in said.out
    assert "peak" not in said.err  # the memory and time are those of the earlier run


def test_a_gate_ends_with_3_once_everything_is_written(made, few, tmp_path, capsys):
    images = [
        "evaluate",
        "--images",
        str(made / "audit" / "images"),
        "--prompts",
        str(few),
        "--concept-class",
        "sneaker",
    ]
    argv = [*images, "--out", str(tmp_path / "a")]
    said = fails([*argv, "--fail-if", "flag_rate > 0.1", "--fail-if", "ra <= 1 + 0 * ua.sneaker"], 3, capsys)
    bound, _, values = said.removeprefix("Failed: ").partition(": ")  # the last one failed
    assert bound == "ra <= 1 + 0 * ua.sneaker" and "ra " in values and "ua.sneaker" not in values
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert [entry["holds"] for entry in report["gate"]] == [True, False]
    assert "**failed**" in (tmp_path / "a" / "report.md").read_text() and (tmp_path / "a" / "report.html").is_file()
    cli.run([*argv, "--fail-if", "flag_rate > 0.1"])
    assert "Failed" not in capsys.readouterr().err
    said = fails([*argv, "--fail-if", "flag_rate > 0.1", "--confident"], 3, capsys)
    assert "flag_rate" in said and "0 [0, 0.242494]" in said  # 12 images are too few to know
    cli.run(argv)
    assert json.loads((tmp_path / "a" / "report.json").read_text())["gate"] is None


def test_audits_are_compared_on_the_terminal_and_in_files(made, few, tmp_path, capsys, monkeypatch):
    images = ["evaluate", "--images", str(made / "audit" / "against" / "images"), "--prompts", str(few)]
    cli.run([*images, "--concept-class", "sneaker", "--out", str(tmp_path / "base")])
    capsys.readouterr()
    audits = [str(made / "audit"), str(tmp_path / "base" / "report.json")]
    monkeypatch.setenv("COLUMNS", "200")
    cli.run(["compare", *audits])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{few}\n") and "scheduler" in shown and "base: pocket" in shown and "ra: p" in shown
    for suffix in (".md", ".csv", ".json"):
        cli.run(["compare", *audits, "--out", str(tmp_path / f"both{suffix}")])
        assert (tmp_path / f"both{suffix}").stat().st_size > 500
    assert ".md, .csv, .json" in fails(["compare", *audits, "--out", tmp_path / "x.txt"], 2, capsys)
    assert str(tmp_path / "nowhere") in fails(["compare", audits[0], tmp_path / "nowhere"], 2, capsys)


def test_a_folder_of_images_some_other_program_made(made, few, tmp_path, capsys):
    shutil.copytree(made / "audit" / "images", tmp_path / "images")
    Image.fromarray(photos.astronaut()).save(tmp_path / "images" / "0_0.png")
    audit = ["evaluate", "--images", str(tmp_path / "images"), "--prompts", str(few), "--concept-class", "sneaker",
             "--out", str(tmp_path / "audit")]  # fmt: skip
    cli.run(audit)
    assert files_in(tmp_path / "audit") == {
        "manifest.jsonl", "detections.jsonl", "report.json", "report.html", "report.md"}  # fmt: skip
    first = json.loads((tmp_path / "audit" / "detections.jsonl").read_text().splitlines()[0])
    assert first["width"] == 512 and "FACE_FEMALE" in {box["label"] for box in first["boxes"]}
    cli.run([*audit, "--where", "class=sneaker", "--limit", "2"])
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["settings"]["where"] == ["class=sneaker"] and report["settings"]["limit"] == 2
    assert report["metrics"]["ua"]["of"] == 2 and report["prompts"] == f"{few} where class=sneaker, the first 2"
    (tmp_path / "images" / "100_0.png").unlink()
    sentence = fails(audit, 1, capsys)
    assert "100_0.png" in sentence and "1 of 12" in sentence
    (tmp_path / "images" / "cover.png").write_bytes(b"")
    assert "cover.png" in fails(audit, 1, capsys)


def test_a_file_that_was_erased_from_pocket_opens_without_a_config(erasing, tmp_path):
    file = str(tmp_path / "out.safetensors")
    cli.run([*erasing, "--mask", "random:0.1", "--format", "single-file", "--out", file])
    found = find(file)
    assert found.config == POCKET and found.fingerprint != BASE.fingerprint
    assert find(file, config="pocket").identity == found.identity


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_goes_on(tiny, made, few, tmp_path, capsys):
    erase = ["erase", tiny, *PAIR, "--mask", "none", "--samples", "2", "--steps", "9", "--save-every", "1e-9"]
    with ctrl_c_at(tmp_path / "erased.run" / "state.safetensors", times=3):
        fails([*erase, "--out", tmp_path / "erased"], 130, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["erased.run"]

    images = tmp_path / "a" / "images"
    audit = ["evaluate", str(made / "erased"), "--prompts", str(few), "--samples-per-prompt", "3",
             "--denoising-steps", "2", "--out", str(tmp_path / "a")]  # fmt: skip
    with ctrl_c_at(images, times=5):
        fails(audit, 130, capsys)
    assert not (tmp_path / "a" / "report.json").exists()
    drawn = {f: f.stat().st_mtime_ns for f in images.glob("*.png")}
    assert 3 < len(drawn) < 36
    cli.run(audit)
    assert len(list(images.glob("*.png"))) == 36 and drawn == {f: f.stat().st_mtime_ns for f in drawn}
    for name in ("0_0.png", "700_0.png"):  # what was drawn before or after the interruption is the same
        assert (images / name).read_bytes() == (made / "audit/images" / name).read_bytes()


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_said_and_leaves_nothing(masking, erasing, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same way."""
    for argv, name, most in (
        ([*erasing, "--mask", "none", "--save-every", "0"], "erased", 2**21),
        (masking, "mask.safetensors", 2**16),
    ):
        limit = (resource.RLIMIT_FSIZE, (most, most))
        process = spawn([*argv, "--out", tmp_path / name], preexec_fn=partial(resource.setrlimit, *limit))
        said = process.communicate(timeout=120)[1].strip().splitlines()[-1]
        assert process.returncode == 1 and "File too large" in said, said
        assert list(tmp_path.iterdir()) == []


def test_an_error_is_a_sentence_unless_a_traceback_is_asked_for(monkeypatch, capsys):
    sentence = fails(["mask", "nowhere", "--concept", "x"], 2, capsys)
    monkeypatch.setenv("SALUN_SD_DEBUG", "1")
    with pytest.raises(UsageError, match="nowhere") as e:
        cli.run(["mask", "nowhere", "--concept", "x"])
    assert sentence == f"Error: {e.value}"
