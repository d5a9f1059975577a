"""Trackers: each step once, pictures too, nothing that was not given; one that fails ends no run."""

import importlib.util
import socket

import pytest
from helpers.commands import until
from helpers.trackers import scalars
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime import tracker


def run(out, steps, names=("tensorboard",), settings=(("lr", 0.5), ("model", "/home/me"))) -> None:
    """A run of some steps, with a picture at the second."""
    Image.new("RGB", (8, 4), "red").save(out / "picture.png")
    with tracker.started(names, out, dict(settings)) as to:
        for step in steps:
            name = "picture.png" if step == 2 else "none.png"
            to.log(step, {"loss": step / 2, "drift": None}, {"samples": out / name})


def test_each_step_is_sent_once_though_a_run_comes_to_it_again(tmp_path):
    run(tmp_path, range(1, 5))
    run(tmp_path, range(2, 7))  # interrupted after 4, and resumed from a state of 1
    assert scalars(tmp_path) == {"loss": [(n, n / 2) for n in range(1, 7)], "samples": [(2, 8)]}


def test_without_a_name_nothing_is_written(tmp_path):
    run(tmp_path, range(3), names=())
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_a_tracker_that_fails_is_given_up_with_one_warning(tmp_path, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no room")

    with tracker.started(["tensorboard"], tmp_path, {}) as to:
        to.log(1, {"loss": 1.0})
        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
        for step in (2, 3, 4):
            to.log(step, {"loss": 1.0})
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "no room" in caplog.text
    assert scalars(tmp_path)["loss"] == [(1, 1.0)]


def test_one_that_cannot_start_is_said_before_the_run(tmp_path):
    (tmp_path / tracker.FOLDER).write_text("in the way")
    with pytest.raises(SalunError, match="--track tensorboard"):
        tracker.started(["tensorboard"], tmp_path, {})


def test_names_are_checked_and_packages_too(monkeypatch):
    assert tracker.check(None) == [] and tracker.check("tensorboard") == ["tensorboard"]
    assert tracker.check(["tensorboard"] * 2) == ["tensorboard"]
    with pytest.raises(UsageError, match="nothing .*tensorboard .*wandb"):
        tracker.check("nothing")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(UsageError, match=r"pip install 'salun-sd\[wandb\]'"):
        tracker.check(["tensorboard", "wandb"])


def steps_in(file) -> list[int]:
    """The steps in the small file of a run of wandb that was offline; empty until the run has ended. Its records stand
    behind a CRC, their length in two bytes, and a byte for their kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, records = file.read_bytes(), 7, []
    while at < len(content):
        end = at + 7 + int.from_bytes(content[at + 4 : at + 6], "little")
        records.append(Record.FromString(content[at + 7 : end]))
        at = end
    ended = any(record.HasField("exit") for record in records)
    return [record.history.step.num for record in records if record.HasField("history")] if ended else []


@pytest.mark.slow
def test_wandb_offline_holds_what_it_was_given_and_nothing_else(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, range(1, 4), names=["wandb"])
    run(tmp_path, range(2, 6), names=["wandb"])
    folder = tmp_path / tracker.FOLDER / "wandb"
    until(lambda: len([file for file in folder.glob("offline-run-*/*.wandb") if steps_in(file)]) == 2)
    first, second = sorted(folder.glob("offline-run-*/*.wandb"))
    assert (steps_in(first), steps_in(second)) == ([1, 2, 3], [4, 5])
    beside = [p for p in folder.glob("offline-run-*/files/**/*") if p.is_file()]
    assert [p.suffix for p in beside] == [".png"]
    content = first.read_bytes() + second.read_bytes()
    private = [socket.gethostname(), str(tmp_path), "/home/me", "pytest", "salun_sd/"]
    assert [word for word in private if len(word) > 3 and word.encode() in content] == []
