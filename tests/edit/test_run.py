"""Whole runs of `mask` and `erase` on a small model with random weights."""

import json
import re
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.commands import ANCHOR, CONCEPT, fails, files_in
from helpers.runs import PAIR, SHORT, erased_fingerprint, record_of, write_photographs
from PIL import Image

import salun_sd
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.provenance import run_folder
from salun_sd.cli import app as cli
from salun_sd.draw.generate import PROVENANCE
from salun_sd.edit import maskfile

UNET = "unet/diffusion_pytorch_model.safetensors"
COAT, DRESS = "a photo of a coat", "a photo of a dress"
TWO = [*PAIR, "--concept", COAT, "--anchor", DRESS]
FEW = ["--samples", "2"]


@pytest.fixture(scope="module")
def masks(tiny, tmp_path_factory):
    """Two masks of the sneaker: m-0.5.safetensors and m-0.1.safetensors."""
    folder = tmp_path_factory.mktemp("masks")
    cli.run(["mask", tiny, "--concept", CONCEPT, *FEW, "--density", "0.5", "--density", "0.1",
             "--out", str(folder / "m.safetensors")])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Two concepts erased in one run."""
    out = tmp_path_factory.mktemp("two") / "erased"
    cli.run(["erase", tiny, *TWO, "--samples", "4", "--density", "0.1", *SHORT, "--out", str(out)])
    return out


# Concepts and plans


def test_several_concepts_are_one_mask_and_one_run(two):
    record = record_of(two)
    assert [(c["prompt"], c["anchor"]) for c in record["concepts"]] == [(CONCEPT, ANCHOR), (COAT, DRESS)]
    assert record["images"] == {"forget": 8, "retain": 4} and record["settings"]["steps"] == 2
    kept = maskfile.read(run_folder(two) / "mask.safetensors")
    assert kept.settings["concepts"] == [CONCEPT, COAT] and kept.settings["images"] == 8


def test_a_plan_is_the_same_run_as_its_options_and_as_the_function_and_what_is_typed_comes_first(tiny, two, tmp_path):
    plan = tmp_path / "two.toml"
    plan.write_text(
        "\n".join(f'[[concept]]\nprompt = "{c}"\nanchor = "{a}"' for c, a in ((CONCEPT, ANCHOR), (COAT, DRESS)))
        + "\n[settings]\nsamples = 4\ndensity = 0.1\nsteps = 2\nbatch_size = 4\nlr = 1.0\n"
    )
    cli.run(["erase", tiny, "--plan", str(plan), "--lr", "1e-4", "--out", str(tmp_path / "planned")])
    record = salun_sd.erase(tiny, **salun_sd.plan(str(plan)) | {"lr": 1e-4}, out=tmp_path / "called")
    assert erased_fingerprint(tmp_path / "planned") == record["erased"]["fingerprint"] == erased_fingerprint(two)
    same = [{**record_of(place), "command": "", "data": ""} for place in (tmp_path / "planned", tmp_path / "called")]
    assert same[0] == same[1] and same[0]["settings"] == record_of(two)["settings"]


def test_a_plan_with_synonyms_and_texts_to_retain(tiny, tmp_path):
    (tmp_path / "plan.toml").write_text(
        f'[[concept]]\nprompt = "{CONCEPT}"\nsynonyms = ["a sneaker"]\nanchor = "{ANCHOR}"\n'
        f'[retain]\nprompts = ["{COAT}", "{DRESS}"]\n[settings]\nsamples = 4\n'
    )
    argv = ["erase", tiny, "--plan", str(tmp_path / "plan.toml"), "--mask", "none", *SHORT, "--out"]
    cli.run([*argv, str(tmp_path / "erased")])
    record = record_of(tmp_path / "erased")
    assert record["concepts"][0]["synonyms"] == ["a sneaker"] and record["images"] == {"forget": 4, "retain": 4}
    assert DRESS in record["data"]["retain"]
    before = {file: (tmp_path / "erased" / file).stat().st_mtime_ns for file in files_in(tmp_path / "erased")}
    cli.run([*argv, str(tmp_path / "erased")])  # nothing to do
    assert before == {file: (tmp_path / "erased" / file).stat().st_mtime_ns for file in files_in(tmp_path / "erased")}
    photographs = write_photographs(tmp_path / "photographs")
    cli.run([*argv, str(tmp_path / "other"), "--retain", str(photographs)])  # typed: comes before the plan's
    assert record_of(tmp_path / "other")["images"]["retain"] == 3


# Masks


def test_same_command_same_bytes_and_other_seed_other_bytes(tiny, tmp_path):
    made = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        cli.run(["erase", tiny, *PAIR, *FEW, *SHORT, "--seed", seed, "--out", str(tmp_path / name)])
        made.append([(tmp_path / file).read_bytes() for file in (f"{name}.run/mask.safetensors", f"{name}/{UNET}")])
    assert made[0] == made[1] and all(a != c for a, c in zip(made[0], made[2], strict=True))


def test_erase_without_a_mask_computes_the_one_that_mask_writes(tiny, masks, tmp_path):
    argv = ["erase", tiny, *PAIR, *FEW, "--density", "0.1", "--batch-size", "8", "--out", str(tmp_path / "erased")]
    cli.run(argv)
    assert (tmp_path / "erased.run" / "mask.safetensors").read_bytes() == (masks / "m-0.1.safetensors").read_bytes()
    assert record_of(tmp_path / "erased")["settings"]["steps"] == 1  # one pass over the images


@pytest.mark.parametrize(("spec", "share"), [("random:0.2", 0.2), ("none", 1.0)])
def test_the_controls(tiny, tmp_path, spec, share):
    cli.run(["erase", tiny, *PAIR, *FEW, *SHORT, "--retain-prompts", "pocket", "--mask", spec, "--anchor-from", "base",
             "--out", str(tmp_path / "e")])  # fmt: skip
    record = record_of(tmp_path / "e")
    assert record["mask"]["kept"] == round(share * record["mask"]["of"])
    assert record["changed"]["outside"] == 0 < record["changed"]["inside"]


def test_a_mask_of_other_concepts_is_taken_and_said(tiny, masks, tmp_path, capsys):
    argv = ["erase", tiny, "--concept", COAT, "--anchor", DRESS, *FEW, *SHORT, "--out", str(tmp_path / "out"), "--mask"]
    cli.run([*argv, str(masks / "m-0.1.safetensors")])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "m-0.1.safetensors" in line]
    assert repr(CONCEPT) in line
    assert (tmp_path / "out.run" / "mask.safetensors").read_bytes() == (masks / "m-0.1.safetensors").read_bytes()


# Results that are there already


def test_a_run_with_another_mask_under_the_same_name_is_not_taken_for_the_finished_one(tiny, masks, tmp_path, capsys):
    file, erased = tmp_path / "m.safetensors", tmp_path / "erased"
    argv = ["erase", tiny, *PAIR, *FEW, *SHORT, "--mask", str(file), "--out", str(erased)]
    shutil.copy(masks / "m-0.1.safetensors", file)
    cli.run(argv)
    made = (erased / UNET).read_bytes()
    shutil.copy(masks / "m-0.5.safetensors", file)
    assert str(erased) in fails(argv, 2, capsys)
    assert (erased / UNET).read_bytes() == made
    shutil.copy(masks / "m-0.1.safetensors", file)
    cli.run(argv)  # nothing to do


def test_a_finished_folder_that_was_damaged_since_is_not_taken_for_done(tiny, two, tmp_path, capsys):
    erased = shutil.copytree(two, tmp_path / "erased")
    argv = ["erase", tiny, *TWO, "--samples", "4", "--density", "0.1", *SHORT, "--out", erased]
    cli.run([str(word) for word in argv])  # nothing to do
    (erased / UNET).unlink()
    assert "diffusion_pytorch_model.safetensors" in fails(argv, 1, capsys)
    shutil.copy(f"{tiny}/{UNET}", erased / "unet")
    assert str(erased) in fails(argv, 1, capsys)
    assert (erased / UNET).read_bytes() == find(tiny).path.joinpath(UNET).read_bytes()  # it was left as it is


def test_an_erasure_of_an_erased_checkpoint_knows_both(two, tmp_path):
    cli.run(["erase", str(two), *PAIR, "--mask", "none", *FEW, *SHORT, "--out", str(tmp_path / "again")])
    record = record_of(tmp_path / "again")
    assert [c["prompt"] for c in record["base"]["record"]["concepts"]] == [CONCEPT, COAT]
    assert record["base"]["fingerprint"] == erased_fingerprint(two)


# What a run is given and what it leaves beside its result


def test_folders_of_images_to_forget_and_to_retain(tiny, tmp_path):
    folders = [write_photographs(tmp_path / "forget"), write_photographs(tmp_path / "retain", 2)]
    cli.run(["erase", tiny, *PAIR, "--forget", str(folders[0]), "--retain", str(folders[1]), "--mask", "none",
             "--batch-size", "2", "--out", str(tmp_path / "erased")])  # fmt: skip
    record = record_of(tmp_path / "erased")
    assert record["images"] == {"forget": 3, "retain": 2} and record["settings"]["steps"] == 2  # one pass


def test_strips_are_drawn_where_the_mask_is_computed_first(tiny, tmp_path):
    cli.run(["erase", tiny, *PAIR, *FEW, *SHORT, "--sample-every", "2", "--out", str(tmp_path / "e")])
    assert {file for file in files_in(tmp_path / "e.run") if file.startswith("samples/")} == {
        "samples/step-00000.png", "samples/step-00002.png"}  # fmt: skip
    lines = (tmp_path / "e.run" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize(
    ("dtype", "trained_in"), [("bfloat16", "bfloat16"), pytest.param("float16", "float32", marks=pytest.mark.slow)]
)
def test_a_dtype_is_that_of_the_images_too_and_gradients_are_never_in_float16(
    tiny, tmp_path, monkeypatch, dtype, trained_in
):  # fmt: skip
    cache = tmp_path / "cache"
    monkeypatch.setenv("SALUN_SD_CACHE", str(cache))
    for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    cli.run(["erase", tiny, *PAIR, *SHORT, *FEW, "--dtype", dtype, "--out", str(tmp_path / "e")])
    settings, images = record_of(tmp_path / "e")["settings"], [*cache.rglob("*.png")]
    assert (settings["dtype"], settings["drawn_in"], len(images)) == (trained_in, dtype, 4)
    for file in images:
        with Image.open(file) as image:
            assert f" dtype={dtype} " in image.info[PROVENANCE]


def test_a_dry_run_says_the_settings_and_the_memory_and_writes_nothing(tiny, tmp_path, monkeypatch, capsys):
    cli.run(["erase", tiny, *PAIR, *SHORT, "--density", "0.1", "--out", str(tmp_path / "out"), "--dry-run"])
    shown = capsys.readouterr().out
    for line in (r"batch_size +4", r"saliency_guidance +7.5", r"memory, mask +GiB", r"memory, erase +GiB"):
        assert re.search(line, shown), line
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    argv = ["mask", tiny, "--concept", CONCEPT, "--batch-size", "2", "--dtype", "float32"]
    cli.run([*argv, "--out", str(tmp_path / "m.safetensors"), "--dry-run"])
    shown = capsys.readouterr().out
    assert "0.00 GiB" in shown and re.search(r"(?m)^with --.*: \d+\.\d\d GiB", shown)
    assert list(tmp_path.iterdir()) == []
