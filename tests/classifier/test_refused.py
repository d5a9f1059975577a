"""Bad input is refused before the first long step, by name, and leaves nothing."""

import json
import shutil
import sys

import pytest
from helpers.commands import fails, files_in, files_up_to
from helpers.pictures import TINY, classifier, write_idx
from helpers.runs import PAIR

from salun_sd.classifier import original
from salun_sd.classifier.architectures import in_order_of, opened
from salun_sd.cli import app as cli
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import cache, seals

START = ["classifier", "--forget", "0.2", *TINY]
SEARCHED = [*START[:-2], "--tune", "unpublished"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier with the classes of the pictures."""
    classifier().save(folder := tmp_path_factory.mktemp("models") / "model")
    return folder


def kept():
    return {entry.name for entry in cache.entries() if entry.kind == "trained"}


WRONG = {  # what is typed more => the exit code, what the sentence has
    "--method sulan": (2, "salun"), "--method ft --method ft": (2, "ft"), "--density 0": (2, "--density 0"),
    "--density 0.3 --density 0.3": (2, "salun-0.3"), "--setting ft.alpha=1": (2, "epochs"),
    "--setting ft.lr=much": (2, "much"), "--setting ft.epochs=0.5": (2, "0.5"), "--setting lr=1": (2, "METHOD.NAME"),
    "--fail-if ga>2": (2, "ga"), "--fail-if gap.salun>2 --method salun": (2, "retrain"),
    "--fail-if against.ua.ft>2": (2, "against"), "--lr 0": (2, "--lr"), "--forget class:9": (2, "9"),
    "--forget 2": (2, "--forget 2"), "--data nowhere.x": (2, "nowhere.x"), "--lr inf": (2, "--lr"),
    "--size 20": (2, "--size"), "--train-seed 5000000000": (2, "--train-seed"),
    "--seeds 1001": (2, "1000"),
    "--method ft --density 0.3": (2, "--density"), "--density 0.3 --density 0.30000001": (2, "salun-0.3"),
}  # fmt: skip


@pytest.mark.parametrize(("typed", "code", "named"), [(t, *e) for t, e in WRONG.items()])
def test_a_wrong_argument_is_refused_before_anything_is_trained(typed, code, named, idx, tmp_path, capsys):
    before, line = kept(), [*START, "--data", str(idx), "--out", tmp_path / "out"]
    for option in {word for word in typed.split() if word in ("--forget", "--data", "--seeds")}:
        at = line.index(option)
        del line[at : at + 2]
    assert named in fails([*line, *typed.split()], code, capsys)
    assert not (tmp_path / "out").exists() and kept() == before


def test_a_text_to_image_model_is_for_erase_and_a_classifier_is_not(idx, model, tiny, tmp_path, capsys):
    rest = ["--forget", "0.2", "--data", str(idx), "--out", str(tmp_path / "out")]
    for name in ("pocket", "pocket-ddpm", tiny):
        assert f"salun-sd erase {name}" in fails(["classifier", name, *rest], 2, capsys)
    assert f"salun-sd classifier {model}" in fails(["erase", model, *PAIR, "--out", tmp_path / "out"], 2, capsys)


def test_what_is_no_classifier_is_refused(idx, model, tmp_path, capsys):
    rest = ["--forget", "0.2", "--data", str(idx), "--out", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(["classifier", tmp_path / "empty", *rest], 2, capsys)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    assert "empty" in fails(["classifier", tmp_path / "empty", *rest], 1, capsys)
    assert "--width" in fails(["classifier", model, *rest, "--width", "3"], 2, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [{"1": "0", "2": "1", "3": "2", "4": "3"}, {"0": 0, "1": 1, "2": 2, "3": 3}])
def test_a_model_that_does_not_name_its_classes_from_0_on_is_refused(model, tmp_path, labels):
    config = json.loads((shutil.copytree(model, tmp_path / "odd") / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"id2label": labels}))
    with pytest.raises(SalunError, match="odd.*id2label"):
        opened(str(tmp_path / "odd"), "cpu")


def test_a_model_with_other_classes_is_refused_and_with_another_order_is_not(model):
    own = opened(str(model), "cpu")
    assert in_order_of(own, ["2", "0", "1", "3"], "m").tolist() == [2, 0, 1, 3]
    for classes in (["0", "1", "2"], ["0", "1", "2", "cat"], ["0", "1", "2", "3", "4"]):
        with pytest.raises(UsageError, match="MODEL m"):
            in_order_of(own, classes, "m")
    own.net.config.id2label = {i: f"LABEL_{i}" for i in range(4)}
    assert in_order_of(own, ["cat", "a", "b", "c"], "m").tolist() == [0, 1, 2, 3]


def test_a_training_that_gives_no_number_is_stopped_and_leaves_no_state(idx, tmp_path, capsys):
    before = kept()
    assert "original" in fails([*START, "--data", idx, "--out", tmp_path / "out", "--lr", "1e12"], 1, capsys)
    assert all(entry.files == 0 for entry in cache.entries() if entry.name in kept() - before)


def test_a_kept_original_that_is_damaged_is_trained_anew(idx, tmp_path):
    line = [*START, "--data", str(idx), "--method", "ga", "--setting=ga.epochs=1"]
    cli.run([*line, "--out", str(tmp_path / "first")])
    for entry in cache.folder().glob("trained/*/model/salun.json"):
        entry.write_text(entry.read_text().replace("seed", "need"))
    cli.run([*line, "--out", str(tmp_path / "second")])
    first, second = (tmp_path / out / "original" / "model.safetensors" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_all_models_of_a_folder_are_of_the_original_in_it_whatever_the_cache_has(idx, tmp_path, monkeypatch, capsys):
    line, made = [*START, "--data", str(idx), "--out", str(tmp_path / "out")], tmp_path / "out" / "original"
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    cli.run([*line, "--method", "ga", "--setting=ga.epochs=1"])
    for folder in (tmp_path / "cache").glob("trained/*/model"):  # as another machine trains it: with other bits
        shutil.rmtree(folder)
        original.write(classifier(seed=7), folder, {"training": seals.read(made / "salun.json")["training"]})
    line += ["--method", "salun", "--density", "0.1", "--setting=salun.epochs=1"]
    cli.run(line)
    start, end = (opened(str(f), "cpu").net.parameters() for f in (made, tmp_path / "out" / "salun-0.1" / "seed-0"))
    changed = seals.read(tmp_path / "out" / "salun-0.1" / "seed-0" / "salun.json")["changed"]
    assert sum(int((a != b).sum()) for a, b in zip(start, end, strict=True)) == changed["inside"] > 0
    (made / "config.json").write_text("{")
    assert f"{made} is not as it was written" in fails(line, 1, capsys)
    shutil.rmtree(made)
    assert f"{made}, with which" in fails(line, 2, capsys)


def test_an_original_of_a_folder_without_settings_is_not_taken_over(idx, tmp_path, capsys):
    original.write(classifier(), tmp_path / "out" / "original", {"training": {"epochs": 2, "lr": 0.1, "seed": 0}})
    assert "something else" in fails([*START, "--data", idx, "--out", tmp_path / "out"], 2, capsys)
    assert not (tmp_path / "out" / "run").exists()


def test_a_search_goes_on_where_settings_diverge(idx, tmp_path, capsys):
    line = [*SEARCHED, "--data", idx, "--out", tmp_path / "out", "--method", "l1-sparse",
            "--setting=l1-sparse.epochs=1", "--setting=l1-sparse.lr=1e30"]  # fmt: skip
    assert "l1-sparse, seed 0" in fails(line, 1, capsys)
    tried = seals.read(tmp_path / "out" / "run" / "search-l1-sparse.json")["tried"]
    assert [each["score"] for each in tried] == [100, 100, 100]


def test_a_search_without_a_validation_image_is_refused(tmp_path, capsys):
    write_idx(tmp_path / "few", 16, 8)  # four images of a class
    line = [*SEARCHED, "--data", tmp_path / "few", "--out", tmp_path / "out", "--method", "iu"]
    assert "--tune none" in fails(line, 2, capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(idx, tmp_path, capsys):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "mine.txt").write_text("x")
    assert "out" in fails([*START, "--data", str(idx), "--out", tmp_path / "out"], 2, capsys)
    assert files_in(tmp_path / "out") == {"run/mine.txt"}


def test_without_scikit_learn_it_says_what_to_install(idx, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "salun-sd[classifier]" in fails([*START, "--data", str(idx), "--out", tmp_path / "out"], 1, capsys)


def test_a_full_disk_leaves_no_half_of_a_model_and_the_run_goes_on_later(idx, tmp_path, capsys):
    line = [*START, "--data", idx, "--out", tmp_path / "out", "--method", "ft", "--setting=ft.epochs=1"]
    with files_up_to(2**14):
        fails(line, 1, capsys)
    assert not any("safetensors" in file for file in files_in(tmp_path))
    cli.run([str(word) for word in line])
    assert (tmp_path / "out" / "report.html").is_file()


def test_another_split_or_setting_in_the_same_folder_is_refused(idx, tmp_path, capsys):
    line = [*START, "--data", str(idx), "--out", str(tmp_path / "out"), "--method", "ga", "--setting=ga.epochs=1"]
    cli.run(line)
    for rest, named in (("--augment=none", "training"), ("--keep-statistics", "keep_statistics")):
        assert named in fails([*line, rest], 2, capsys)
    assert "ga" in fails(line[:-1], 2, capsys)
