from copy import deepcopy

import pytest
import torch
from helpers.erasures import erasure_by, train

from salun_sd.core.diffusion import add_noise
from salun_sd.methods.finetune import Finetune


def test_it_trains_on_the_retain_images_alone(fresh_unet, schedule, retain, contexts):
    erasure = erasure_by(Finetune(), schedule, None, retain, weight=0.5)
    steps = train(fresh_unet, erasure)
    for batch in erasure.batches():
        t, noise = batch.t[4:], batch.noise[4:]
        x_t = add_noise(schedule, retain.latents[batch.retain], noise, t)
        with torch.no_grad():
            prediction = fresh_unet(x_t, t, contexts["context"][retain.which[batch.retain]]).sample
        row = next(steps)
        assert row.keys() == {"step", "retain", "loss"}
        assert row["retain"] == pytest.approx((prediction - noise).square().mean().item(), rel=1e-3)
        assert row["loss"] == pytest.approx(0.5 * row["retain"])


@pytest.mark.parametrize("target", ["base", "noise"])
def test_towards_the_base_it_does_nothing(fresh_unet, schedule, retain, target):
    base = deepcopy(fresh_unet)
    list(train(fresh_unet, erasure_by(Finetune(), schedule, None, retain, weight=1.0, target=target)))
    same = [torch.equal(a, b) for a, b in zip(base.parameters(), fresh_unet.parameters(), strict=True)]
    assert all(same) == (target == "base")
