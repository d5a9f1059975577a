"""Adam on compact state against torch's dense one."""

from copy import deepcopy

import pytest
import torch

from salun_sd.checkpoint.tensors import given
from salun_sd.core.mask import full_bits, random_bits
from salun_sd.core.masked import MaskedAdam


def shapes_of(unet):
    return {name: p.shape for name, p in unet.named_parameters()}


def tensors_of(unet):
    return {name: given(p.detach().clone()) for name, p in unet.named_parameters()}


def loss_of(unet, contexts, seed):
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return unet(noise, 10 * seed, contexts["context"][:1].expand(4, -1, -1)).sample.pow(2).mean()


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_equals_dense_adam_with_a_masked_gradient(fresh_unet, contexts, density, parts, clip):
    """Over steps that move the weights; bit for bit where the gradient is neither summed nor scaled."""
    dense, shapes = deepcopy(fresh_unet), shapes_of(fresh_unet)
    bits = random_bits(shapes, density, seed=5) if density < 1 else full_bits(shapes)
    compact = MaskedAdam(fresh_unet, bits, tensors_of(fresh_unet), 1e-3, clip=clip, holds=parts > 1)
    torchs = torch.optim.Adam(dense.parameters(), lr=1e-3)
    for step in range(3):
        with compact.step():
            for part in range(parts):
                loss_of(fresh_unet, contexts, parts * step + part).backward()
                loss_of(dense, contexts, parts * step + part).backward()
        for name, p in dense.named_parameters():
            p.grad *= bits[name]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(dense.parameters(), clip)
        torchs.step()
        torchs.zero_grad()
    for (name, a), b in zip(fresh_unet.named_parameters(), dense.parameters(), strict=True):
        if parts == 1 and clip is None:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_dense_gradient_is_left_and_state_is_for_salient_weights_only(fresh_unet, contexts):
    bits = random_bits(shapes_of(fresh_unet), 0.1, seed=5)
    adam = MaskedAdam(fresh_unet, bits, tensors_of(fresh_unet), 1e-3)
    with adam.step():
        loss_of(fresh_unet, contexts, 0).backward()
    assert all(p.grad is None for p in fresh_unet.parameters())
    salient = sum(int(b.sum()) for b in bits.values())
    assert sum(t.bytes for t in adam.state().values()) == 12 * salient


def test_bfloat16_weights_are_the_rounding_of_float32_values(fresh_unet, contexts):
    """Updates too small for bfloat16 add up instead of getting lost, and outside the mask no bit moves."""
    base, bits = tensors_of(fresh_unet), random_bits(shapes_of(fresh_unet), 0.3, seed=5)
    unet = fresh_unet.to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    contexts = {"context": contexts["context"].to(torch.bfloat16)}
    adam = MaskedAdam(unet, bits, base, 1e-6)
    for step in range(3):
        with adam.step():
            noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            unet(noise, step, contexts["context"][:1].expand(2, -1, -1)).sample.float().pow(2).mean().backward()
    moved = 0
    for name, p in unet.named_parameters():
        own = bits[name]
        assert torch.equal(p[~own], before[name][~own])
        values = adam.values().get(name, torch.empty(0))
        assert torch.equal(p[own], values.to(torch.bfloat16))
        moved += int((values != base[name].read()[own]).sum())
    assert moved > 0.9 * sum(int(b.sum()) for b in bits.values())


def test_the_base_is_there_while_it_is_asked_for(fresh_unet, contexts):
    before, bits = tensors_of(fresh_unet), random_bits(shapes_of(fresh_unet), 0.3, seed=5)
    adam = MaskedAdam(fresh_unet, bits, before, 1e-2, keeps_base=True)
    with adam.step():
        loss_of(fresh_unet, contexts, 0).backward()
    after = tensors_of(fresh_unet)
    with adam.base():
        assert all(torch.equal(p, before[name].read()) for name, p in fresh_unet.named_parameters())
    assert all(torch.equal(p, after[name].read()) for name, p in fresh_unet.named_parameters())
    assert not all(torch.equal(p, before[name].read()) for name, p in fresh_unet.named_parameters())


def test_a_restored_state_goes_on_with_the_same_bits(fresh_unet, contexts):
    base, bits = tensors_of(fresh_unet), random_bits(shapes_of(fresh_unet), 0.3, seed=5)
    start, ends = deepcopy(fresh_unet), []
    for stops in (False, True):
        unet = deepcopy(start)
        adam = MaskedAdam(unet, bits, base, 1e-3)
        for step in range(4):
            if stops and step == 2:
                state = {name: given(t.read().clone()) for name, t in adam.state().items()}
                unet = deepcopy(start)
                adam = MaskedAdam(unet, bits, base, 1e-3)
                adam.restore(state, 2)
            with adam.step():
                loss_of(unet, contexts, step).backward()
        ends.append(tensors_of(unet))
    assert all(torch.equal(t.read(), ends[1][name].read()) for name, t in ends[0].items())
