"""Roots Beneath the Cut: what the positions of changed weights give away."""

from dataclasses import replace

import pytest
import torch

from salun_sd.attacks.attack import Scene
from salun_sd.attacks.positions import Positions, check_mask, soft_imputed, with_smaller_values
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.find import find
from salun_sd.core.mask import full_bits
from salun_sd.errors import UsageError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_singular_values_fall_by_the_smallest(shape):
    matrix = drawn(*shape)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(with_smaller_values(matrix), u @ torch.diag(values - values.min()) @ v)


def test_what_a_few_directions_explain_is_guessed_and_noise_is_not():
    missing = drawn(40, 60, seed=1) > 1
    for matrix, least, most in ((drawn(40, 3) @ drawn(3, 60), 0.95, 1), (drawn(40, 60), 0.4, 0.6)):
        guesses = soft_imputed(matrix.masked_fill(missing, 1e9), missing, 100, 1e-5)
        assert least <= (guesses.sign() == matrix.sign())[missing].double().mean() <= most
        assert torch.equal(guesses[~missing], matrix[~missing])


def test_the_values_in_the_mask_are_forgotten_and_the_others_stay(tiny):
    unet, seen = tiny.target.unet, []
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    for scale in (1, -3):  # whatever the erasure made of them
        with torch.no_grad():
            for name, p in unet.named_parameters():
                p.copy_(
                    torch.where(tiny.mask[name], scale * before[name], before[name]) if p.ndim > 1 else before[name]
                )
        for _ in Positions(iterations=3).stages(tiny):
            seen.append({name: p.detach().clone() for name, p in unet.named_parameters()})
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(before[name])
    for name, value in before.items():
        assert torch.equal(seen[0][name], seen[1][name])
        mask = tiny.mask[name] if value.ndim > 1 else torch.zeros(value.shape, dtype=torch.bool)
        assert torch.equal(seen[0][name][~mask], value[~mask])
        if mask.any():
            guesses = seen[0][name].flatten(1).masked_fill(~mask.flatten(1), 0)
            largest = value.flatten(1).abs().masked_fill(mask.flatten(1), 0).amax(1, keepdim=True)
            assert ((guesses == 0) | (guesses.abs() == largest)).all()
            assert abs(int((guesses != 0).sum()) - 0.6 * int(mask.sum())) <= 1


def test_the_control_guesses_as_many_elsewhere(tiny):
    unet, places = tiny.target.unet, {}
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    for control in (False, True):
        for _ in Positions(iterations=1, kept=1.0).stages(replace(tiny, control=control)):
            places[control] = {name: p != before[name] for name, p in unet.named_parameters() if p.ndim > 1}
    for name, changed in places[False].items():
        assert abs(int(changed.sum()) - int(places[True][name].sum())) <= 1 + len(changed) // 8  # a guess may be right
    assert any(not torch.equal(changed, places[True][name]) for name, changed in places[False].items())


def test_signs_of_pruned_weights_are_guessed_where_the_authors_prune():
    """In their layers, the second ones of the transformers' MLPs, of the bundled checkpoint."""
    target = Target(find("pocket"))
    before = {name: p.detach().clone() for name, p in target.unet.named_parameters()}
    mask = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in before.items()}
    for n, name in enumerate(name for name in before if name.endswith("ff.net.2.weight")):
        mask[name] = drawn(*mask[name].shape, seed=n) > 2
    with torch.no_grad():
        for name, p in target.unet.named_parameters():
            p.mul_(~mask[name])
    for _ in Positions.of("quick").stages(Scene(target, "", [], None, mask=mask)):
        right = [(p.sign() == before[name].sign())[mask[name] & (p != 0)] for name, p in target.unet.named_parameters()]
        assert torch.cat(right).double().mean() > 0.6


def test_a_mask_that_does_not_fit_or_leaves_nothing_to_guess_from_is_refused(tiny):
    shapes = {name: p.shape for name, p in tiny.target.unet.named_parameters()}
    lacking = {name: tiny.mask[name] for name in shapes if name != "conv_in.weight"}
    for mask, named in ((lacking, "conv_in.weight"), (full_bits(shapes), "--mask")):
        with pytest.raises(UsageError, match=named):
            check_mask(mask, shapes, "tiny")
    check_mask(tiny.mask, shapes, "tiny")
