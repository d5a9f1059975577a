"""`attack`: an audit, attacks on a model, its control, its base and a floor, and what of them can be refused first."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from weakref import ref

import pytest
import torch
from helpers.by_class import write_ddpm, write_dit
from helpers.models import write_pipeline

import salun_sd
from salun_sd.attacks.attack import Scene
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.given import nameless, without_name
from salun_sd.attacks.names import SUMMARIES
from salun_sd.attacks.run import Run
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.core.mask import kept, random_bits
from salun_sd.draw.prompts import Prompt
from salun_sd.edit import maskfile
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.steps import Attacking
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.device import Precision

PROMPTS = "case_number,prompt,evaluation_seed,evaluation_guidance,class\n" + "".join(
    f"{n},a photo of a {name},{n},3,{name}\n" for n, name in enumerate(("sneaker", "sneaker", "bag"))
)
RECORD = {  # of an erasure by an earlier version, which sealed none
    "schema": 2, "command": "", "concepts": [],
    "images": {"forget": 1, "retain": 1}, "data": {"forget": "", "retain": ""},
    "settings": {"format": "diffusers", "steps": 1, "batch_size": 1, "seed": 0}, "changed": {"inside": 1, "outside": 0},
    "base": {"model": "b", "revision": None, "family": "sd1", "fingerprint": "f00d", "header": {}, "license": {}},
}  # fmt: skip
WORDS = ["--concept", "a photo of a sneaker", "--concept-class", "sneaker"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    file.write_text(PROMPTS)
    return str(file)


def command(prompts, out, *more):
    return ["attack", "pocket", *WORDS, "--prompts", prompts, "--out", str(out), *more]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of an audit but marks of time."""
    names = (f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith("."))
    return {str(f.relative_to(folder)): f.read_bytes() for f in names}


@pytest.fixture(scope="module")
def attacked(prompts, tmp_path_factory):
    """The pocket itself, attacked: it knows the concept, so attacks succeed."""
    out = tmp_path_factory.mktemp("attacked") / "out"
    cli.run(command(prompts, out, "--base", "pocket", "--floor", "pocket", "--with", "prefix", "--with", "round-trip"))
    return out


