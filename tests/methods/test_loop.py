"""The loop of an erasure, with SalUn's loss: any method goes through the same."""

from copy import deepcopy
from itertools import islice

import pytest
import torch
from helpers.erasures import train

from salun_sd.core.diffusion import add_noise, target
from salun_sd.core.mask import full_bits, random_bits
from salun_sd.core.masked import MaskedAdam
from salun_sd.errors import TrainingError
from salun_sd.methods.batches import Training
from salun_sd.methods.loop import Erasure, Retain, erase
from salun_sd.methods.salun import SalUn
from salun_sd.runtime.finite import NotFinite


def bits_of(unet, density=0.3):
    return random_bits({name: p.shape for name, p in unet.named_parameters()}, density, seed=5)


def erasure_of(
    schedule, forget, retain, *, anchors=None, concepts=None, anchor=2, anchor_from="current", retain_weight=0.5,
    retain_target="noise", steps=3, batch_size=4, seed=0, parts=1,
):  # fmt: skip
    anchors = torch.full((len(forget),), anchor) if anchors is None else anchors
    concepts = torch.zeros(len(forget), dtype=torch.int64) if concepts is None else concepts
    training = Training(schedule, forget, retain, concepts, anchors)
    return Erasure(SalUn(anchor_from), Retain(retain_weight, retain_target), training, steps, batch_size, seed, parts)


def run(unet, bits, schedule, forget, contexts, retain, *, lr=1e-3, name="the model", **settings):
    erasure = erasure_of(schedule, forget, retain, **settings)
    return list(train(unet, erasure, bits=bits, lr=lr, name=name))


