"""An erasure that is killed, interrupted or disturbed goes on, and ends with the bytes of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from helpers.commands import fails, files_in, spawn, until

from salun_sd.checkpoint import tensors
from salun_sd.cli import app as cli

pytestmark = pytest.mark.slow  # runs that are killed and begun again

ERASE = ["--concept", "a photo of a sneaker", "--anchor", "a photo of a bag", "--samples", "4", "--batch-size", "4",
         "--mask", "random:0.2", "--steps", "30", "--sample-every", "10", "--format", "patch", "--save-every", "1e-9",
         "--out", "p.safetensors", "--lr", "1e-4"]  # fmt: skip
STATE = "p.safetensors.state/state.safetensors"  # written after every step, so that kills meet steps and saves alike


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    process = spawn(["erase", tiny, *ERASE], cwd=out)
    assert "licence" in process.communicate(timeout=200)[1] and process.returncode == 0
    return out


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def same(one, two) -> bool:
    """Patch, card, record, losses and strips; run.json says how long each took."""
    assert files_in(one) == files_in(two)
    return all((one / f).read_bytes() == (two / f).read_bytes() for f in files_in(one) if not f.endswith("run.json"))


@pytest.mark.parametrize("seed", [0, 1])
def test_after_kills_at_any_moment_the_same_command_ends_with_the_same_bytes(tiny, undisturbed, tmp_path, seed):
    moments, state, kills = random.Random(seed), tmp_path / STATE, 0
    for _ in range(2):
        process = spawn(["erase", tiny, *ERASE])
        before = state.stat().st_mtime_ns if state.is_file() else 0
        until(lambda: state.is_file() and state.stat().st_mtime_ns != before, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.5))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    cli.run(["erase", tiny, *ERASE])
    assert kills and same(undisturbed, tmp_path)


def test_ctrl_c_saves_and_says_where(tiny, undisturbed, tmp_path):
    process, losses = spawn(["erase", tiny, *ERASE]), tmp_path / "p.safetensors.state" / "losses.jsonl"
    until(lambda: losses.is_file() and losses.stat().st_size, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 130
    steps = json.loads(tensors.read(tmp_path / STATE)[1]["salun_sd"])["steps"]
    assert f"step {steps}" in said and "p.safetensors.state" in said
    cli.run(["erase", tiny, *ERASE])
    assert same(undisturbed, tmp_path)


def test_the_state_of_another_run_is_not_taken_and_not_lost(tiny, tmp_path, capsys):
    process, state = spawn(["erase", tiny, *ERASE, "--seed", "5"]), tmp_path / STATE
    until(state.is_file, process)
    said = fails(["erase", tiny, *ERASE], 2, capsys)
    assert "p.safetensors" in said and "--out" in said
    process.kill()
    process.communicate()
    kept = state.read_bytes()
    assert "p.safetensors.state" in fails(["erase", tiny, *ERASE], 2, capsys)
    assert state.read_bytes() == kept


def test_what_a_run_left_that_came_to_no_state_is_not_taken(tiny, undisturbed, tmp_path):
    stale = tmp_path / "p.safetensors.state" / "samples" / "step-00099.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another run")
    cli.run(["erase", tiny, *ERASE])
    assert same(undisturbed, tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "samples/mine.png"])
def test_a_folder_in_the_place_of_the_state_is_left_alone(tiny, tmp_path, capsys, name):
    notes = tmp_path / "p.safetensors.state" / name
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert name in fails(["erase", tiny, *ERASE], 2, capsys)
    assert notes.read_text() == "mine"


def test_a_stop_at_any_later_time_loses_neither_the_mask_nor_the_training(tiny, tmp_path):
    """With states ten minutes apart: there is one before the first step, and one before the result is written."""
    argv = [*ERASE[: ERASE.index("--mask")], "--format", "patch", "--out", "p.safetensors", "--steps"]
    process, losses = spawn(["erase", tiny, *argv, "2000"]), tmp_path / "p.safetensors.state" / "losses.jsonl"
    until(losses.is_file, process)
    process.kill()
    process.communicate()
    state = tensors.read(tmp_path / STATE)[0]
    assert any(name.startswith("mask/") for name in state)
    shutil.rmtree(losses.parent)

    process = spawn(["erase", tiny, *argv, "2"])
    place = tmp_path / f".p.safetensors.{process.pid}.partial"
    os.mkfifo(place)  # where it will write the result, and wait, for nobody reads
    until(lambda: list(tmp_path.glob(".p.run.*.partial/run.json")), process)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) and process.returncode == 130
    assert json.loads(tensors.read(tmp_path / STATE)[1]["salun_sd"])["steps"] == 2
    place.unlink(missing_ok=True)
    assert {path.name for path in tmp_path.iterdir()} == {"p.safetensors.state"}
    cli.run(["erase", tiny, *argv, "2"])
    assert {path.name for path in tmp_path.iterdir()} == {"p.safetensors", "p.run"}


def test_a_result_takes_the_state_of_the_run_that_was_killed_after_it(tiny, undisturbed, tmp_path):
    process, state = spawn(["erase", tiny, *ERASE]), tmp_path / STATE
    until(state.is_file, process)
    process.kill()
    process.communicate()
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    cli.run(["erase", tiny, *ERASE])
    assert not state.parent.exists() and same(undisturbed, tmp_path)


def test_an_error_that_would_come_again_leaves_no_state(tiny, tmp_path, capsys):
    assert "--lr" in fails(["erase", tiny, *ERASE[:-1], "1"], 1, capsys)
    assert list(tmp_path.iterdir()) == []
