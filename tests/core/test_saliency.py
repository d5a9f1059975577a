from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from salun_sd.core.diffusion import noise_for
from salun_sd.core.saliency import Saliency
from salun_sd.errors import SalunError


def saliency_of(unet, schedule, forget, contexts, *, guidance=7.5, batch_size=4, seed=0):
    accumulator = Saliency(unet, schedule, {"context": contexts["context"][:1]}, guidance, seed)
    assert list(accumulator.accumulate(forget, batch_size))[-1] == len(forget)
    return accumulator.result()


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_equals_a_naive_recomputation(fresh_unet, schedule, forget, contexts, guidance):
    """The gradient of the whole loss in one go, by the formula written out with diffusers' numbers."""
    got = saliency_of(fresh_unet, schedule, forget, contexts, guidance=guidance, batch_size=3)
    t, noise = noise_for(range(len(forget)), (4, 8, 8), 1000, seed=0)
    a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = a**0.5 * forget.latents + (1 - a) ** 0.5 * noise
    conditional = fresh_unet(x_t, t, contexts["context"][1:2].expand(10, -1, -1)).sample
    unconditional = fresh_unet(x_t, t, contexts["context"][:1].expand(10, -1, -1)).sample
    loss = -F.mse_loss((1 + guidance) * conditional - guidance * unconditional, noise)
    names, parameters = zip(*fresh_unet.named_parameters(), strict=True)
    assert set(got) == set(names)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(got[name], gradient.abs(), rtol=1e-3, atol=1e-5 * got[name].max().item())


def test_is_independent_of_batch_size(fresh_unet, schedule, forget, contexts):
    one, ten = (saliency_of(fresh_unet, schedule, forget, contexts, batch_size=b) for b in (1, 10))
    for name in one:
        torch.testing.assert_close(one[name], ten[name], rtol=1e-3, atol=1e-4 * one[name].max().item())


def test_sums_signed_gradients_before_the_absolute_value(fresh_unet, schedule, forget, contexts):
    """|sum g| <= sum |g|, and strictly smaller somewhere: the two are told apart."""
    whole = saliency_of(fresh_unet, schedule, forget, contexts)
    separate = {name: torch.zeros_like(s) for name, s in whole.items()}
    for i in range(len(forget)):
        one = Saliency(fresh_unet, schedule, {"context": contexts["context"][:1]}, 7.5, 0)
        single = replace(forget, latents=forget.latents[: i + 1], which=forget.which[: i + 1])
        for done in one.accumulate(single, 1):
            if done <= i:
                for total in one.sums.values():
                    total.zero_()  # keep the last image's gradient alone
        for name, s in one.result().items():
            separate[name] += s * (i + 1) / len(forget)
    for name in whole:
        assert (whole[name] <= separate[name] * 1.001 + 1e-4 * separate[name].max()).all(), name
    assert sum((whole[n] < 0.5 * separate[n]).sum().item() for n in whole) > 1000


def test_leaves_the_weights_alone_and_depends_on_the_seed(fresh_unet, schedule, forget, contexts):
    before = {name: p.clone() for name, p in fresh_unet.named_parameters()}
    first = saliency_of(fresh_unet, schedule, forget, contexts)
    assert all(torch.equal(before[name], p) for name, p in fresh_unet.named_parameters())
    assert all(p.grad is None for p in fresh_unet.parameters())
    again = saliency_of(fresh_unet, schedule, forget, contexts)
    other = saliency_of(fresh_unet, schedule, forget, contexts, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_value_that_is_not_finite_is_named(fresh_unet, schedule, forget, contexts):
    latents = forget.latents.clone()
    latents[3] = float("nan")
    with pytest.raises(SalunError, match="not finite"):
        saliency_of(fresh_unet, schedule, replace(forget, latents=latents), contexts)
