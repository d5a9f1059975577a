"""Two processes that run together against one, on the CPU over gloo; and one of them dying."""

import json
import os
import re
import signal
import socket
import subprocess

import psutil
import pytest
import torch
from helpers.commands import files_in, python, until
from helpers.models import write_clip

from salun_sd.checkpoint.find import find
from salun_sd.core import mask
from salun_sd.draw import prompts
from salun_sd.edit import maskfile

pytestmark = pytest.mark.slow  # a dozen runs of two processes

CONCEPT = ["--concept", "a photo of a sneaker"]


def start(module: str, argv, folder, **variables):
    env = os.environ | {"OMP_NUM_THREADS": "1", "SALUN_SD_CACHE": str(folder / "cache"), **variables}
    args = ["-m", module, *map(str, argv)]
    return python(args, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def launch(folder, argv):
    """Two processes that torchrun starts, and ends when one of them ends early."""
    options = ["--standalone", "--nproc_per_node", "2", "-m", "salun_sd"]
    return start("torch.distributed.run", [*options, *argv], folder)


def start_two(folder, argv):
    """Two processes that know of each other by the variables that every launcher sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [start("salun_sd", argv, folder, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def ended(processes) -> tuple[str, str]:
    """What the first process printed on stdout and on stderr, once all have ended well."""
    printed = [process.communicate(timeout=200) for process in processes]
    for process, (_, err) in zip(processes, printed, strict=True):
        assert process.returncode == 0, err[-3000:]
    return printed[0]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """mask, erase and evaluate by one process and by two: {processes: folder}, and what they printed."""
    folders, printed = {n: tmp_path_factory.mktemp(f"by{n}") for n in (1, 2)}, {}
    few = folders[1] / "few.csv"
    rows = [p for i, p in enumerate(prompts.read("pocket")) if i % 20 == 0]
    odd = [p._replace(guidance=float(i % 4), size=(24, 40)) for i, p in enumerate(rows) if i % 3 == 0]
    clip = write_clip(folders[1] / "clip")
    few.write_text(prompts.as_csv([*odd, *(p for i, p in enumerate(rows) if i % 3)]))
    for n, folder in folders.items():
        for argv in (
            ["mask", tiny, *CONCEPT, "--samples", "10", "--batch-size", "4", "--out", "m.safetensors"],
            ["erase", tiny, *CONCEPT, "--anchor", "a photo of a bag", "--mask", "m.safetensors", "--samples", "10",
             "--batch-size", "4", "--steps", "3", "--lr", "1e-4", "--out", "erased"],
            ["evaluate", folders[1] / "erased", "--prompts", few, "--against", tiny, "--denoising-steps", "2",
             "--clip", clip, "--fid", "pocket", "--out", "audit"],
        ):  # fmt: skip
            if n == 1:
                processes = [start("salun_sd", argv, folder)]
            else:
                processes = [launch(folder, argv)] if argv[0] == "mask" else start_two(folder, argv)
            printed[n, argv[0]] = ended(processes)[0]
    return folders, printed


def test_the_mask_is_the_same(made):
    folders, _ = made
    one, two = (maskfile.read(folders[n] / "m.safetensors") for n in (1, 2))
    assert one.settings == two.settings
    assert all(torch.equal(one.bits[name], two.bits[name]) for name in one.bits)


def test_the_erased_weights_are_the_same_to_rounding_and_nothing_moved_outside(made, tiny):
    folders, _ = made
    base = find(tiny).unet
    bits = maskfile.read(folders[1] / "m.safetensors").bits
    one, two = (find(str(folders[n] / "erased")).unet for n in (1, 2))
    moved = 0
    for name, t in base.items():
        a, b = one[name].read(), two[name].read()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)  # three updates of 1e-3
        assert torch.equal(b[~bits[name]], t.read()[~bits[name]])
        moved += int((b != t.read()).sum())
    assert moved > 0.9 * mask.kept(bits)[0]
    rows = {n: [json.loads(line) for line in (folders[n] / "erased.run" / "losses.jsonl").open()] for n in (1, 2)}
    assert [r["loss"] for r in rows[2]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-3)


def test_the_audit_is_the_same_to_the_byte(made):
    folders, _ = made
    one, two = (
        {f"audit/{name}": (folders[n] / "audit" / name).read_bytes() for name in files_in(folders[n] / "audit")}
        for n in (1, 2)
    )
    assert len(one) == 2 * (50 + 2) + 3 and one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    quality = json.loads(one["audit/report.json"])["quality"]
    assert quality["clip_score"]["images"] == 45 and quality["fid"]["images"] == quality["kid"]["images"] == [45, 45]
    assert quality["clip_score"]["value"] and quality["fid"]["value"]


def test_all_processes_end_with_3_where_a_bound_broke_and_the_report_is_written(made):
    folders, _ = made
    images = ["--images", "audit/images", "--prompts", folders[1] / "few.csv", "--concept-class", "sneaker"]
    run = launch(folders[2], ["evaluate", *images, "--out", "gated", "--fail-if", "flag_rate >= 0"])
    err = run.communicate(timeout=200)[1]
    assert run.returncode != 0 and err.count("flag_rate >= 0: ") == 1
    assert "exitcode  : 3" in err and not re.search("exitcode  : [^3]", err)
    report = json.loads((folders[2] / "gated" / "report.json").read_text())
    assert [entry["holds"] for entry in report["gate"]] == [False] and (folders[2] / "gated" / "report.md").is_file()


def test_only_the_main_process_speaks(made):
    _, printed = made
    for command in ("mask", "evaluate"):
        assert printed[1, command] == printed[2, command]
    assert printed[2, "erase"].count("changed ") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run(tiny, tmp_path, victim):
    argv = ["erase", tiny, *CONCEPT, "--anchor", "a bag", "--samples", "4", "--batch-size", "4", "--mask", "random:0.1",
            "--recipe", "paper", "--steps", "100000", "--out", "erased"]  # fmt: skip
    run = launch(tmp_path, argv)
    losses = tmp_path / "erased.run" / "losses.jsonl"
    until(lambda: losses.is_file() and losses.stat().st_size, run)
    workers = {
        p.environ()["RANK"]: p for p in psutil.Process(run.pid).children(recursive=True) if "RANK" in p.environ()
    }
    workers[str(victim)].kill()
    run.communicate(timeout=60)
    assert run.returncode != 0
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers.values())


def test_two_processes_that_are_killed_go_on_to_the_same_bytes(tiny, tmp_path):
    """With a mask that is computed, batches in parts and a clipped gradient; strips are drawn by one process alone."""
    argv = ["erase", tiny, *CONCEPT, "--anchor", "a bag", "--samples", "6", "--batch-size", "4", "--parts", "2",
            "--clip-norm", "0.1", "--steps", "12", "--sample-every", "6", "--save-every", "1e-9",
            "--out", "erased"]  # fmt: skip
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    ended(start_two(tmp_path / "whole", argv))
    run, losses = start_two(tmp_path / "killed", argv), tmp_path / "killed" / "erased.run" / "losses.jsonl"
    until(lambda: losses.is_file() and losses.read_text().count("\n") > 1, run[0])
    for number in (signal.SIGSTOP, signal.SIGKILL):  # who stands still does not see that the other died
        for process in run:
            process.send_signal(number)
    for process in run:
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    assert losses.is_file()
    assert "from step" in ended(start_two(tmp_path / "killed", argv))[1]
    one, two = (
        {f: (tmp_path / name / f).read_bytes() for f in files_in(tmp_path / name)} for name in ("whole", "killed")
    )
    assert one.keys() == two.keys()
    assert [f for f in one if one[f] != two[f]] == ["erased.run/run.json"]


def test_a_batch_too_small_to_share_is_refused(tiny, tmp_path):
    run = launch(tmp_path, ["erase", tiny, *CONCEPT, "--anchor", "a bag", "--batch-size", "1", "--out", "erased"])
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0 and "--batch-size 1" in err and "--parts 1" in err
