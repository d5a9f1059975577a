from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from salun_sd.core.diffusion import add_noise, noise_for, target
from salun_sd.core.mask import full_bits, kept, random_bits
from salun_sd.core.masked import MaskedAdam
from salun_sd.core.saliency import GradientSum
from salun_sd.errors import SalunError
from salun_sd.methods.salun import balanced, batches, erase, forget_gradient, forget_loss
from salun_sd.runtime.finite import NotFinite


def bits_of(unet, density=0.3):
    return random_bits({name: p.shape for name, p in unet.named_parameters()}, density, seed=5)


def run(unet, bits, schedule, forget, contexts, retain, *, anchor=2, lr=1e-3, **settings):
    usual = {"steps": 3, "batch_size": 4, "retain_weight": 0.5, "anchor_from": "current", "seed": 0}
    settings = {**usual, **settings}
    adam = MaskedAdam(unet, bits, lr, holds=settings.get("parts", 1) > 1, keeps_base=settings["anchor_from"] == "base")
    anchors, concepts = torch.full((len(forget),), anchor), torch.zeros(len(forget), dtype=torch.int64)
    return list(erase(unet, adam, schedule, forget, anchors, concepts, retain, **settings))


def empty_of(contexts):
    return {"context": contexts["context"][:1]}


def saliency_of(unet, schedule, forget, contexts, *, guidance=7.5, batch_size=4, seed=0):
    sums, how = GradientSum(unet), {"guidance": guidance, "seed": seed, "batch_size": batch_size}
    with sums:
        done = list(forget_gradient(unet, schedule, forget, empty_of(contexts), **how))
    assert done[-1] == len(forget) and len(done) == -(-len(forget) // batch_size)
    return sums.result(len(forget))


def naive_losses(unet, schedule, forget, contexts, guidance, seed=0):
    """By the formula written out, conditional and unconditional predictions in two passes."""
    t, noise = noise_for(range(len(forget)), (4, 8, 8), 1000, seed=seed)
    a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = a**0.5 * forget.latents + (1 - a) ** 0.5 * noise
    conditional, unconditional = (
        unet(x_t, t, contexts["context"][row : row + 1].expand(10, -1, -1)).sample for row in (1, 0)
    )
    guided = (1 + guidance) * conditional - guidance * unconditional
    return -F.mse_loss(guided, noise, reduction="none").mean((1, 2, 3))


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_the_forgetting_loss_is_the_formula(fresh_unet, schedule, forget, contexts, guidance):
    t, noise = noise_for(range(10), (4, 8, 8), 1000, seed=0)
    condition = forget.condition(torch.arange(10))
    got = forget_loss(fresh_unet, schedule, forget.latents, condition, empty_of(contexts), noise, t, guidance)
    assert got.shape == (10,) and (got < 0).all()
    torch.testing.assert_close(got, naive_losses(fresh_unet, schedule, forget, contexts, guidance), rtol=1e-4, atol=0)


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_the_saliency_is_its_gradient(fresh_unet, schedule, forget, contexts, guidance):
    """The gradient of the whole loss in one go; with guidance, through both predictions."""
    got = saliency_of(fresh_unet, schedule, forget, contexts, guidance=guidance, batch_size=3)
    loss = naive_losses(fresh_unet, schedule, forget, contexts, guidance).mean()
    names, parameters = zip(*fresh_unet.named_parameters(), strict=True)
    assert set(got) == set(names)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(got[name], gradient.abs(), rtol=1e-3, atol=1e-5 * got[name].max().item())


def test_the_saliency_is_independent_of_the_batch_size(fresh_unet, schedule, forget, contexts):
    one, ten = (saliency_of(fresh_unet, schedule, forget, contexts, batch_size=b) for b in (1, 10))
    for name in one:
        torch.testing.assert_close(one[name], ten[name], rtol=1e-3, atol=1e-4 * one[name].max().item())


def test_the_saliency_is_the_seeds_and_leaves_the_weights_alone(fresh_unet, schedule, forget, contexts):
    before = {name: p.detach().clone() for name, p in fresh_unet.named_parameters()}
    first, again, other = (saliency_of(fresh_unet, schedule, forget, contexts, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in fresh_unet.named_parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_saliency_that_is_not_finite_is_an_error(fresh_unet, schedule, forget, contexts):
    latents = forget.latents.clone()
    latents[3] = float("nan")
    with pytest.raises(SalunError, match="finite"):
        saliency_of(fresh_unet, schedule, replace(forget, latents=latents), contexts)


def test_outside_the_mask_nothing_moves_and_inside_almost_everything_does(
    fresh_unet, schedule, forget, contexts, retain
):
    base, bits = deepcopy(fresh_unet), bits_of(fresh_unet)
    run(fresh_unet, bits, schedule, forget, contexts, retain)
    inside = 0
    for (name, before), after in zip(base.named_parameters(), fresh_unet.parameters(), strict=True):
        assert torch.equal(before[~bits[name]], after[~bits[name]]), name
        inside += int((before != after)[bits[name]].sum())
    assert inside > 0.9 * kept(bits)[0]


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
    with pytest.raises(SalunError, match=r"step \d+ .*--lr.*100") as caught:
        run(fresh_unet, bits_of(fresh_unet), schedule, forget, contexts, retain, steps=20, lr=100.0)
    assert not isinstance(caught.value, NotFinite)


@pytest.mark.parametrize("settings", [{}, {"parts": 2}, {"anchor_from": "base"}])
@pytest.mark.parametrize("value", [float("nan"), 1e30, 1e3])
def test_a_model_that_is_broken_before_training_is_named_and_the_learning_rate_is_not(
    fresh_unet, schedule, forget, contexts, retain, value, settings
):
    """NaN, a loss beyond float32, and one that no model has."""
    fresh_unet.conv_out.weight.data.fill_(value)
    with pytest.raises(NotFinite, match="UNet of here/erased") as caught:
        run(fresh_unet, bits_of(fresh_unet), schedule, forget, contexts, retain, name="here/erased", **settings)
    assert "--lr" not in str(caught.value)


def test_a_saliency_of_a_broken_model_is_refused_at_the_first_batch(fresh_unet, schedule, forget, contexts):
    fresh_unet.conv_out.weight.data.fill_(1e30)
    how = {"guidance": 7.5, "seed": 0, "batch_size": 4, "name": "here/base"}
    with pytest.raises(NotFinite, match="UNet of here/base"), GradientSum(fresh_unet):
        next(forget_gradient(fresh_unet, schedule, forget, empty_of(contexts), **how))


def test_a_gradient_that_is_not_finite_at_the_first_step_is_of_the_model_or_the_retain_weight(
    fresh_unet, schedule, forget, contexts, retain
):
    with pytest.raises(NotFinite, match="UNet of .*--retain-weight.*1e\\+39"):
        run(fresh_unet, bits_of(fresh_unet), schedule, forget, contexts, retain, retain_weight=1e39)


def test_a_run_that_goes_on_draws_the_same_numbers(fresh_unet, schedule, forget, contexts, retain):
    whole = run(deepcopy(fresh_unet), bits_of(fresh_unet), schedule, forget, contexts, retain, steps=4)
    adam, n = MaskedAdam(fresh_unet, bits_of(fresh_unet), 1e-3), len(forget)
    settings = {"steps": 4, "batch_size": 4, "retain_weight": 0.5, "anchor_from": "current", "seed": 0}
    anchors, concepts = torch.full((n,), 2), torch.zeros(n, dtype=torch.int64)
    rows = []
    for _ in range(2):  # a second loop goes on where the first was left
        rows += islice(erase(fresh_unet, adam, schedule, forget, anchors, concepts, retain, **settings), 2)
    assert rows == whole


def test_every_example_is_seen_once_a_pass():
    seen = torch.cat(list(islice(batches(10, 4, torch.Generator().manual_seed(0)), 5)))
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert len(next(batches(3, 8, torch.Generator()))) == 8


def test_concepts_have_equal_shares_of_every_batch_however_many_images_each_has():
    concepts = torch.tensor([0] * 30 + [1] * 3 + [2] * 7)
    drawn = list(islice(balanced(concepts, 8, torch.Generator().manual_seed(0)), 9))
    for batch in drawn:
        shares = concepts[batch].bincount(minlength=3)
        assert len(batch) == 8 and shares.max() - shares.min() <= 1
    everything = torch.cat(drawn)
    assert concepts[everything].bincount().tolist() == [24, 24, 24]
    assert all((everything == i).sum() == 8 for i in range(30, 33))  # 24 / 3: shuffled passes, nothing left out
    alone = islice(balanced(torch.zeros(10), 4, torch.Generator().manual_seed(3)), 5)
    usual = islice(batches(10, 4, torch.Generator().manual_seed(3)), 5)
    assert all(torch.equal(a, b) for a, b in zip(alone, usual, strict=True))


def test_each_image_goes_to_its_own_concepts_anchor(fresh_unet, schedule, forget, contexts, retain):
    """Images whose anchor is their own prompt have nothing to forget; the others have."""
    bits, n = bits_of(fresh_unet), len(forget)
    settings = {"steps": 1, "batch_size": 4, "retain_weight": 0.0, "anchor_from": "current", "seed": 0}
    losses = {}
    for name, anchors in (("own", torch.ones(n)), ("other", torch.full((n,), 2)), ("mixed", 1 + torch.arange(n) % 2)):
        halves = torch.arange(n) % 2
        unet = deepcopy(fresh_unet)
        adam = MaskedAdam(unet, bits, 1e-9)
        loop = erase(unet, adam, schedule, forget, anchors.long(), halves, retain, **settings)
        losses[name] = next(loop)["forget"]
    assert losses["own"] < 1e-10 and 0.2 * losses["other"] < losses["mixed"] < 0.8 * losses["other"]
