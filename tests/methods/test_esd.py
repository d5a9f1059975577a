from copy import deepcopy

import pytest
import torch
from helpers.erasures import check_forget_loss, erasure_by, of_prompt, train

from salun_sd.errors import TrainingError
from salun_sd.methods.esd import ESD

TIMES = torch.arange(10) * 97 + 20


def anchors(row):
    return None if row is None else torch.full((10,), row)


@pytest.mark.parametrize("anchor", [None, 2])
def test_the_loss_is_the_equation_at_the_points_that_are_given(fresh_unet, schedule, forget, contexts, anchor):
    base = deepcopy(fresh_unet)
    erasure = erasure_by(ESD(scale=1.5), schedule, forget, anchors=anchors(anchor), empty=0, times=TIMES)

    def naive(batch):
        x_t, t = forget.latents[batch.forget], TIMES[batch.forget]
        concept, empty = (of_prompt(base, contexts, x_t, t, row) for row in (1, 0))
        start = concept if anchor is None else of_prompt(base, contexts, x_t, t, anchor)
        wanted = start - 1.5 * (concept - empty)
        return (of_prompt(fresh_unet, contexts, x_t, t, 1) - wanted).square().mean()

    check_forget_loss(fresh_unet, erasure, naive)


def test_the_papers_equation_is_the_one_of_twice_the_scale(pocket, schedule, forget, contexts):
    """e("") - eta (e(c) - e("")) with eta = 1."""
    [batch, *_] = (erasure := erasure_by(ESD(), schedule, forget, empty=0, times=TIMES)).batches()
    [term] = erasure.terms(batch, erasure.share(), pocket.unet.device)
    with torch.no_grad():
        concept, empty = (of_prompt(pocket.unet, contexts, term.rows.x_t, term.rows.t, row) for row in (1, 0))
        target = term.loss.of_base(pocket.unet, term.rows)
    torch.testing.assert_close(target, empty - (concept - empty), rtol=1e-3, atol=1e-4)


def test_an_anchor_equal_to_the_concept_is_no_anchor(fresh_unet, schedule, forget):
    losses = {}
    for row in (None, 1, 2):
        erasure = erasure_by(ESD(), schedule, forget, anchors=anchors(row), empty=0, times=TIMES)
        losses[row] = [step["forget"] for step in train(deepcopy(fresh_unet), erasure)]
    assert losses[1] == pytest.approx(losses[None], rel=1e-3) and losses[2] != pytest.approx(losses[None], rel=1e-3)


def test_the_prediction_goes_past_the_anchors(pocket, schedule, forget):
    unet = deepcopy(pocket.unet)
    erasure = erasure_by(ESD(), schedule, forget, anchors=anchors(2), empty=0, times=TIMES, steps=6)
    losses = [step["forget"] for step in train(unet, erasure, lr=3e-4)]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])


def test_a_scale_that_is_too_large_is_named_and_the_model_is_not_called_damaged(pocket, schedule, forget):
    erasure = erasure_by(ESD(scale=1e4), schedule, forget, empty=0, times=TIMES)
    with pytest.raises(TrainingError, match=r"UNet of here/model are forget .*--setting scale=10000 ") as caught:
        next(train(deepcopy(pocket.unet), erasure, name="here/model"))
    assert "damaged" not in str(caught.value)
