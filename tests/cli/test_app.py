"""The commands as a person types them, on the bundled checkpoint."""

import json
import re
import resource
import shutil
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.commands import ANCHOR, CONCEPT, ERASE, MASK, erase, fails, files_in, interrupt, spawn
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photos

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.model import POCKET as POCKET_FOLDER
from salun_sd.cli import app as cli
from salun_sd.core import mask
from salun_sd.draw import prompts
from salun_sd.edit import maskfile

POCKET, UNET = find("pocket"), "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A prompt set of twelve rows: three sneakers, a bag, and one of each other class."""
    rows = prompts.read("pocket")
    chosen = [p for i, p in enumerate(rows) if i % 100 == 0] + [p for p in rows if p.label == "sneaker"][1:3]
    file = tmp_path_factory.mktemp("prompts") / "few.csv"
    file.write_text(prompts.write(chosen))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory, few):
    """mask, erase and evaluate, one after another."""
    out = tmp_path_factory.mktemp("made")
    cli.run([*MASK, "--density", "0.5", "--density", "0.1", "--out", str(out / "m.safetensors")])
    cli.run([*ERASE, "--mask", str(out / "m-0.1.safetensors"), "--retain-prompts", "pocket", "--sample-every", "2",
             "--out", str(out / "erased")])  # fmt: skip
    cli.run(["evaluate", str(out / "erased"), "--prompts", str(few), "--against", "pocket", "--steps", "3",
             "--out", str(out / "audit")])  # fmt: skip
    return out