@pytest.mark.slow
def test_every_side_has_its_images_and_its_rates(attacked, prompts, capsys):
    cli.run(command(prompts, attacked, "--base", "pocket", "--floor", "pocket", "--with", "prefix", "--with",
                    "round-trip", "--dry-run"))  # fmt: skip
    assert f" 0 of {len(list(attacked.rglob('*.png')))}: " in capsys.readouterr().out  # as it was expected
    report = json.loads((attacked / "report.json").read_text())
    assert report["attacks"]["failed"] == {}
    for name, entry in report["attacks"]["of"].items():
        looked_for = {"base"} if name == "prefix" else set()  # no round trip finds what the prompts do not name
        assert set(entry["sides"]) == {"model", "control", "floor", "floor-control"} | looked_for
        for side, numbers in entry["sides"].items():
            folder = attacked / "attacks" / name / side
            lines = (folder / "manifest.jsonl").read_text().splitlines()
            assert len(lines) == len(list((folder / "images").glob("*.png"))) == 2 * (1 + entry["tries"])
            assert numbers["asr"]["of"] == 2
    prefix = report["attacks"]["of"]["prefix"]
    assert prefix["sides"]["model"]["pre"]["rate"] == 1  # nothing was erased
    assert prefix["sides"]["model"] == {**prefix["sides"]["floor"], "model": prefix["sides"]["model"]["model"]}
    assert prefix["paired"]["floor"]["difference"] == 0


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(attacked, prompts, tmp_path):
    out = tmp_path / "out"
    argv = command(prompts, out, "--base", "pocket", "--floor", "pocket", "--with", "prefix", "--with", "round-trip")
    for seconds in (9, 14, 20):
        process = subprocess.Popen([sys.executable, "-m", "salun_sd", *argv], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    cli.run(argv)
    assert content(out) == content(attacked)


@pytest.mark.parametrize(
    "words, name",
    [
        (["--with", "prefxi"], "prefxi"),
        (["--with", "prefix"], "--base"),
        (["--with", "tokens"], "--base"),
        (["--with", "prompts"], "--adversarial"),
        (["--with", "positions"], "--mask"),
        (["--mask", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--mask", "nowhere.safetensors", "--with", "positions"], "nowhere.safetensors"),
        (["--mask", "nowhere.safetensors", "--with", "round-trip"], "positions in --with"),
        (["--words", "nowhere.txt", "--with", "round-trip"], "paraphrase in --with"),
        (["--adversarial", "nowhere.csv", "--with", "round-trip"], "prompts in --with"),
        (["--pictures", "nowhere", "--with", "round-trip"], "prefix, "),
        (["--budget", "huge"], "huge"),
        (["--floor", "pocket-ddpm"], "pocket-ddpm"),
        (["--pictures", "nowhere"], "--pictures nowhere"),
        (["--pictures", " "], "--pictures"),
        (["--words", "nowhere.txt"], "--words nowhere.txt"),
        (["--adversarial", "pocket"], "--adversarial pocket"),  # no file, though a set has this name
        (["--base", " "], "--base"),
        (["--size", "30"], "30"),
        (["--concept", " "], "--concept"),
        (["--base", "pocket", "--where", "class=sneaker", "--with", "benign"], "benign"),
        (["--base", "pocket", "--with", "prefix", "--fail-if", "floor.asr.prefix > 0"], "--floor"),
        (["--base", "pocket", "--with", "prefix", "--fail-if", "asr.tokens > 0"], "asr.tokens"),
        (["--base", "pocket", "--where", "class=sneaker", "--fail-if", "asr.benign > 0"], "asr.benign"),
    ],
)
def test_what_cannot_be_attacked_is_refused_before_anything_is_drawn(words, name, prompts, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        cli.run(command(prompts, tmp_path / "out", *words))
    assert stop.value.code == 2 and name in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_concept_that_no_judge_knows_is_refused(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("prompt,class\na photo of a dog,dog\n")
    with pytest.raises(UsageError, match="--classifier"):
        salun_sd.attack("pocket", concept="a photo of a dog", concept_class="dog", prompts=str(file),
                        out=tmp_path / "out", pictures=tmp_path)  # fmt: skip
    with pytest.raises(UsageError, match="--concept-class"):
        salun_sd.attack("pocket", concept="a photo of a bag", prompts="pocket", out=tmp_path / "out", pictures=tmp_path)


def test_a_dry_run_says_what_each_attack_does_and_writes_nothing(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))  # without images of the base
    given = {"concept": "a photo of a sneaker", "concept_class": "sneaker", "prompts": prompts, "dry_run": True,
             "base": "pocket", "out": tmp_path / "out"}  # fmt: skip
    plan = salun_sd.attack("pocket", **given)
    assert ATTACKS.keys() < plan.settings.keys() and plan.settings["attacked prompts"] == 2
    for name, needs in (("prompts", "--adversarial"), ("positions", "--mask")):
        assert needs in plan.settings[name] and needs not in plan.settings["prefix"]
    assert plan.settings["audit"].startswith("6 images; about ") and "timesteps 5" in plan.settings["prefix"]
    assert sum(plan.plans["attack"].values()) > 0 and not (tmp_path / "out").exists()
    larger = salun_sd.attack("pocket", with_="prefix", size=64, **given).plans["attack"]
    assert plan.plans["attack"]["weights"] == 2 * larger["weights"]  # where the base predicts, too
    assert larger["activations"] > plan.plans["attack"]["activations"]


def test_a_dry_run_knows_models_of_classes_and_advises_no_option_of_other_commands(tmp_path):
    plan = salun_sd.attack("pocket-ddpm", concept="sneaker", concept_class="sneaker", prompts="classes", out=tmp_path,
                           base="pocket-ddpm", with_="latent", dry_run=True)  # fmt: skip
    assert plan.plans["attack"]["activations"] > 0
    cheaper = Attacking(64, 1, Precision.of(None, "cpu")).cheaper(find("pocket").unet_settings, torch.device("cpu"))
    assert set(cheaper) - {"--dtype bfloat16"} == {"--size 32"}


def test_the_help_names_every_attack():
    assert list(SUMMARIES) == list(ATTACKS)


def test_a_text_loses_the_name_and_nothing_else():
    text = "A Sneaker, two sneakers, an ankle boot"
    assert nameless(text, ["sneaker"]) == "A thing, two sneakers, an ankle boot"
    assert nameless(text, ["boot", "ankle boot"]) == "A Sneaker, two sneakers, an thing"
    assert nameless(text, []) == text and nameless("ein C++-Buch", ["C++"]) == "ein thing-Buch"
    assert nameless("Sneaker", ["sneaker"]) == ""  # no class


def test_on_the_base_prompts_without_classes_lose_the_name_in_the_concepts_prompt():
    row = Prompt(1, "a boot in snow", 1, 3)
    asked = without_name(Scene(None, "a photo of a boot", [row], None), [])
    assert [p.text for p in asked.prompts] == ["a thing in snow"]
    assert asked.asked(asked.prompts[0]) == "a photo of a boot"  # of the model that knows it


def test_a_base_of_another_kind_and_a_seed_that_is_none_are_refused(prompts, tmp_path):
    other = write_pipeline(tmp_path / "v", "sd1", prediction="v_prediction")
    given = {"concept": "a photo of a sneaker", "concept_class": "sneaker", "prompts": prompts, "out": tmp_path / "out"}
    for wrong, named in (({"base": other, "with_": "tokens"}, "--base"), ({"seed": -1}, "--seed")):
        with pytest.raises(UsageError, match=named):
            salun_sd.attack("pocket", **given, **wrong)
    assert not (tmp_path / "out").exists()


def test_a_model_of_classes_is_asked_for_one_of_them_and_for_no_attack_that_it_cannot_have(tmp_path):
    unguided = write_ddpm(tmp_path / "bare", None, embeddings=3, guidance=1.0)
    (file := tmp_path / "p.csv").write_text("prompt,class,evaluation_guidance\n1,bag,1\n0,dress,1\n")
    given = {"concept_class": "bag", "prompts": str(file), "out": tmp_path / "out", "pictures": tmp_path}
    for wrong in ({"model": "pocket-ddpm", "concept": "a photo of a bag", "with_": "latent"},
                  {"model": unguided, "concept": "1", "with_": "latent"},
                  {"model": write_dit(tmp_path / "dit"), "concept": "1", "with_": "inversion"}):  # fmt: skip
        with pytest.raises(UsageError, match="photo|latent|inversion"):
            salun_sd.attack(**given | wrong)
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_erasure_than_that_of_the_record_is_refused(prompts, tmp_path):
    model = write_pipeline(tmp_path / "erased", "sd1")
    base = find(str(model))
    shapes, settings = {name: t.shape for name, t in base.unet.items()}, {"base": "f00d", "concepts": ["a sneaker"]}
    counts = dict(zip(("kept", "of"), kept(random_bits(shapes, 0.5, seed=0)), strict=True))
    (model / "salun.json").write_text(
        json.dumps(RECORD | {"erased": {"fingerprint": base.fingerprint}, "mask": settings | counts})
    )
    given = {"concept": "a photo of a sneaker", "concept_class": "sneaker", "prompts": prompts, "with_": "positions",
             "mask": tmp_path / "mask.safetensors", "out": tmp_path / "out", "dry_run": True}  # fmt: skip
    for density, changes, named in (
        (0.5, {}, None),
        (0.5, {"concepts": ["a photo of a bag"]}, "bag"),
        (0.25, {}, "kept"),
    ):
        maskfile.write(given["mask"], Mask(random_bits(shapes, density, seed=0), settings | changes))
        with pytest.raises(UsageError, match=f"{named}.*erased.run") if named else nullcontext():
            assert "images" in salun_sd.attack(model, **given).settings["positions"]


def test_only_what_is_found_without_a_noise_or_weights_has_fresh_seeds(prompts):
    without = {name for name, kind in ATTACKS.items() if not kind().has_fresh()}
    assert without == {"latent", "continue", "relearn", "relearn-lora", "benign", "round-trip", "positions"}
    assert salun_sd.attack("pocket", concept="a photo of a sneaker", concept_class="sneaker", prompts=prompts,
                           with_="genetic", fail_if="fresh.asr.genetic > 0.5", out="nowhere", dry_run=True)  # fmt: skip


@pytest.mark.slow
def test_what_another_run_left_is_not_expected_again_and_another_search_is_refused_first(prompts, tmp_path):
    given = {"concept": "a photo of a sneaker", "concept_class": "sneaker", "prompts": prompts, "out": tmp_path,
             "with_": "paraphrase", "limit": 1, "denoising_steps": 1, "detector": "none"}  # fmt: skip
    whole = salun_sd.attack("pocket", **given, dry_run=True).settings
    assert whole["images"] == "28" and whole["audit"].startswith("3 images; about ")  # 2 x (1 + 10) and 3 fresh
    salun_sd.attack("pocket", **given)
    done = salun_sd.attack("pocket", **given, dry_run=True).settings
    assert done["images"] == "0 of 28: the others are there" and done["time"] == "nothing is left"
    images = tmp_path / "attacks" / "paraphrase" / "control" / "images"
    for file in [tmp_path / "images" / "2_0.png", *images.glob("*_1.png"), *images.glob("*_2.png")]:
        file.unlink()
    left = salun_sd.attack("pocket", **given, dry_run=True).settings
    assert left["images"].startswith("3 of 28: ") and left["time"].startswith("about ")
    assert left["audit"].startswith("1 of 3 images; ") and left["paraphrase"].startswith("2 of 25 images; ")
    for changed, name in (({"seed": 1}, "seed"), ({"limit": 2}, "prompts"), ({"floor": "pocket-ddpm"}, "--floor")):
        with pytest.raises(UsageError, match=f"{name}.*(--out|Give another)"):
            salun_sd.attack("pocket", **given | changed)
    assert not (tmp_path / "images" / "2_0.png").exists()  # before anything was drawn
    (tmp_path / "attacks" / "paraphrase" / "model" / "settings.json").write_text("{")
    with pytest.raises(SalunError, match=r"settings\.json is damaged.*Remove .*another --out"):
        salun_sd.attack("pocket", **given, dry_run=True)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ImportError("No module named 'peft'"), KeyError("a bug")]
)
def test_an_attack_that_fails_stops_no_other_and_a_bug_is_raised_in_the_end(error, prompts, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(ATTACKS["paraphrase"], "tries", fail)
    (file := tmp_path / "others.csv").write_text("prompt\na shoe\n")
    given = {"concept": "a photo of a sneaker", "concept_class": "sneaker", "prompts": prompts, "detector": "none",
             "where": ["case_number<=1"], "adversarial": file, "limit": 1, "denoising_steps": 1}  # fmt: skip
    is_bug, out = isinstance(error, KeyError), tmp_path / "out"
    with pytest.raises(KeyError, match="a bug") if is_bug else nullcontext():
        salun_sd.attack("pocket", **given, with_=["paraphrase", "prompts"], out=out)
    attacks = json.loads((out / "report.json").read_text())["attacks"]
    assert attacks["of"].keys() == {"prompts"} and str(error.args[-1]) in attacks["failed"]["paraphrase"]
    assert ("KeyError" in attacks["failed"]["paraphrase"]) == is_bug  # whose own words alone say little
    with pytest.raises(KeyError if is_bug else SalunError, match="a bug" if is_bug else "paraphrase, model: "):
        salun_sd.attack("pocket", **given | {"adversarial": None}, with_="paraphrase", out=out)


@pytest.mark.slow
def test_runs_are_listed_once_and_a_model_is_gone_before_the_next_is_attacked(prompts, tmp_path, monkeypatch):
    begun, targets, at_search = [], set(), []
    init, search = Run.__init__, Run.search

    def begin(run, name, attack, scene, *more, **settings):
        begun.append(name)
        targets.add(ref(scene.target))
        init(run, name, attack, scene, *more, **settings)

    def look(run):
        at_search.append(sum(target() is not None for target in targets))
        search(run)

    monkeypatch.setattr(Run, "__init__", begin)
    monkeypatch.setattr(Run, "search", look)
    salun_sd.attack("pocket", concept="a photo of a sneaker", concept_class="sneaker", prompts=prompts,
                    out=tmp_path / "out", with_="round-trip", limit=1, denoising_steps=1, detector="none",
                    floor=shutil.copytree(find("pocket").path, tmp_path / "floor"))  # fmt: skip
    assert begun == ["round-trip"] * 4
    assert at_search == [2, 2, 1, 1]  # neither is loaded before it is attacked


def test_a_place_where_attacks_cannot_be_written_is_refused_before_anything_is_drawn(prompts, tmp_path):
    (tmp_path / "attacks").write_text("a file")
    with pytest.raises(UsageError, match="attacks cannot be written.*--out"):
        salun_sd.attack("pocket", concept="a photo of a sneaker", concept_class="sneaker", prompts=prompts,
                        out=tmp_path, with_="paraphrase", dry_run=True)  # fmt: skip


def test_a_concept_may_have_more_spaces_than_one():
    assert Scene(None, "a photo of a  sneaker", [], None).name == "sneaker"
