"""erase and evaluate with --track: which numbers are sent, and that a resumed run sends none twice."""

import importlib.util
import json
import os
import subprocess

import pytest
from helpers.commands import ctrl_c_at, fails, fresh
from helpers.runs import PAIR
from helpers.trackers import scalars

import salun_sd
from salun_sd.audit.report import numbers
from salun_sd.cli import app as cli

TRAIN = [
    *PAIR,
    "--samples",
    "8",
    "--retain-prompts",
    "anchor",
    "--mask",
    "none",
    "--batch-size",
    "2",
    "--track",
    "tensorboard",
]


@pytest.mark.slow
def test_an_erasure_sends_its_losses_probe_memory_and_samples(tiny, tmp_path):
    out = tmp_path / "erased"
    cli.run(["erase", tiny, *TRAIN, "--steps", "3", "--probe-every", "1", "--sample-every", "2", "--out", str(out)])
    sent = scalars(tmp_path / "erased.run")
    rows = [json.loads(line) for line in (tmp_path / "erased.run" / "losses.jsonl").read_text().splitlines()]
    for name, key in (("loss/forget", "forget"), ("loss/retain", "retain"), ("loss", "loss")):
        assert sent[name] == [(row["step"], pytest.approx(row[key], abs=1e-6)) for row in rows]
    assert [step for step, _ in sent["moved/1"]] == [step for step, _ in sent["drift"]] == [1, 2, 3]
    assert all(0.01 < peak < 100 for _, peak in sent["memory/peak_gib"])
    assert [step for step, _ in sent["samples"]] == [0, 2]
    assert "track" not in json.loads((out / "salun.json").read_text())["settings"]
    cli.run(["erase", tiny, *TRAIN, "--steps", "3", "--probe-every", "1", "--sample-every", "2", "--out", str(out)])
    assert scalars(tmp_path / "erased.run") == sent  # it was finished


def test_an_audit_sends_its_metrics_with_the_ends_of_their_intervals(tiny, tmp_path):
    report = salun_sd.evaluate(
        tiny, prompts="pocket", limit=2, denoising_steps=1, against=tiny, concept_class="t-shirt",
        track="tensorboard", out=tmp_path / "audit",
    )  # fmt: skip
    sent = scalars(tmp_path / "audit")
    assert {name: value for name, [(_, value)] in sent.items()} == pytest.approx(numbers(report), abs=1e-6)
    assert {"ua", "ua/low", "ua/high", "flag_rate", "against/ua"} <= sent.keys()
    assert sent["ua/low"] < sent["ua/high"]
    salun_sd.evaluate(
        tiny, prompts="pocket", limit=2, denoising_steps=1, out=tmp_path / "audit"
    )  # it is an audit still


@pytest.mark.slow
def test_a_resumed_erasure_sends_no_step_twice(tiny, tmp_path, capsys):
    erase = ["erase", tiny, *TRAIN, "--steps", "12", "--save-every", "1e-9", "--out", tmp_path / "erased"]
    with ctrl_c_at(tmp_path / "erased.run" / "state.safetensors", times=5):
        fails(erase, 130, capsys)
    before = scalars(tmp_path / "erased.run")["loss/forget"]
    cli.run([str(word) for word in erase])
    after = scalars(tmp_path / "erased.run")["loss/forget"]
    assert 3 < len(before) < 12 and after[: len(before)] == before
    assert [step for step, _ in after] == [*range(1, 13)]


@pytest.mark.parametrize("command", ["erase pocket --concept x --anchor y", "evaluate pocket --prompts pocket"])
def test_an_absent_package_is_said_before_anything(command, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    line = [*command.split(), "--out", tmp_path / "out"]
    assert "salun-sd[wandb]" in fails([*line, "--track", "wandb"], 2, capsys)
    assert "nothing" in fails([*line, "--track", "nothing"], 2, capsys) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_wandb_without_an_account_says_what_to_type_and_nothing_is_left(tiny, tmp_path):
    pytest.importorskip("wandb")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    argv = ["-m", "salun_sd", "erase", tiny, *PAIR, "--samples", "2", "--track", "wandb", "--out", tmp_path / "erased"]
    process = fresh(argv, env=variables | {"NETRC": str(tmp_path / "none")}, stderr=subprocess.PIPE)
    last = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 1 and "wandb login" in last and list(tmp_path.iterdir()) == []