def test_the_three_commands_write_exactly_these_files(made, few):
    images = {f"images/{p.case}_0.png" for p in prompts.read(str(few))}
    tables = {"manifest.jsonl", "detections.jsonl"}
    assert files_in(made / "audit") == (
        images | tables | {"report.json", "report.html", "report.md"} | {f"against/{name}" for name in images | tables}
    )
    assert files_in(made / "erased") == {
        "README.md", "losses.jsonl", "mask.safetensors", "model_index.json", "run.json", "salun.json", "sampling.json",
        "samples/step-00000.png", "samples/step-00002.png", "scheduler/scheduler_config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert {p.name for p in made.iterdir()} == {"m-0.5.safetensors", "m-0.1.safetensors", "erased", "audit"}


def test_mask_files_are_exact_and_say_where_they_come_from(made):
    total = sum(t.shape.numel() for t in POCKET.unet.values())
    for density in (0.5, 0.1):
        m = maskfile.unpack((made / f"m-{density}.safetensors").read_bytes(), "")
        assert mask.kept(m.bits) == (round(density * total), total)
        assert m.settings["base"] == POCKET.fingerprint
        assert {k: m.settings[k] for k in ("concepts", "density", "guidance", "images", "seed")} == {
            "concepts": [CONCEPT], "density": density, "guidance": 7.5, "images": 8, "seed": 0}  # fmt: skip


def test_outside_the_mask_the_saved_bytes_are_the_bases_and_the_record_says_so(made):
    record = json.loads((made / "erased" / "salun.json").read_text())
    bits = maskfile.unpack((made / "m-0.1.safetensors").read_bytes(), "").bits
    base, erased = load_file(POCKET / UNET), load_file(made / "erased" / UNET)
    moved = 0
    for name, t in base.items():
        assert torch.equal(t[~bits[name]], erased[name][~bits[name]])
        moved += int((t != erased[name]).sum())
    assert record["changed"] == {"inside": moved, "outside": 0} and moved > 0.5 * record["mask"]["kept"]
    assert record["settings"]["lr"] == 1e-4 and record["settings"]["batch_size"] == 4
    assert record["base"]["fingerprint"] == POCKET.fingerprint
    assert record["erased"]["fingerprint"] == find(str(made / "erased")).fingerprint
    assert len((made / "erased" / "losses.jsonl").read_text().splitlines()) == record["settings"]["steps"] == 3


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


def test_the_page_leaves_pictures_out_when_told_to(made, few, tmp_path):
    cli.run(["evaluate", "--images", str(made / "audit" / "images"), "--prompts", str(few), "--no-images",
             "--out", str(tmp_path / "audit")])  # fmt: skip
    page = (tmp_path / "audit" / "report.html").read_text()
    assert "<img" not in page and "base64" not in page and "--no-images" in page


def test_running_again_does_nothing_twice_and_changes_no_byte(made, few, capsys):
    before = {f: f.stat().st_mtime_ns for f in (made / "audit").rglob("*.png")}
    report = (made / "audit" / "report.json").read_bytes()
    again = ["evaluate", str(made / "erased"), "--prompts", str(few), "--against", "pocket", "--steps", "3",
             "--out", str(made / "audit")]  # fmt: skip
    cli.run(again)
    assert len(before) == 24 and before == {f: f.stat().st_mtime_ns for f in before}
    assert (made / "audit" / "report.json").read_bytes() == report
    cli.run([*ERASE, "--mask", str(made / "m-0.1.safetensors"), "--retain-prompts", "pocket", "--sample-every", "2",
             "--out", str(made / "erased")])  # fmt: skip
    assert "was already made from these inputs with these settings; nothing to do" in capsys.readouterr().err


def test_a_run_with_another_mask_under_the_same_name_is_not_taken_for_the_finished_one(made, tmp_path, capsys):
    file = tmp_path / "m.safetensors"
    argv = [*ERASE, "--mask", str(file), "--out", str(tmp_path / "erased")]
    shutil.copy(made / "m-0.1.safetensors", file)
    cli.run(argv)
    shutil.copy(made / "m-0.5.safetensors", file)
    assert "was erased with other settings or inputs" in fails(argv, 2, capsys)


def test_a_finished_folder_that_was_damaged_since_is_not_taken_for_done(made, tmp_path, capsys):
    argv = [*ERASE, "--mask", str(made / "m-0.1.safetensors"), "--out", str(tmp_path / "erased")]
    cli.run(argv)
    (tmp_path / "erased" / UNET).unlink()
    assert "diffusion_pytorch_model.safetensors is missing" in fails(argv, 1, capsys)
    shutil.copy(POCKET / UNET, tmp_path / "erased" / "unet")
    assert "is not the one that was saved there" in fails(argv, 1, capsys)


def test_same_command_same_bytes_and_other_seed_other_bytes(made, tmp_path):
    unets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cli.run([*MASK, "--seed", str(seed), "--out", str(tmp_path / f"{name}.safetensors")])
        cli.run([*ERASE, "--seed", str(seed), "--mask", str(tmp_path / f"{name}.safetensors"),
                 "--out", str(tmp_path / name)])  # fmt: skip
        unets.append([(tmp_path / f"{name}.safetensors").read_bytes(), find(str(tmp_path / name)).fingerprint])
    assert unets[0] == unets[1]
    assert unets[0][0] != unets[2][0] and unets[0][1] != unets[2][1]


def test_erase_without_a_mask_computes_the_one_that_mask_writes(made, tmp_path):
    cli.run(erase("--batch-size", "8", "--density", "0.1", "--out", str(tmp_path / "erased")))
    assert (tmp_path / "erased" / "mask.safetensors").read_bytes() == (made / "m-0.1.safetensors").read_bytes()


@pytest.mark.parametrize(("spec", "share"), [("random:0.2", 0.2), ("none", 1.0)])
def test_the_controls(tmp_path, spec, share):
    cli.run([*ERASE, "--mask", spec, "--anchor-from", "base", "--out", str(tmp_path / "erased")])
    record = json.loads((tmp_path / "erased" / "salun.json").read_text())
    assert record["mask"]["kept"] == round(share * record["mask"]["of"]) and record["changed"]["outside"] == 0


def test_folders_of_images_to_forget_and_to_retain(tmp_path):
    for name in ("forget", "retain"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(photos.astronaut()[i * 50 :]).save(tmp_path / name / f"{i}.png")
    folders = ["--forget", str(tmp_path / "forget"), "--retain", str(tmp_path / "retain")]
    cli.run(["erase", "pocket", "--concept", CONCEPT, "--anchor", ANCHOR, *folders, "--batch-size", "2",
             "--out", str(tmp_path / "erased")])  # fmt: skip
    record = json.loads((tmp_path / "erased" / "salun.json").read_text())
    assert record["images"] == {"forget": 3, "retain": 3} and record["settings"]["steps"] == 2  # one pass


def test_a_gate_ends_with_3_once_everything_is_written(made, few, tmp_path, capsys):
    images = ["evaluate", "--images", str(made / "audit" / "images"), "--prompts", str(few), "--concept", "sneaker"]
    argv = [*images, "--out", str(tmp_path / "a")]
    said = fails([*argv, "--fail-if", "flag_rate > 0.1", "--fail-if", "ra <= 1 + 0 * ua.sneaker"], 3, capsys)
    assert said.startswith("Failed: ra <= 1 + 0 * ua.sneaker: ra is ") and "ua.sneaker" not in said.split(": ", 2)[2]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert [entry["holds"] for entry in report["gate"]] == [True, False]
    assert "**failed**" in (tmp_path / "a" / "report.md").read_text() and (tmp_path / "a" / "report.html").is_file()
    cli.run([*argv, "--fail-if", "flag_rate > 0.1"])
    assert "Failed" not in capsys.readouterr().err
    said = fails([*argv, "--fail-if", "flag_rate > 0.1", "--confident"], 3, capsys)
    assert "flag_rate is 0 [0, 0.242494], judged at 0.242494" in said  # 12 images are too few to know
    cli.run(argv)
    assert json.loads((tmp_path / "a" / "report.json").read_text())["gate"] is None


def test_a_bound_that_is_none_is_said_before_anything_is_drawn(few, tmp_path, capsys):
    argv = ["evaluate", "pocket", "--prompts", few, "--concept", "sneaker", "--out", tmp_path / "a"]
    assert "there is no ua.boat. There are ua.sneaker;" in fails([*argv, "--fail-if", "ua.boat < 1"], 2, capsys)
    assert "against.ra is measured with --against" in fails([*argv, "--fail-if", "ra < against.ra"], 2, capsys)
    unloaded = [*argv, "--classifier", "nowhere", "--fail-if", "flag_rat < 1"]  # which takes long where it is somewhere
    assert "there is no flag_rat" in fails(unloaded, 2, capsys)
    assert "--confident is for --fail-if" in fails([*argv, "--confident"], 2, capsys)
    assert list(tmp_path.iterdir()) == []


def test_audits_are_compared_on_the_terminal_and_in_files(made, few, tmp_path, capsys, monkeypatch):
    images = ["evaluate", "--images", str(made / "audit" / "against" / "images"), "--prompts", str(few)]
    cli.run([*images, "--concept", "sneaker", "--out", str(tmp_path / "base")])
    capsys.readouterr()
    audits = [str(made / "audit"), str(tmp_path / "base" / "report.json")]
    monkeypatch.setenv("COLUMNS", "200")
    cli.run(["compare", *audits])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{few}\nNot the same: scheduler: ") and "base: pocket" in shown and "ra: p" in shown
    for suffix in (".md", ".csv", ".json"):
        cli.run(["compare", *audits, "--out", str(tmp_path / f"both{suffix}")])
        assert (tmp_path / f"both{suffix}").stat().st_size > 500
    assert "ends in none of .md, .csv, .json" in fails(["compare", *audits, "--out", "x.txt"], 2, capsys)
    assert "There is no" in fails(["compare", audits[0], tmp_path / "nowhere"], 2, capsys)


def test_a_folder_of_images_some_other_program_made(made, few, tmp_path, capsys):
    shutil.copytree(made / "audit" / "images", tmp_path / "images")
    Image.fromarray(photos.astronaut()).save(tmp_path / "images" / "0_0.png")
    audit = ["evaluate", "--images", str(tmp_path / "images"), "--prompts", str(few), "--concept", "sneaker",
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
    assert "has no 100_0.png (1 of 12 images missing)" in fails(audit, 1, capsys)
    (tmp_path / "images" / "cover.png").write_bytes(b"")
    assert "cover.png is of no prompt" in fails(audit, 1, capsys)


def test_bad_input_is_named_before_anything_is_written(made, tmp_path, capsys):
    out, saved = ["--out", tmp_path / "out"], ["--out", tmp_path / "out.safetensors"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes((made / "m-0.1.safetensors").read_bytes()[:-1])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "m.safetensors").write_text("")
    shutil.copytree(made / "audit" / "images", tmp_path / "broken")
    (tmp_path / "broken" / "torn.png").write_bytes(b"\x89PNG")
    (tmp_path / "short.csv").write_text("case_number,prompt\n0,a\n")
    (tmp_path / "odd.csv").write_text("case_number,prompt,evaluation_seed,evaluation_guidance\n0,a,x,7\n")
    masked = [*ERASE, *out, "--mask"]
    for argv, code, said in [
        (["mask", "nowhere", "--concept", CONCEPT, *out], 2, "Model nowhere was not found"),
        ([*MASK, "--density", "1.5", *saved], 2, "Density 1.5 is outside (0, 1]"),
        ([*MASK, "--density", "0", *saved], 2, "Density 0 is outside (0, 1]"),
        ([*MASK, "--density", "0.5", "--density", "0.5", *out], 2, "given twice"),
        ([*MASK, "--forget", tmp_path / "empty", *saved], 2, "holds no images"),
        ([*MASK, "--out", tmp_path / "taken" / "m.safetensors"], 2, "is not a mask of salun-sd; choose another --out"),
        ([*ERASE[:4], "--anchor", "A photo of  a sneaker", *out], 2, "and the anchor are both"),
        ([*ERASE, "--concept", "a coat", *out], 2, "--concept 'a coat' has no --anchor"),
        ([*ERASE, "--out", tmp_path / "taken"], 2, "taken holds something else: choose another --out"),
        (erase("--lr", "2e-4", "--out", made / "erased"), 2, "erased with other settings"),
        (erase("--lr", "1e38", *out), 2, "--lr is 1e+38: give a finite number above 0, at most 1"),
        ([*ERASE, "--clip", "0", *out], 2, "--clip is 0: give a finite number above 0"),
        ([*MASK, "--guidance", "nan", *out], 2, "--guidance is nan: give a finite number from 0 on"),
        ([*MASK[:2], "--concept", " ", *out], 2, "--concept is empty"),
        ([*MASK[:2], *out], 2, "There is nothing to erase: give --concept with --anchor, or --plan"),
        ([*ERASE, "--retain-weight", "nan", *out], 2, "--retain-weight is nan"),
        ([*ERASE, "--forget", tmp_path / "broken", *out], 1, "torn.png cannot be read as an image"),
        (erase("--samples", "9999", "--retain", tmp_path / "broken", *out), 1, "torn.png cannot be read"),
        ([*ERASE, "--forget", "here", "--forget", "there", *out], 2, "--forget is given twice: give it once"),
        ([*MASK, "--out", tmp_path / "mask"], 2, "has to end in .safetensors"),
        ([*ERASE, "--mask", "none", "--density", "0.1", *out], 2, "leave them out with --mask"),
        (["mask", tmp_path / "taken", "--concept", CONCEPT, *out], 2, "is not a Stable Diffusion pipeline folder"),
        (["evaluate", "pocket", "--prompts", tmp_path / "short.csv", *out], 1, "has no column evaluation_seed"),
        (["evaluate", "pocket", "--prompts", tmp_path / "odd.csv", *out], 1, "odd.csv, line 2: evaluation_seed is 'x'"),
        ([*ERASE, "--retain", tmp_path / "empty", *out], 2, "holds no images"),
        ([*ERASE, "--retain-prompts", "nowhere", *out], 2, "no prompt set or file nowhere"),
        ([*ERASE, "--retain", made, "--retain-prompts", "pocket", *out], 2, "cannot go together"),
        ([*masked, "nowhere"], 2, "Mask nowhere was not found"),
        ([*masked, "random:x"], 2, "random:x has no density"),
        ([*masked, "random:2"], 2, "Density 2 is outside"),
        ([*masked, tmp_path / "cut.safetensors"], 1, "cut.safetensors is not a salun-sd mask, or it is truncated"),
        (["erase", made / "erased", *masked[2:], made / "m-0.1.safetensors"], 1, "The mask was made for a UNet with"),
        (erase("--lr", "1", *out), 1, "The loss exploded at step"),
        (["evaluate", "--prompts", "pocket", *out], 2, "Give either a MODEL"),
        (["evaluate", "pocket", "--prompts", "pocket", "--against", "nowhere", *out], 2, "Model nowhere was not found"),
        (["evaluate", "pocket", "--prompts", "nowhere.csv", *out], 2, "no prompt set or file nowhere.csv"),
        (["evaluate", "pocket", "--prompts", "pocket", "--concept", "cat", *out], 2, "--concept cat is no class"),
        (["evaluate", "pocket", "--prompts", "pocket", "--out", tmp_path / "taken"], 2, "not of an audit"),
        (["evaluate", "pocket", "--prompts", "people", "--classifier", "x", *out], 2, "has nothing to judge"),
        (["evaluate", "pocket", "--prompts", "pocket", "--classifier", tmp_path, *out], 1, "No image classifier"),
        (["demo", "--concept", "cat", *out], 2, "The pocket checkpoint knows no cat; it knows t-shirt, trouser"),
        (["demo", "--concept", "bag", *out], 2, "Concept and anchor are both bag"),
    ]:  # fmt: skip
        assert said in fails(argv, code, capsys), argv
        assert not [p for p in tmp_path.iterdir() if p.stem == "out"], argv
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_a_dry_run_says_the_settings_and_the_memory_and_writes_nothing(tmp_path, monkeypatch, capsys):
    argv = [*ERASE, "--density", "0.1", "--out", str(tmp_path / "out"), "--dry-run"]
    cli.run(argv)
    said = capsys.readouterr().out
    for line in (r"batch_size +4", r"memory, mask +GiB", r"salient weights and their moments +0.01", "It fits: "):
        assert re.search(line, said), line
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=30_000_000))
    cli.run(argv)
    said = capsys.readouterr().out
    assert "It does not fit: 0.03 GiB are free" in said and re.search(r"with --\w+.*: 0\.\d\d GiB", said)
    cli.run([*MASK, "--out", str(tmp_path / "m.safetensors"), "--dry-run"])
    assert "sums of the gradients" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_a_mask_of_other_concepts_is_taken_and_said(made, tmp_path, capsys):
    argv = ["erase", "pocket", "--concept", "a photo of a coat", *ERASE[4:], "--mask", made / "m-0.1.safetensors"]
    cli.run([str(a) for a in (*argv, "--out", tmp_path / "out")])
    assert "m-0.1.safetensors was made for 'a photo of a sneaker', not for these concepts" in capsys.readouterr().err


def test_a_file_that_was_erased_from_pocket_opens_without_a_config(tmp_path):
    file = str(tmp_path / "out.safetensors")
    cli.run([*ERASE, "--mask", "random:0.1", "--format", "single-file", "--out", file])
    found = find(file)
    assert found.config == POCKET_FOLDER and found.fingerprint != POCKET.fingerprint
    assert find(file, config="pocket").identity == found.identity


def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_goes_on(made, few, tmp_path):
    process = spawn(erase("--steps", "1000", "--out", tmp_path / "erased"))
    said = interrupt(process, (tmp_path / "erased.state" / "losses.jsonl").is_file)
    assert process.returncode == 130 and said.startswith("Interrupted after step")
    assert [p.name for p in tmp_path.iterdir()] == ["erased.state"]

    audit = [
        "evaluate",
        made / "erased",
        "--prompts",
        few,
        "--samples-per-prompt",
        "6",
        "--steps",
        "3",
        "--out",
        tmp_path / "a",
    ]
    process = spawn(audit)
    interrupt(process, lambda: len(list((tmp_path / "a" / "images").glob("*.png"))) > 3)
    assert process.returncode == 130 and not (tmp_path / "a" / "report.json").exists()
    assert 3 < len(list((tmp_path / "a" / "images").glob("*.png"))) < 72
    cli.run([str(a) for a in audit])
    for name in ("0_0.png", "700_0.png"):  # and what was drawn before or after the interruption is the same
        assert (tmp_path / "a/images" / name).read_bytes() == (made / "audit/images" / name).read_bytes()
    assert len(list((tmp_path / "a" / "images").glob("*"))) == 72


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_said_and_leaves_nothing(made, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same way."""

    for argv, name, most in (
        ([*ERASE, "--mask", "none"], "erased", 2**21),
        (MASK, "mask.safetensors", 2**16),
    ):
        limit = (resource.RLIMIT_FSIZE, (most, most))
        process = spawn([*argv, "--out", tmp_path / name], preexec_fn=partial(resource.setrlimit, *limit))
        said = process.communicate(timeout=120)[1].strip().splitlines()[-1]
        assert process.returncode == 1 and "File too large" in said, said
        assert list(tmp_path.iterdir()) == []


def test_an_error_is_a_sentence_unless_a_traceback_is_asked_for(monkeypatch, capsys):
    assert fails(["mask", "nowhere", "--concept", "x"], 2, capsys).startswith("Error: Model nowhere")
    monkeypatch.setenv("SALUN_SD_DEBUG", "1")
    with pytest.raises(Exception, match="nowhere was not found"):
        cli.run(["mask", "nowhere", "--concept", "x"])
