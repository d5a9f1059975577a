"""A run that is stopped goes on, and ends with the bits of an undisturbed one; several processes share a run."""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.commands import ctrl_c_at, fails, files_in, fresh, spawn, until
from helpers.pictures import TINY

from salun_sd.cli import app as cli
from salun_sd.runtime import seals

METHODS = ("retrain", "ft", "salun", "be")


def command(idx, out, methods=METHODS):
    names = [word for name in methods for word in ("--method", name)]
    return ["classifier", "--data", idx, "--forget", "0.2", "--out", out, *TINY, *names,
            *(f"--setting={name}.epochs=4" for name in methods if name != "retrain")]  # fmt: skip


def models(out):
    """The bytes of each model, and the metrics of each result."""
    weights = {file: (out / file).read_bytes() for file in files_in(out) if file.endswith("model.safetensors")}
    results = {file: seals.read(out / file)["metrics"] for file in files_in(out)
               if file.startswith("run/") and file.endswith("seed-0.json")}  # fmt: skip
    return weights, results


def test_ctrl_c_in_a_training_resumes_with_the_same_bits(idx, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    state = stopped / "run" / "salun-seed-0.state"
    with ctrl_c_at(state):
        assert "resume" in fails(command(idx, stopped, ("salun",)), 130, capsys)
    assert state.exists() and not (stopped / "report.json").exists()
    for out in (whole, stopped):
        cli.run([str(word) for word in command(idx, out, ("salun",))])
    assert models(whole) == models(stopped) and not state.exists()


def test_two_processes_share_a_run_and_each_model_is_made_once(idx, tmp_path, caplog):
    """The other has made one, and stands still until this one has."""
    caplog.set_level("INFO", "salun_sd")
    process, run = spawn(command(idx, tmp_path / "out")), tmp_path / "out" / "run"
    until(lambda: any(run.glob("*-seed-0.json")), process)
    process.send_signal(signal.SIGSTOP)

    def go_on():
        try:
            until(lambda: any(", seed 0: ua" in line for line in caplog.messages))
        finally:
            process.send_signal(signal.SIGCONT)

    with ThreadPoolExecutor() as beside:
        beside.submit(go_on)
        cli.run([str(word) for word in command(idx, tmp_path / "out")])
    said = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 0, said
    both = [[line.partition(",")[0] for line in lines if ", seed 0: ua" in line] for lines in (said, caplog.messages)]
    assert sorted(both[0] + both[1]) == sorted(["original", *METHODS]) and all(both)
    assert set(seals.read(tmp_path / "out" / "report.json")["rows"]) == {"original", *METHODS}


@pytest.mark.slow  # a run is begun many times
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(idx, tmp_path, monkeypatch):
    whole, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(0)

    def begun(folder):
        monkeypatch.setenv("SALUN_SD_CACHE", str(folder / "cache"))
        return spawn(command(idx, folder / "out"), fresh)

    start = time.monotonic()
    assert begun(whole).wait() == 0
    codes, length = [], time.monotonic() - start
    for moment in sorted(moments.uniform(0.3, 0.95) for _ in range(6)):  # what is done adds up: the latest comes last
        process = begun(killed)
        time.sleep(moment * length)
        process.kill()
        process.communicate()
        codes.append(process.returncode)
    assert sum(code != 0 for code in codes) >= 2
    assert begun(killed).wait() == 0
    assert models(whole / "out") == models(killed / "out")
    assert not [file for file in files_in(killed) if "partial" in file and not file.endswith("-lock")]
