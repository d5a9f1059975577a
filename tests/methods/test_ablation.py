from copy import deepcopy

import pytest
from helpers.erasures import check_forget_loss, erasure_by, of_prompt, train
from torch import full

from salun_sd.core.diffusion import add_noise
from salun_sd.methods.ablation import Ablation


@pytest.mark.parametrize(("target", "anchor_from"), [("anchor", "current"), ("anchor", "base"), ("noise", "base")])
def test_the_loss_is_the_equation(fresh_unet, schedule, forget, contexts, target, anchor_from):
    weights = {"current": fresh_unet, "base": deepcopy(fresh_unet)}[anchor_from]
    erasure = erasure_by(Ablation(target=target, anchor_from=anchor_from), schedule, forget, anchors=full((10,), 2))
    assert erasure.asks == ((target, anchor_from) == ("anchor", "base"))

    def naive(batch):
        t, noise = batch.t[:4], batch.noise[:4]
        x_t = add_noise(schedule, forget.latents[batch.forget], noise, t)
        wanted = noise if target == "noise" else of_prompt(weights, contexts, x_t, t, 2)
        return (of_prompt(fresh_unet, contexts, x_t, t, 1) - wanted).square().mean()

    check_forget_loss(fresh_unet, erasure, naive)


@pytest.mark.parametrize("target", ["anchor", "noise"])
def test_an_anchor_equal_to_the_concept_leaves_nothing_to_do_but_for_the_noise(fresh_unet, schedule, forget, target):
    steps = train(fresh_unet, erasure_by(Ablation(target=target), schedule, forget, anchors=full((10,), 1)))
    assert all((step["forget"] < 1e-10) == (target == "anchor") for step in steps)
