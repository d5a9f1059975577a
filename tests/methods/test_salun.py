from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from salun_sd.core.diffusion import noise_for
from salun_sd.core.saliency import GradientSum
from salun_sd.errors import SalunError
from salun_sd.methods.salun import forget_gradient, forget_loss
from salun_sd.runtime.finite import NotFinite


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


def test_a_saliency_of_a_broken_model_is_refused_at_the_first_batch(fresh_unet, schedule, forget, contexts):
    fresh_unet.conv_out.weight.data.fill_(1e30)
    how = {"guidance": 7.5, "seed": 0, "batch_size": 4, "name": "here/base"}
    with pytest.raises(NotFinite, match="UNet of here/base"), GradientSum(fresh_unet):
        next(forget_gradient(fresh_unet, schedule, forget, empty_of(contexts), **how))
