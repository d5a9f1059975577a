"""Real data, plans, several concepts and the cache, as a person uses them, on a small model with random weights."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.commands import ERASE as OF_POCKET
from helpers.commands import fails
from huggingface_hub import ModelCard
from PIL import Image
from skimage import data as photos

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.cli import app as cli
from salun_sd.draw import generate, prompts
from salun_sd.draw import kept as drawn
from salun_sd.edit import maskfile, training_data
from salun_sd.runtime import cache

SETTINGS = ["--steps", "2", "--batch-size", "4", "--lr", "1e-4"]
ERASE = OF_POCKET[2:]  # without the command and the model
TWO = ["--concept", "a photo of a sneaker", "--anchor", "a photo of a bag",
       "--concept", "a photo of a coat", "--anchor", "a photo of a dress"]  # fmt: skip


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photo_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(photos.astronaut()[i * 50 :]).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def record_of(folder):
    return json.loads((folder / "salun.json").read_text())


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Two concepts erased in one run, audited, the audit recorded."""
    out = tmp_path_factory.mktemp("two")
    cli.run(["erase", tiny, *TWO, "--samples", "4", "--density", "0.1", *SETTINGS, "--out", str(out / "erased")])
    rows = [p for i, p in enumerate(prompts.read("pocket")) if i % 50 == 0]
    (out / "few.csv").write_text(prompts.write(rows))
    cli.run(["evaluate", str(out / "erased"), "--prompts", str(out / "few.csv"), "--against", tiny, "--steps", "2",
             "--record", "--out", str(out / "audit")])  # fmt: skip
    return out


def test_several_concepts_are_one_mask_one_run_and_each_is_reported_by_itself(tiny, two):
    record = record_of(two / "erased")
    assert [(c["prompt"], c["anchor"]) for c in record["concepts"]] == [tuple(TWO[1:4:2]), tuple(TWO[5:8:2])]
    assert record["images"]["forget"] == 8 and record["settings"]["steps"] == 2
    kept = maskfile.unpack((two / "erased" / "mask.safetensors").read_bytes(), "")
    assert kept.settings["concepts"] == [TWO[1], TWO[5]] and kept.settings["images"] == 8
    report = json.loads((two / "audit" / "report.json").read_text())
    assert report["settings"]["concepts"] == ["sneaker", "coat"]
    assert {name: c["ua"]["of"] for name, c in report["concepts"].items()} == {"sneaker": 2, "coat": 2}
    assert report["metrics"]["ua"]["of"] == 4 and report["metrics"]["ra"]["of"] == 16


def test_a_recorded_audit_is_in_the_record_and_in_the_card(tiny, two):
    [audit] = record_of(two / "erased")["audits"].values()
    report = json.loads((two / "audit" / "report.json").read_text())
    ra = report["metrics"]["ra"]
    assert audit["metrics"]["ra"].startswith(f"{ra['n']} / {ra['of']} = ") and audit["images"] == 20
    card = ModelCard.load(two / "erased" / "README.md")
    assert audit["metrics"]["ua of coat"] in card.text and card.data.pipeline_tag == "text-to-image"
    table = card.text[card.text.index("| metric |") :].split("\n\n")[0].splitlines()  # lines on end, or it is no table
    named = [line.split("|")[1].strip() for line in table[2:]]
    assert named == ["ua", "ra", "flag\\_rate", "ua of sneaker", "ua of coat"]
    assert len({line.count("|") for line in table}) == 1 and table[1] == "| --- | --- | --- |"
    told = card.text.partition("## Audit on ")[2].splitlines()[2]
    assert told.startswith(f"{report['metrics']['ua']['n']} of 4 images asked for as “sneaker” and “coat”")
    assert told == audit["headline"]


def test_recording_again_replaces_the_audit_of_the_same_prompts(two, tmp_path):
    shutil.copytree(two / "erased", tmp_path / "erased")
    argv = ["evaluate", str(tmp_path / "erased"), "--prompts", str(two / "few.csv"), "--steps", "1", "--record"]
    for name, more in (("one", []), ("other", ["--where", "class=coat"])):
        cli.run([*argv, *more, "--out", str(tmp_path / name)])
    audits = record_of(tmp_path / "erased")["audits"]
    assert list(audits) == [str(two / "few.csv"), f"{two / 'few.csv'} where class=coat"]
    assert audits[str(two / "few.csv")]["sampling"]["steps"] == 1 and audits[str(two / "few.csv")]["against"] is None
    card = (tmp_path / "erased" / "README.md").read_text()
    assert card.count("## Audit on ") == 2 and card.count("1 denoising steps") == 2


