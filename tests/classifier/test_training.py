"""The training loop: the same bits after a kill, nothing outside a mask, statistics that stay, NaN by name."""

import pytest
import torch
from helpers.pictures import classifier, task

from salun_sd.classifier.methods.ft import ft
from salun_sd.classifier.methods.task import Task
from salun_sd.classifier.training import Schedule, train
from salun_sd.core.mask import random_bits
from salun_sd.errors import SalunError

SCHEDULE = Schedule(3, 0.05, (2,))


def losses(own: Task, stop_at=None):
    def of_epoch(epoch, generator):
        if epoch == stop_at:
            raise KeyboardInterrupt
        return ft(own, epoch, generator)

    return of_epoch


def trained(own=None, **rest):
    own = own or task({}, augment="crop-flip")
    train(own.classifier, losses(own), SCHEDULE, seed=1, what="ft", **rest)
    return own.classifier.net.state_dict()


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path):
    whole, state, own = trained(), tmp_path / "state", task({}, augment="crop-flip")
    with pytest.raises(KeyboardInterrupt):
        train(own.classifier, losses(own, 2), SCHEDULE, seed=1, what="ft", state=state, run={"a": 1})
    again = task({}, augment="crop-flip")
    train(again.classifier, losses(again, 0), SCHEDULE, seed=1, what="ft", state=state, run={"a": 1})  # not from 0
    assert equal(whole, again.classifier.net.state_dict())


def test_a_state_of_another_run_or_a_damaged_one_is_not_used(tmp_path):
    state, own = tmp_path / "state", task({})
    train(own.classifier, losses(own), SCHEDULE, seed=1, what="ft", state=state, run={"a": 1})
    for run, content in (({"a": 2}, state.read_bytes()), ({"a": 1}, state.read_bytes()[:-8] + bytes(8))):
        state.write_bytes(content)
        with pytest.raises(KeyboardInterrupt):  # it begins with epoch 0
            again = task({})
            train(again.classifier, losses(again, 0), SCHEDULE, seed=1, what="ft", state=state, run=run)


@pytest.mark.parametrize("keep", [False, True])
def test_outside_the_mask_no_bit_moves_and_statistics_stay_where_that_is_asked(keep):
    before = classifier().net.state_dict()
    bits = random_bits({n: p.shape for n, p in classifier().net.named_parameters()}, 0.3, 0)
    after = trained(bits=bits, keep_statistics=keep)
    moved = {name: ~torch.eq(after[name], before[name]) for name in before}
    assert not any((moved[name] & ~bits[name]).any() for name in bits) and any(moved[n].any() for n in bits)
    assert any(moved[name].any() for name in before if "running" in name) != keep


def test_the_rate_falls_and_the_training_stops_at_a_loss_that_is_no_number():
    assert [round(Schedule(4, 0.1, (2, 3)).rate(e), 6) for e in range(4)] == [0.1, 0.1, 0.01, 0.001]
    own = task({})
    with pytest.raises(SalunError, match="epoch 1"):
        train(own.classifier, losses(own), Schedule(2, 1e12), seed=0, what="ft")
