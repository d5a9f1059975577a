"""The command from end to end on small images: what it writes, what its numbers are, that it resumes."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.commands import files_in
from helpers.pictures import TINY
from transformers import AutoModelForImageClassification

from salun_sd.classifier.measure import METRICS
from salun_sd.classifier.settings import in_words
from salun_sd.cli import app as cli
from salun_sd.runtime import seals

EPOCHS = [f"--setting={name}.epochs=1" for name in ("ft", "rl", "salun", "ga", "l1-sparse", "bs", "be")]
METHODS = ("retrain", "ft", "rl", "salun", "ga", "iu", "l1-sparse", "bs", "be")
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json", "small_resnet.py", "salun.json"}


def command(idx, out, *rest):
    return ["classifier", "--data", str(idx), "--forget", "0.2", "--out", str(out), *TINY, *EPOCHS,
            "--setting=iu.samples=3", *rest]  # fmt: skip


@pytest.fixture(scope="module")
def made(idx, tmp_path_factory):
    """All nine methods, and SalUn at a second density."""
    out = tmp_path_factory.mktemp("run") / "out"
    cli.run(command(idx, out, "--density", "0.5", "--density", "0.1"))
    return out


def report(out):
    return seals.read(out / "report.json")


def test_it_writes_these_files_and_no_other(made):
    rows, run = [*METHODS, "salun-0.1"], {"run/settings.json", "run/split-0.json"}
    models = {f"{row}/seed-0/{file}" for row in rows for file in MODEL | {"README.md"}}
    kept = {f"run/{row}-seed-0.{ending}" for row in (*rows, "original") for ending in ("json", "safetensors")}
    pages = {f"report.{ending}" for ending in ("json", "md", "csv", "html")}
    assert files_in(made) == models | run | kept | pages | {f"original/{file}" for file in MODEL}


def test_the_gap_is_the_mean_distance_to_retrain_on_the_same_images(made):
    rows = report(made)["rows"]
    exact = rows["retrain"]["metrics"]
    assert rows["retrain"]["gap"] is None
    for name in {*rows} - {"retrain"}:
        own = rows[name]["metrics"]
        distance = sum(abs(own[m]["mean"] - exact[m]["mean"]) for m in METRICS) / 4
        assert rows[name]["gap"]["mean"] == pytest.approx(distance)
        pairs = rows[name]["paired"]["forget"]
        assert sum(pairs[k] for k in ("both", "only_retrain", "only_method", "neither")) == 14
        assert 100 * pairs["difference"] == pytest.approx(exact["ua"]["mean"] - own["ua"]["mean"])
        assert pairs["ci95"][0] <= pairs["difference"] <= pairs["ci95"][1]


def test_a_masked_model_is_the_original_outside_its_mask_and_says_so(made):
    start, end = (AutoModelForImageClassification.from_pretrained(made / name) for name in ("original", "salun/seed-0"))
    pairs = zip(start.parameters(), end.parameters(), strict=True)
    moved = sum(int((a != b).sum()) for a, b in pairs)
    changed = seals.read(made / "salun" / "seed-0" / "salun.json")["changed"]
    assert changed["outside"] == 0 and 0 < moved == changed["inside"] <= changed["mask"]
    assert changed["mask"] == round(changed["weights"] / 2)


def test_every_key_of_the_report_is_documented(made):
    documented = set(re.findall(r"`(\w+)`", (Path(__file__).parents[2] / "docs" / "classifier.md").read_text()))
    content = json.loads((made / "report.json").read_text())
    row = content["rows"]["iu"]
    inside = (row["metrics"], row["gap"], row["changed"], row["used"], row["paired"], row["paired"]["forget"])
    assert {*content, *row}.union(*inside) - {"samples"} <= documented


def test_it_says_everywhere_how_many_single_gradients_iu_used_where_that_is_fewer_than_asked_for(idx, tmp_path, made):
    line = command(idx, tmp_path / "out", "--method", "iu")
    others = {"0.2": "0.8", "none": "unpublished", "--setting=iu.samples=3": "--setting=iu.samples=1000"}
    line = [others.get(word, word) for word in line]
    cli.run(line)
    row, folder = report(tmp_path / "out")["rows"]["iu"], tmp_path / "out" / "iu" / "seed-0"
    assert row["settings"]["samples"] == 1000 and row["used"] == {"samples": [14]}  # all retain images
    assert [each["used"] for each in row["tried"]] == [{"samples": 14}] * 5 and "Retrain" in row["rule"]
    assert seals.read(folder / "salun.json")["used"] == {"samples": 14}
    for file in (folder / "README.md", tmp_path / "out" / "report.md", tmp_path / "out" / "report.html"):
        assert "samples 14 of 1000, alpha" in file.read_text()
    plain = report(made)["rows"]
    assert plain["iu"]["used"] == {"samples": [3]} and "samples 3, alpha" in (made / "report.md").read_text()
    assert plain["ft"]["used"] == {} and plain["ft"]["rule"] is None


def test_settings_in_words_have_the_range_that_seeds_used():
    assert in_words({"samples": 1000, "alpha": 0.5}, {"samples": [134, 120]}) == "samples 120 to 134 of 1000, alpha 0.5"


def test_it_prints_a_table_and_its_forms_have_every_row(made, idx, capsys):
    cli.run(command(idx, made, "--density", "0.5", "--density", "0.1"))
    printed = capsys.readouterr().out
    forms = [(made / f"report.{ending}").read_text() for ending in ("md", "csv", "html")]
    assert all(name in text for name in (*METHODS, "salun-0.1", "original") for text in (printed, *forms))


def test_a_finished_run_makes_no_model_again_and_a_new_method_joins_it(made, idx):
    before = {file: (made / file).stat().st_mtime_ns for file in files_in(made) if "seed-0" in file}
    old = report(made)
    cli.run(command(idx, made, "--method", "salun", "--method", "random", "--method", "retrain",
                    "--setting=random.epochs=1"))  # fmt: skip
    assert before == {file: (made / file).stat().st_mtime_ns for file in before}
    new = report(made)["rows"]
    assert set(new) == {"original", "salun", "random", "retrain"} and new["salun"] == old["rows"]["salun"]


def test_the_split_is_written_down(made):
    split = json.loads((made / "run" / "split-0.json").read_text())
    assert split["sizes"] == {"forget": 14, "retain": 58, "validation": 8, "test": 40}
    assert len(split["forget"]) == 14 and len(split["validation"]) == 8 and not set(split["forget"]) & set(
        split["validation"])  # fmt: skip


def test_a_bound_that_is_broken_ends_with_code_3(made, idx, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(command(idx, made, "--fail-if", "gap.ft > -1", "--fail-if", "ua.ga < ua.retrain - 200"))
    assert ended.value.code == 3 and "gap.ft > -1" in capsys.readouterr().err
    assert [entry["holds"] for entry in report(made)["gate"]] == [False, True]


def test_a_model_of_a_run_is_a_model_for_another(made, idx, tmp_path):
    rest = command(idx, tmp_path / "out", "--method", "ft", "--keep-statistics")
    del rest[rest.index("--architecture") : rest.index("--architecture") + 4]
    cli.run([rest[0], str(made / "original"), *rest[1:]])
    start, end = (AutoModelForImageClassification.from_pretrained(f) for f in (made / "original",
                                                                               tmp_path / "out/ft/seed-0"))  # fmt: skip
    buffers = zip(start.buffers(), end.buffers(), strict=True)
    result = report(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in buffers) and result["rows"]["ft"]["gap"] is None
    assert not {"architecture", "width"} & result["training"].keys()  # of MODEL they are not known