def test_an_audit_of_weights_that_changed_since_is_not_recorded(tiny, two, tmp_path, capsys):
    shutil.copytree(two / "erased", tmp_path / "erased")
    shutil.copytree(f"{tiny}/unet", tmp_path / "erased" / "unet", dirs_exist_ok=True)
    argv = ["evaluate", tmp_path / "erased", "--prompts", "pocket", "--record", "--out", tmp_path / "a"]
    assert "is not the one that its record names" in fails(argv, 1, capsys)


def test_a_recorded_audit_of_a_single_file_leaves_its_tensors_alone(tiny, tmp_path):
    file = tmp_path / "erased.safetensors"
    cli.run(["erase", tiny, *ERASE, "--mask", "random:0.1", "--format", "single-file", "--out", str(file)])
    before = find(str(file), config=tiny).fingerprint
    (tmp_path / "few.csv").write_text(prompts.write(prompts.read("pocket")[:2]))
    cli.run(["evaluate", str(file), "--config", tiny, "--prompts", str(tmp_path / "few.csv"),
             "--steps", "1", "--record", "--out", str(tmp_path / "audit")])  # fmt: skip
    assert find(str(file), config=tiny).fingerprint == before
    audits = json.loads(tensors.read(file)[1]["salun_sd"])["audits"]
    assert audits[str(tmp_path / "few.csv")]["images"] == 2 and audits == record_of(tmp_path / "erased.run")["audits"]


def test_an_audit_is_not_recorded_where_there_is_no_record(tiny, tmp_path, capsys):
    argv = ["evaluate", tiny, "--prompts", "pocket", "--record", "--out", tmp_path / "a"]
    assert "--record is for a checkpoint that salun-sd erased" in fails(argv, 2, capsys)


def test_a_plan_is_the_same_run_as_its_options_and_typed_options_come_first(tiny, tmp_path, two, capsys):
    (tmp_path / "two.toml").write_text(
        "\n".join(f'[[concept]]\nprompt = "{c}"\nanchor = "{a}"' for c, a in zip(TWO[1::4], TWO[3::4], strict=True))
        + "\n[settings]\nsamples = 4\ndensity = 0.1\nsteps = 2\nbatch_size = 4\nlr = 1.0\n"
    )
    plan = ["erase", tiny, "--plan", str(tmp_path / "two.toml"), "--lr", "1e-4"]
    cli.run([*plan, "--out", str(tmp_path / "erased")])
    fingerprints = [record_of(folder)["erased"]["fingerprint"] for folder in (tmp_path / "erased", two / "erased")]
    assert fingerprints[0] == fingerprints[1]
    assert "--plan and --concept cannot go together" in fails([*plan, *TWO, "--out", tmp_path / "x"], 2, capsys)
    (tmp_path / "bad.toml").write_text('[[concept]]\nprompt = "x"\n')
    bad = ["erase", tiny, "--plan", tmp_path / "bad.toml", "--out", tmp_path / "x"]
    assert "has no anchor" in fails(bad, 1, capsys)
    (tmp_path / "bad.toml").write_text('[[concept]]\nprompt = "x"\nanchor = "y"\n[settings]\nepochs = 5\n')
    assert "settings.epochs is not known" in fails(bad, 1, capsys)
    assert not (tmp_path / "x").exists()


