"""The file of what the base predicts."""

import pytest
import torch
from helpers.commands import files_up_to
from helpers.erasures import erasure_by

from salun_sd.core.mask import random_bits
from salun_sd.core.masked import MaskedAdam
from salun_sd.edit import predictions
from salun_sd.edit.predictions import Predictions
from salun_sd.errors import SalunError
from salun_sd.methods import loop
from salun_sd.methods.salun import SalUn


@pytest.fixture
def erasure(schedule, forget, retain):
    """It asks for two predictions: the anchor's, and those of the retain images."""
    anchors = torch.full((len(forget),), 2)
    return erasure_by(SalUn("base"), schedule, forget, retain, weight=1.0, target="base", steps=3, anchors=anchors)


def test_they_are_those_of_the_base_for_every_step_to_the_rounding(fresh_unet, erasure, tmp_path):
    known = predictions.of_base(tmp_path, fresh_unet, erasure)
    for step, batch in enumerate(erasure.batches(), 1):
        wanted = loop.of_base(fresh_unet, erasure.terms(batch, erasure.share(), fresh_unet.device))
        assert known(step).shape == wanted.shape == (2, erasure.batch_size, 4, 8, 8)
        torch.testing.assert_close(known(step), wanted, rtol=2**-8, atol=1e-6)


def test_training_needs_no_base_weights(fresh_unet, erasure, tmp_path):
    """The weights are changed before the first step: what is held is the model before that."""
    known = predictions.of_base(tmp_path, fresh_unet, erasure)
    before = known(3).clone()
    fresh_unet.conv_out.weight.data.mul_(2.0)
    adam = MaskedAdam(fresh_unet, random_bits({n: p.shape for n, p in fresh_unet.named_parameters()}, 0.3, 0), 1e-3)
    rows = list(loop.erase(fresh_unet, adam, erasure, of_base=known))
    assert torch.equal(known(3), before) and rows[0]["retain"] > 1e-6


@pytest.mark.parametrize("left", [0, 1, 4097, -1])
def test_a_file_that_was_cut_short_is_completed_with_the_same_bytes(fresh_unet, erasure, tmp_path, left):
    file = predictions.of_base(tmp_path, fresh_unet, erasure).file
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    predictions.of_base(tmp_path, fresh_unet, erasure)
    assert file.read_bytes() == whole


def test_a_whole_file_is_read_and_not_made_again(fresh_unet, erasure, tmp_path):
    first = predictions.of_base(tmp_path, fresh_unet, erasure)(1)
    fresh_unet.conv_out.weight.data.mul_(2.0)
    assert torch.equal(predictions.of_base(tmp_path, fresh_unet, erasure)(1), first)


def test_a_full_disk_is_said_with_the_file_and_loses_no_whole_step(tmp_path):
    kept, values = Predictions(tmp_path, (1, 2, 4, 8, 8)), torch.randn(2, 1, 2, 4, 8, 8)
    kept.append(values[0])
    with files_up_to(kept.file.stat().st_size + 9), pytest.raises(OSError, match=str(kept.file)):
        kept.append(values[1])
    assert len(kept) == 1
    kept.append(values[1])
    torch.testing.assert_close(kept(2), values[1], rtol=2**-8, atol=0)


def test_a_changed_byte_is_found(tmp_path):
    kept = Predictions(tmp_path, (1, 2, 4, 8, 8))
    for _ in range(2):
        kept.append(torch.randn(kept.shape))
    content = bytearray(kept.file.read_bytes())
    content[kept.bytes + 17] ^= 4
    kept.file.write_bytes(content)
    kept(1)
    with pytest.raises(SalunError, match="predictions"):
        kept(2)


def test_who_asks_for_nothing_writes_nothing(fresh_unet, schedule, forget, tmp_path):
    erasure = erasure_by(SalUn(), schedule, forget, anchors=torch.full((len(forget),), 2))
    assert predictions.of_base(tmp_path, fresh_unet, erasure)(1) is None and list(tmp_path.iterdir()) == []
