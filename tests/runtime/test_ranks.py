"""Two processes that a launcher started against one, on the CPU over gloo; and one of them dying."""

import json
import os
import re
import subprocess
import sys

import psutil
import pytest
import torch
from helpers.commands import files_in, until
from helpers.models import write_clip

from salun_sd.checkpoint.find import find
from salun_sd.core import mask
from salun_sd.draw import prompts
from salun_sd.edit import maskfile

pytestmark = pytest.mark.slow  # ten launches of two processes on two cores

CONCEPT = ["--concept", "a photo of a sneaker"]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(processes, folder, argv):
    env = os.environ | {"OMP_NUM_THREADS": "1", "SALUN_SD_CACHE": str(folder / "cache"), "TQDM_DISABLE": "1"}
    command = [sys.executable, *(LAUNCH if processes > 1 else []), "-m", "salun_sd", *map(str, argv)]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """mask, erase and evaluate by one process and by two: {processes: folder}, and what they printed."""
    folders, said = {n: tmp_path_factory.mktemp(f"by{n}") for n in (1, 2)}, {}
    few = folders[1] / "few.csv"
    rows = [p for i, p in enumerate(prompts.read("pocket")) if i % 20 == 0]
    odd = [p._replace(guidance=float(i % 4), size=(24, 40)) for i, p in enumerate(rows) if i % 3 == 0]
    clip = write_clip(folders[1] / "clip")
    few.write_text(prompts.write([*odd, *(p for i, p in enumerate(rows) if i % 3)]))
    for n, folder in folders.items():
        for argv in (
            ["mask", tiny, *CONCEPT, "--samples", "10", "--batch-size", "4", "--out", "m.safetensors"],
            ["erase", tiny, *CONCEPT, "--anchor", "a photo of a bag", "--mask", "m.safetensors", "--samples", "10",
             "--batch-size", "4", "--steps", "3", "--lr", "1e-3", "--out", "erased"],
            ["evaluate", folders[1] / "erased", "--prompts", few, "--against", tiny, "--steps", "2", "--clip", clip,
             "--fid", "pocket", "--out", "audit"],
        ):  # fmt: skip
            process = start(n, folder, argv)
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err[-3000:]
            said[n, argv[0]] = out
    return folders, said


def test_the_mask_is_the_same(made):
    folders, _ = made
    one, two = (maskfile.unpack((folders[n] / "m.safetensors").read_bytes(), "") for n in (1, 2))
    assert one.settings == two.settings
    assert all(torch.equal(one.bits[name], two.bits[name]) for name in one.bits)


def test_the_erased_weights_are_the_same_to_rounding_and_nothing_moved_outside(made, tiny):
    folders, _ = made
    base = find(tiny).unet
    bits = maskfile.unpack((folders[1] / "m.safetensors").read_bytes(), "").bits
    one, two = (find(str(folders[n] / "erased")).unet for n in (1, 2))
    moved = 0
    for name, t in base.items():
        a, b = one[name].read(), two[name].read()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)  # three updates of 1e-3
        assert torch.equal(b[~bits[name]], t.read()[~bits[name]])
        moved += int((b != t.read()).sum())
    assert moved > 0.9 * mask.kept(bits)[0]
    rows = {n: [json.loads(line) for line in (folders[n] / "erased" / "losses.jsonl").open()] for n in (1, 2)}
    assert [r["loss"] for r in rows[2]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-3)


def test_the_audit_is_the_same_to_the_byte(made):
    folders, _ = made
    one, two = (
        {str(p.relative_to(folders[n])): p.read_bytes() for p in (folders[n] / "audit").rglob("*") if p.is_file()}
        for n in (1, 2)
    )
    assert len(one) == 2 * (50 + 2) + 3 and one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    quality = json.loads(one["audit/report.json"])["quality"]
    assert quality["clip_score"]["images"] == 45 and quality["fid"]["images"] == quality["kid"]["images"] == [45, 45]
    assert quality["clip_score"]["value"] and quality["fid"]["value"]


def test_all_processes_end_with_3_where_a_bound_broke_and_the_report_is_written(made):
    folders, _ = made
    images = ["--images", "audit/images", "--prompts", folders[1] / "few.csv", "--concept", "sneaker"]
    run = start(2, folders[2], ["evaluate", *images, "--out", "gated", "--fail-if", "flag_rate >= 0"])
    said = run.communicate(timeout=200)[1]
    assert run.returncode != 0 and said.count("Failed: flag_rate >= 0: ") == 1
    assert "exitcode  : 3" in said and not re.search("exitcode  : [^3]", said)
    report = json.loads((folders[2] / "gated" / "report.json").read_text())
    assert [entry["holds"] for entry in report["gate"]] == [False] and (folders[2] / "gated" / "report.md").is_file()


def test_only_the_main_process_speaks(made):
    _, said = made
    for command in ("mask", "evaluate"):
        assert said[1, command] == said[2, command]
    assert said[2, "erase"].count("changed ") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run(tiny, tmp_path, victim):
    argv = ["erase", tiny, *CONCEPT, "--anchor", "a bag", "--samples", "4", "--batch-size", "4", "--mask", "random:0.1",
            "--steps", "100000", "--out", "erased"]  # fmt: skip
    run = start(2, tmp_path, argv)
    losses = tmp_path / "erased.state" / "losses.jsonl"
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
            "--clip", "0.1", "--steps", "12", "--sample-every", "6", "--save-every", "1e-9",
            "--out", "erased"]  # fmt: skip
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = start(2, tmp_path / "whole", argv)
    assert whole.communicate(timeout=200) and whole.returncode == 0
    run, losses = start(2, tmp_path / "killed", argv), tmp_path / "killed" / "erased.state" / "losses.jsonl"
    until(lambda: losses.is_file() and losses.read_text().count("\n") > 1, run)
    for process in psutil.Process(run.pid).children(recursive=True):
        process.kill()
    run.communicate(timeout=60)
    assert run.returncode != 0 and losses.is_file()
    again = start(2, tmp_path / "killed", argv)
    assert "Going on from step" in again.communicate(timeout=200)[1] and again.returncode == 0
    one, two = ({f: (tmp_path / name / "erased" / f).read_bytes() for f in files_in(tmp_path / name / "erased")}
                for name in ("whole", "killed"))  # fmt: skip
    assert one.keys() == two.keys()
    assert [f for f in one if one[f] != two[f]] == ["run.json"]


def test_a_batch_too_small_to_share_is_refused(tiny, tmp_path):
    run = start(2, tmp_path, ["erase", tiny, *CONCEPT, "--anchor", "a bag", "--batch-size", "1", "--out", "erased"])
    _, err = run.communicate(timeout=120)
    assert (
        run.returncode != 0
        and "--batch-size 1 is too small for --parts 1 in each of 2 process(es): give 2 or more" in err
    )