def test_a_plan_with_synonyms_and_retain_prompts(tiny, tmp_path, photo_folder, capsys):
    (tmp_path / "plan.toml").write_text(
        '[[concept]]\nprompt = "a photo of a sneaker"\nsynonyms = ["a sneaker"]\nanchor = "a photo of a bag"\n'
        '[retain]\nprompts = ["a photo of a coat", "a photo of a dress"]\n[settings]\nsamples = 4\n'
    )
    argv = ["erase", tiny, "--plan", str(tmp_path / "plan.toml"), "--mask", "none", *SETTINGS,
            "--out", str(tmp_path / "erased")]  # fmt: skip
    cli.run(argv)
    (tmp_path / "erased" / "run.json").unlink()
    capsys.readouterr()
    cli.run(argv)
    assert "nothing to do" in capsys.readouterr().err
    record = record_of(tmp_path / "erased")
    assert record["concepts"][0]["synonyms"] == ["a sneaker"] and record["images"] == {"forget": 4, "retain": 4}
    assert "a photo of a dress" in record["data"]["retain"]
    cli.run([*argv[:-1], str(tmp_path / "other"), "--retain", str(photo_folder)])  # typed: comes before the plan's
    assert record_of(tmp_path / "other")["images"]["retain"] == 3


def test_strips_are_drawn_where_the_mask_is_computed_first(tiny, tmp_path):
    argv = ["erase", tiny, *ERASE[:4], "--samples", "2", *SETTINGS, "--sample-every", "2", "--out", str(tmp_path / "e")]
    cli.run(argv)
    assert [f.name for f in sorted((tmp_path / "e" / "samples").iterdir())] == ["step-00000.png", "step-00002.png"]


def test_an_erasure_of_an_erased_checkpoint_knows_both(tiny, two, tmp_path):
    cli.run(["erase", str(two / "erased"), *ERASE[:4], "--mask", "none", "--samples", "2", *SETTINGS,
             "--out", str(tmp_path / "again")])  # fmt: skip
    before = record_of(tmp_path / "again")["base"]["record"]
    assert [c["prompt"] for c in before["concepts"]] == [TWO[1], TWO[5]]


def test_captions_are_read_and_another_caption_is_another_run(tiny, tmp_path, photo_folder, capsys):
    argv = ["erase", tiny, *ERASE[:4], "--mask", "random:0.1", "--forget", str(photo_folder),
            "--retain", str(photo_folder), "--retain-caption", "a photo", *SETTINGS]  # fmt: skip
    cli.run([*argv, "--out", str(tmp_path / "plain")])
    (photo_folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a photo of a coat"}\n')
    assert "erased with other settings or inputs" in fails([*argv, "--out", tmp_path / "plain"], 2, capsys)
    cli.run([*argv, "--out", str(tmp_path / "captioned")])
    one, other = (record_of(tmp_path / name)["erased"]["fingerprint"] for name in ("plain", "captioned"))
    assert one != other
    (photo_folder / "1.txt").write_text("a coat")
    assert "1.png" in fails([*argv, "--out", tmp_path / "x"], 1, capsys)  # two captions for one image


def test_a_data_set_with_labels(tiny, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(photos.astronaut()[i * 40 :]) for i in range(4)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["church", "tench"]))
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features=features)
    rows.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    argv = ["erase", tiny, "--concept", "an image of a church", "--anchor", "an image of a tench",
            "--forget", f"{tmp_path / 'set'}:label=church", "--retain", f"{tmp_path / 'set'}:label!=church",
            "--retain-caption", "an image of a {label}", "--mask", "random:0.1", *SETTINGS]  # fmt: skip
    cli.run([*argv, "--out", str(tmp_path / "erased")])
    assert record_of(tmp_path / "erased")["images"] == {"forget": 2, "retain": 2}
    argv[argv.index("--forget") + 1] = f"{tmp_path / 'set'}:label=horn"
    assert "church, tench" in fails([*argv, "--out", tmp_path / "x"], 2, capsys)


def test_a_second_run_draws_and_encodes_nothing_and_needs_no_vae(tiny, own_cache, tmp_path, monkeypatch):
    argv = ["erase", tiny, *ERASE[:4], "--mask", "random:0.1", "--samples", "4", *SETTINGS]
    cli.run([*argv, "--out", str(tmp_path / "first")])
    drawn = {f: f.stat().st_mtime_ns for f in own_cache.rglob("*.png")}
    assert len(drawn) == 8 and len(list(own_cache.rglob("encoded.safetensors"))) == 2
    loaded, real = [], load_pipeline

    def load(model, **parts):
        loaded.append(parts)
        return real(model, **parts)

    monkeypatch.setattr(training_data, "load_pipeline", load)
    cli.run([*argv, "--out", str(tmp_path / "second")])
    assert loaded == [] and drawn == {f: f.stat().st_mtime_ns for f in own_cache.rglob("*.png")}
    names = ("first", "second")
    assert len({record_of(tmp_path / name)["erased"]["fingerprint"] for name in names}) == 1


