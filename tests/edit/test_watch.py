"""When a training is measured, when it is over, and when it is stopped."""

from copy import deepcopy

import pytest
import torch
from helpers.commands import fails
from helpers.runs import PAIR, erased_fingerprint, record_of

from salun_sd.cli import app as cli
from salun_sd.edit.curve import svg
from salun_sd.edit.watch import COST, Watch
from salun_sd.errors import TrainingError
from salun_sd.methods.batches import Training
from salun_sd.methods.loop import Erasure, Retain
from salun_sd.methods.salun import SalUn
from salun_sd.runtime import seals


def watch_of(unet, schedule, forget, retain, *, steps=60, batch_size=8, probe_every=None, until=None) -> Watch:
    training = Training(schedule, forget, retain, torch.zeros(len(forget)).long(), torch.full((len(forget),), 2))
    erasure = Erasure(SalUn(), Retain(0.5), training, steps, batch_size, seed=0)
    settings = {"probe_every": probe_every, "until": until, "lr": 1e-4, "concepts": [{"prompt": "a sneaker"}]}
    return Watch(unet, erasure, settings, "here/base")


def moved_to(unet, amount):
    """Change the model in place: its last layer grows."""
    with torch.no_grad():
        unet.conv_out.weight *= 1 + amount


@pytest.mark.parametrize("steps, batch_size", [(20, 2), (60, 32), (100, 8), (1000, 1)])
def test_the_probe_is_as_frequent_as_its_cost_allows(fresh_unet, schedule, forget, retain, steps, batch_size):
    watch = watch_of(fresh_unet, schedule, forget, retain, steps=steps, batch_size=batch_size)

    def cost(every):  # in forward passes of a row: two measures before the first step, then the measures
        return (2 + len({*range(every, steps, every), steps})) * (2 * 4 + 8)

    allowed = COST * 3 * 2 * batch_size * steps
    if watch.every < steps:
        assert cost(watch.every) <= allowed
    if watch.every > 1:
        assert cost(watch.every - 1) > allowed
    due = [step for step in (*range(1, min(2 * watch.every, steps)), steps) if watch.at(step)]
    assert due == sorted({watch.every, steps})


def test_without_a_probe_nothing_is_held_out(fresh_unet, schedule, forget, retain):
    watch = watch_of(fresh_unet, schedule, forget, retain, probe_every=0)
    assert watch.erasure.training.retain is retain and watch.at(60) == {} and watch.last is None
    assert len(watch_of(fresh_unet, schedule, forget, retain).erasure.training.retain) == len(retain) - 1
    alone = watch_of(fresh_unet, schedule, forget, None, probe_every=1)
    assert alone.at(1) == {"moved": {"a sneaker": 0.0}, "drift": None}


def test_a_model_that_is_ruined_is_stopped_with_what_to_lower(fresh_unet, schedule, forget, retain):
    watch = watch_of(fresh_unet, schedule, forget, retain, probe_every=4)
    moved_to(fresh_unet, 0.2)
    assert 0.02 < watch.at(4)["drift"] < 0.1
    moved_to(fresh_unet, 1)
    assert watch.at(5) == {}
    with pytest.raises(TrainingError, match="step 8 .*--lr.*0.0001.*--steps.*--retain-weight.*0.5"):
        watch.at(8)
    moved_to(fresh_unet, float("nan"))
    with pytest.raises(TrainingError, match="step 60 .*--lr"):
        watch.at(60)


def test_a_new_watch_of_the_same_run_measures_the_same_and_knows_whether_it_is_over(
    fresh_unet, schedule, forget, retain
):
    """As when a run is killed after a step and resumes: the base's weights come first, then the trained ones. A small
    change moves the concept to its anchor, and the opposite one away from it."""
    over = []
    for amount in (0.01, -0.01):
        watches, measured = [], []
        for _ in range(2):
            unet = deepcopy(fresh_unet)
            watches.append(watch_of(unet, schedule, forget, retain, probe_every=4, until=1e-6))
            assert not watches[-1].at(4)["moved"]["a sneaker"] and not watches[-1].is_over
            moved_to(unet, amount)
            measured.append(watches[-1].at(8))
        assert measured[0] == measured[1] and watches[0].is_over == watches[1].is_over
        assert watches[1].last == {"step": 8, **measured[0]}
        over.append(watches[0].is_over)
    assert sorted(over) == [False, True]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of an erasure with some more options, and the rows that it measured."""

    def run(*argv):
        out = tmp_path_factory.mktemp("run") / "out"
        cli.run(["erase", tiny, *PAIR, "--samples", "8", "--retain-prompts", "anchor", "--mask", "random:0.5", "--lr",
                 "1e-4", "--batch-size", "4", "--dtype", "float32", "--out", str(out), *argv])  # fmt: skip
        return out, list(seals.read_lines(out.with_name("out.run") / "losses.jsonl"))

    return run


def test_until_ends_at_the_first_measure_that_reaches_it_and_measuring_changes_no_weight(run):
    often, rows = run("--steps", "6", "--probe-every", "1")
    moved = [row["moved"]["a photo of a sneaker"] for row in rows]
    until = max(moved[:4])
    assert 0 < until <= 1, moved
    stopped, kept = run("--steps", "6", "--probe-every", "1", "--until", str(until))
    assert kept == rows[: 1 + moved.index(until)] and record_of(stopped)["probe"] == {
        "step": len(kept),
        **measured(kept),
    }
    short, few = run("--steps", str(len(kept)), "--probe-every", "3")
    assert erased_fingerprint(stopped) == erased_fingerprint(short) != erased_fingerprint(often)
    assert [row["step"] for row in few if "moved" in row] == sorted({*range(3, len(kept), 3), len(kept)})
    assert few[-1] == kept[-1] and few[0].items() <= kept[0].items()


def measured(rows) -> dict:
    return {name: rows[-1][name] for name in ("moved", "drift")}


def test_until_without_a_probe_is_refused(tiny, tmp_path, capsys):
    argv = ["erase", tiny, *PAIR, "--out", str(tmp_path / "out"), "--until", "0.9", "--probe-every", "0", "--dry-run"]
    assert "--until" in fails(argv, 2, capsys)


def test_the_curve_is_a_picture_whatever_the_concept_is_called(tmp_path):
    from xml.etree import ElementTree

    names = 'a <b> & "c"', "\x00\ud800"
    rows = [{"step": step, "moved": dict.fromkeys(names, step / 9 - 0.2), "drift": None} for step in (3, 6, 9)]
    picture = ElementTree.fromstring(svg(names[0], rows).encode())
    lines = [element for element in picture.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2 and all(len(line.get("points").split()) == 4 for line in lines)  # none of the drift
    assert ElementTree.fromstring(svg("", []).encode()) is not None