def test_a_batch_in_parts_is_the_same_update_to_rounding(fresh_unet, schedule, forget, contexts, retain):
    rows, weights = {}, {}
    for parts in (1, 2, 4):
        unet = deepcopy(fresh_unet)
        rows[parts] = run(unet, bits_of(unet), schedule, forget, contexts, retain, parts=parts)
        weights[parts] = list(unet.parameters())
    for parts in (2, 4):
        assert [r["loss"] for r in rows[parts]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-3)
        for a, b in zip(weights[1], weights[parts], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # an update is 1e-3


def test_losses_are_the_formula(fresh_unet, schedule, forget, contexts, retain):
    """One step recomputed by hand from the same random numbers."""
    base = deepcopy(fresh_unet)
    [row] = run(fresh_unet, full_bits({n: p.shape for n, p in base.named_parameters()}), schedule, forget, contexts,
                retain, steps=1, retain_weight=0.3, seed=9)  # fmt: skip
    g = torch.Generator().manual_seed(9)
    f, r = torch.randperm(10, generator=g)[:4], torch.randperm(12, generator=g)[:4]
    t, noise = torch.randint(1000, (8,), generator=g), torch.randn(8, 4, 8, 8, generator=g)
    x0 = torch.cat([forget.latents[f], retain.latents[r]])
    x_t = add_noise(schedule, x0, noise, t)
    with torch.no_grad():
        concept = base(x_t[:4], t[:4], contexts["context"][1:2].expand(4, -1, -1)).sample
        anchor = base(x_t[:4], t[:4], contexts["context"][2:3].expand(4, -1, -1)).sample
        kept_images = base(x_t[4:], t[4:], contexts["context"][retain.which[r]]).sample
    wanted = ((concept - anchor) ** 2).mean(), ((kept_images - target(schedule, x0, noise, t)[4:]) ** 2).mean()
    assert row["forget"] == pytest.approx(wanted[0].item(), rel=1e-4)
    assert row["retain"] == pytest.approx(wanted[1].item(), rel=1e-4)
    assert row["loss"] == pytest.approx((wanted[0] + 0.3 * wanted[1]).item(), rel=1e-4)


def test_an_anchor_equal_to_the_concept_leaves_nothing_to_forget(fresh_unet, schedule, forget, contexts, retain):
    bits = bits_of(fresh_unet)
    same = run(deepcopy(fresh_unet), bits, schedule, forget, contexts, retain, anchor=1)
    other = run(fresh_unet, bits, schedule, forget, contexts, retain, anchor=2)
    assert max(row["forget"] for row in same) < 1e-10 < min(row["forget"] for row in other)


def test_the_concepts_prediction_goes_to_the_anchors(pocket, schedule, forget, contexts, retain):
    """On the bundled checkpoint, against its own first steps."""
    unet = deepcopy(pocket.unet)
    rows = run(unet, bits_of(unet, 0.5), schedule, forget, contexts, retain, steps=16, anchor_from="base",
               retain_weight=0, lr=5e-4)  # fmt: skip
    start, end = (sum(row["forget"] for row in part) for part in (rows[:4], rows[-4:]))
    assert end < 0.5 * start


def test_same_seed_same_bytes_other_seed_other_bytes(fresh_unet, schedule, forget, contexts, retain):
    trained = []
    for seed in (0, 0, 1):
        unet = deepcopy(fresh_unet)
        run(unet, bits_of(unet), schedule, forget, contexts, retain, seed=seed)
        trained.append(torch.cat([p.detach().flatten() for p in unet.parameters()]))
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_the_base_anchor_is_not_the_current_one(fresh_unet, schedule, forget, contexts, retain):
    rows = {
        source: run(deepcopy(fresh_unet), bits_of(fresh_unet), schedule, forget, contexts, retain, anchor_from=source)
        for source in ("current", "base")
    }
    assert rows["current"][0] == rows["base"][0]  # before the first update they are the same weights
    assert rows["current"][2]["forget"] != rows["base"][2]["forget"]


def test_an_exploding_loss_names_the_step_and_what_to_lower(fresh_unet, schedule, forget, contexts, retain):
    with pytest.raises(TrainingError, match=r"step \d+ .*--lr.*100"):
        run(fresh_unet, bits_of(fresh_unet), schedule, forget, contexts, retain, steps=20, lr=100.0)


@pytest.mark.parametrize("settings", [{}, {"parts": 2}, {"anchor_from": "base"}])
@pytest.mark.parametrize("value", [float("nan"), 1e30, 1e3])
def test_a_model_that_is_broken_before_training_is_named_and_the_learning_rate_is_not(
    fresh_unet, schedule, forget, contexts, retain, value, settings
):
    """NaN, a loss beyond float32, and one that no model has."""
    fresh_unet.conv_out.weight.data.fill_(value)
    with pytest.raises(TrainingError if value == 1e3 else NotFinite, match="UNet of here/erased") as caught:
        run(fresh_unet, bits_of(fresh_unet), schedule, forget, contexts, retain, name="here/erased", **settings)
    assert "--lr" not in str(caught.value) and ("damaged" in str(caught.value)) == (value != 1e3)


def test_a_gradient_that_is_not_finite_at_the_first_step_is_of_the_model_or_the_retain_weight(
    fresh_unet, schedule, forget, contexts, retain
):
    with pytest.raises(NotFinite, match="UNet of .*--retain-weight.*1e\\+39"):
        run(fresh_unet, bits_of(fresh_unet), schedule, forget, contexts, retain, retain_weight=1e39)


def test_a_run_that_goes_on_draws_the_same_numbers(fresh_unet, schedule, forget, contexts, retain):
    whole = run(deepcopy(fresh_unet), bits_of(fresh_unet), schedule, forget, contexts, retain, steps=4)
    adam, erasure = MaskedAdam(fresh_unet, bits_of(fresh_unet), 1e-3), erasure_of(schedule, forget, retain, steps=4)
    rows = []
    for _ in range(2):  # a second loop goes on where the first was left
        rows += islice(erase(fresh_unet, adam, erasure), 2)
    assert rows == whole


def test_each_image_goes_to_its_own_concepts_anchor(fresh_unet, schedule, forget, contexts, retain):
    """Images whose anchor is their own prompt have nothing to forget; the others have."""
    n, losses = len(forget), {}
    for name, anchors in (("own", torch.ones(n)), ("other", torch.full((n,), 2)), ("mixed", 1 + torch.arange(n) % 2)):
        [row] = run(deepcopy(fresh_unet), bits_of(fresh_unet), schedule, forget, contexts, retain, lr=1e-9, steps=1,
                    anchors=anchors.long(), concepts=torch.arange(n) % 2)  # fmt: skip
        losses[name] = row["forget"]
    assert losses["own"] < 1e-10 and 0.2 * losses["other"] < losses["mixed"] < 0.8 * losses["other"]


def test_held_to_the_base_the_retain_loss_is_the_change_of_the_prediction(
    fresh_unet, schedule, forget, contexts, retain
):
    """Zero before the first update; afterwards below the denoising loss, which has the noise's own variance."""
    losses = {}
    for target_of in ("base", "noise"):
        unet = deepcopy(fresh_unet)
        rows = run(unet, bits_of(unet), schedule, forget, contexts, retain, retain_target=target_of)
        losses[target_of] = [row["retain"] for row in rows]
    assert losses["base"][0] < 1e-12 < losses["base"][2] < losses["noise"][2]


def test_without_images_to_retain_there_is_no_such_loss(fresh_unet, schedule, forget, contexts, retain):
    rows = run(fresh_unet, bits_of(fresh_unet), schedule, forget, contexts, None, steps=2)
    assert [set(row) for row in rows] == [{"step", "forget", "loss"}] * 2
    assert all(row["loss"] == row["forget"] > 0 for row in rows)