def test_the_cache_is_shown_cleared_and_named_when_it_cannot_be_written(tiny, own_cache, tmp_path, monkeypatch, capsys):
    argv = ["erase", tiny, *ERASE[:4], "--mask", "random:0.1", "--samples", "2", *SETTINGS]
    cli.run([*argv, "--out", str(tmp_path / "first")])
    capsys.readouterr()
    cli.run(["cache"])
    shown = capsys.readouterr().out
    assert shown.count("encoded") == 2 and "drawn" in shown and str(own_cache) in shown
    assert "2 images at 32 pixels" in shown
    cli.run(["cache", "--clear"])
    assert "removed 6 files" in capsys.readouterr().out and not list(own_cache.rglob("*.png"))
    assert "--older-than is for --clear" in fails(["cache", "--older-than", "3"], 2, capsys)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "file" / "cache"))
    said = fails([*argv, "--out", tmp_path / "second"], 1, capsys)
    assert "cannot be written" in said and "set SALUN_SD_CACHE to another folder" in said
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
def test_a_second_run_on_the_same_cache_waits_for_the_first(tiny, own_cache, tmp_path):
    base = find(tiny)
    argv = [sys.executable, "-m", "salun_sd", "erase", tiny, *ERASE[:4], "--mask", "random:0.1", "--samples", "2",
            *SETTINGS, "--out", str(tmp_path / "out")]  # fmt: skip
    with cache.held("drawn", drawn.key_of(base, base.scheduler, base.sampling[0])) as folder:
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=os.environ)
        while "waiting for it" not in (line := process.stderr.readline()):
            assert line, "it did not say that it waits"
        assert not list(folder.rglob("*.png"))
    process.communicate(timeout=120)
    assert process.returncode == 0 and len(list(folder.rglob("*.png"))) == 4


def test_images_are_cached_by_prompt_seed_and_checkpoint(tiny, own_cache, tmp_path):
    """What `mask` draws, `erase` finds; more samples extend fewer."""
    cli.run(["mask", tiny, "--concept", "a sneaker", "--samples", "2", "--out", str(tmp_path / "m.safetensors")])
    first = {f.name: f.stat().st_mtime_ns for f in own_cache.rglob("*.png")}
    cli.run(["erase", tiny, "--concept", "a sneaker", "--anchor", "a bag", "--samples", "3", *SETTINGS,
             "--mask", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "erased")])  # fmt: skip
    after = {f.name: f.stat().st_mtime_ns for f in own_cache.rglob("*.png")}
    assert len(first) == 2 and len(after) == 6 and first.items() <= after.items()
    with Image.open(next(own_cache.rglob("*.png"))) as image:
        assert image.info[generate.PROVENANCE].startswith(find(tiny).identity)


def test_a_damaged_encoding_is_made_anew(tiny, own_cache, tmp_path):
    argv = ["mask", tiny, "--concept", "a sneaker", "--samples", "2", "--out", str(tmp_path / "m.safetensors")]
    cli.run(argv)
    before = (tmp_path / "m.safetensors").read_bytes()
    [file] = own_cache.rglob("encoded.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    cli.run(argv)
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_options_that_do_not_go_together_are_named(tiny, tmp_path, photo_folder, capsys):
    out, folder = ["--out", tmp_path / "x"], ["--forget", str(photo_folder)]
    for argv, said in [
        (["erase", tiny, *TWO, *folder, *out], "--forget is for one concept"),
        (["erase", tiny, *ERASE, "--retain-caption", "x", *out], "--retain-caption is for the images of --retain"),
        (["erase", tiny, *ERASE, "--resolution", "33", *out], "give a multiple of 8"),
        (["erase", tiny, *ERASE, "--plan", "nowhere", *out], "There is no plan or file nowhere"),
        (["erase", tiny, *TWO, "--retain", str(photo_folder), *out], "give --retain-caption"),
        (["erase", tiny, *TWO[:2], *out], "--concept 'a photo of a sneaker' has no --anchor"),
    ]:
        assert said in fails(argv, 2, capsys), argv
        assert not (tmp_path / "x").exists()
