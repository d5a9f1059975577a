"""An erasure that is killed, interrupted or disturbed goes on, and ends with the bytes of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from helpers.commands import ctrl_c_at, fails, files_in, fresh, python, spawn, until

from salun_sd.checkpoint import tensors
from salun_sd.cli import app as cli

pytestmark = pytest.mark.slow  # runs that are killed and begun again

ERASE = ["--concept", "a photo of a sneaker", "--anchor", "a photo of a bag", "--samples", "4", "--batch-size", "4",
         "--mask", "random:0.2", "--steps", "30", "--sample-every", "10", "--format", "patch", "--save-every", "1e-9",
         "--out", "p.safetensors", "--lr", "1e-4"]  # fmt: skip
STATE = "p.safetensors.run/state.safetensors"  # written after every step, so that kills meet steps and saves alike


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


def steps_in(state) -> int | None:
    return json.loads(tensors.read(state)[1]["salun_sd"])["steps"] if state.is_file() else None


def contained(args, **kwargs) -> subprocess.Popen:
    """Start `python ARGS` as process number 1 of a namespace, as in a container."""
    return fresh(args, before=["unshare", "--pid", "--fork", "--kill-child"], **kwargs)


def makes_namespaces() -> bool:
    return shutil.which("unshare") and not subprocess.run(["unshare", "--pid", "--fork", "true"]).returncode


@pytest.mark.parametrize("seed, start", [
    (0, python), (1, python),
    pytest.param(2, contained, marks=pytest.mark.skipif(not makes_namespaces(), reason="this user makes none")),
])  # fmt: skip
def test_after_kills_at_any_moment_the_same_command_ends_with_the_same_bytes(tiny, undisturbed, tmp_path, seed, start):
    moments, state, kills = random.Random(seed), tmp_path / STATE, 0
    for _ in range(2):
        process = spawn(["erase", tiny, *ERASE], start)
        before = state.stat().st_mtime_ns if state.is_file() else 0
        until(lambda: state.is_file() and state.stat().st_mtime_ns != before, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.3))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert spawn(["erase", tiny, *ERASE], start).communicate() and kills and same(undisturbed, tmp_path)


def test_ctrl_c_saves_and_says_where(tiny, undisturbed, tmp_path, capsys):
    with ctrl_c_at(tmp_path / STATE, times=3):
        said = fails(["erase", tiny, *ERASE], 130, capsys)
    assert f"step {steps_in(tmp_path / STATE)}" in said and "p.safetensors.run" in said
    cli.run(["erase", tiny, *ERASE])
    assert same(undisturbed, tmp_path)


def test_the_state_of_another_run_is_not_taken_and_not_lost(tiny, tmp_path, capsys):
    longer = ["2000" if word == "30" else word for word in ERASE]
    process, state = spawn(["erase", tiny, *longer, "--seed", "5"]), tmp_path / STATE
    until(state.is_file, process)
    said = fails(["erase", tiny, *ERASE], 2, capsys)
    assert "p.safetensors" in said and "--out" in said
    process.kill()
    process.communicate()
    kept = state.read_bytes()
    assert "p.safetensors.run" in fails(["erase", tiny, *ERASE], 2, capsys)
    assert state.read_bytes() == kept


def test_what_a_run_left_that_came_to_no_state_is_not_taken(tiny, undisturbed, tmp_path):
    stale = tmp_path / "p.safetensors.run" / "samples" / "step-00099.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another run")
    cli.run(["erase", tiny, *ERASE])
    assert same(undisturbed, tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "samples/mine.png"])
def test_a_folder_in_the_place_of_the_state_is_left_alone(tiny, tmp_path, capsys, name):
    notes = tmp_path / "p.safetensors.run" / name
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert name in fails(["erase", tiny, *ERASE], 2, capsys)
    assert notes.read_text() == "mine"


def test_a_stop_at_any_later_time_loses_neither_the_mask_nor_the_training(tiny, tmp_path):
    """With states ten minutes apart: there is one before the first step, and one before the result is written."""
    argv = [*ERASE[: ERASE.index("--mask")], "--format", "patch", "--out", "p.safetensors", "--steps"]
    process, losses = spawn(["erase", tiny, *argv, "2000"]), tmp_path / "p.safetensors.run" / "losses.jsonl"
    until(losses.is_file, process)
    process.kill()
    process.communicate()
    state = tensors.read(tmp_path / STATE)[0]
    assert any(name.startswith("mask/") for name in state)
    shutil.rmtree(losses.parent)

    base = shutil.copytree(tiny, tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    process = spawn(["erase", base, *argv, "100"])
    until(lambda: losses.is_file() and losses.stat().st_size, process)
    weights.rename(tmp_path / "aside")
    os.mkfifo(weights)  # the base is read again for the result, and nobody writes this one
    until(lambda: steps_in(tmp_path / STATE) == 100, process)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) and process.returncode == 130
    (tmp_path / "aside").replace(weights)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "p.safetensors.run"}
    cli.run(["erase", str(base), *argv, "100"])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "p.safetensors", "p.safetensors.run"}


def test_a_result_takes_the_state_of_the_run_that_was_killed_after_it(tiny, undisturbed, tmp_path):
    process, state = spawn(["erase", tiny, *ERASE]), tmp_path / STATE
    until(state.is_file, process)
    process.kill()
    process.communicate()
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    cli.run(["erase", tiny, *ERASE])
    assert not state.exists() and same(undisturbed, tmp_path)


def test_an_error_that_would_come_again_leaves_no_state(tiny, tmp_path, capsys):
    assert "--lr" in fails(["erase", tiny, *ERASE[:-1], "1"], 1, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_training_is_written_though_no_state_fits_the_disk(tiny, undisturbed, tmp_path):
    """On a file system of its own that has room for the result, and not for a state."""
    sizes = {f: (undisturbed / f).stat().st_size for f in files_in(undisturbed)}
    room = (sum(sizes.values()) + 2**17) // 2**12 * 2**12
    script = f'mount -t tmpfs -o size={room} none room && cd room && "$@"; code=$?; cp -a . ../kept; exit $code'
    (tmp_path / "room").mkdir()
    inside = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if not makes_namespaces() or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("this user mounts no file systems")
    process = fresh(["-m", "salun_sd", "erase", str(tiny), *ERASE], before=inside, stderr=subprocess.PIPE)
    assert "disk" in process.communicate(timeout=300)[1] and process.returncode == 0
    assert same(undisturbed, tmp_path / "kept")
