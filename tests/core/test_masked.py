"""The optimizers of a mask's weights against torch's dense ones."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from salun_sd.core.mask import Bits, full_bits, kept, random_bits
from salun_sd.core.masked import Masked, MaskedAdam, MaskedSGD


class Rule(NamedTuple):
    masked: Callable[..., Masked]
    dense: Callable[..., torch.optim.Optimizer]
    lr: float
    settings: dict


ADAM = Rule(MaskedAdam, torch.optim.Adam, 1e-3, {})
RULES = {
    "adam": ADAM,
    **{
        f"sgd-{momentum}-{decay}": Rule(MaskedSGD, torch.optim.SGD, 0.1, {"momentum": momentum, "weight_decay": decay})
        for momentum in (0.0, 0.9)
        for decay in (0.0, 5e-4)
    },
}


ALL = 1 << 40  # weights: more than a module has


@pytest.fixture(params=[0, 2000, ALL], ids=["each alone", "some together", "all together"])
def together(request) -> int:
    return request.param


@pytest.fixture(params=RULES)
def rule(request, together) -> Rule:
    return RULES[request.param]._replace(masked=partial(RULES[request.param].masked, together=together))


@pytest.fixture(params=["adam", "sgd-0.9-0.0005"])
def full_rule(request, together) -> Rule:
    """One of Adam and SGD with all it has."""
    return RULES[request.param]._replace(masked=partial(RULES[request.param].masked, together=together))


def bits_for(model: nn.Module, density: float = 0.3) -> Bits:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return random_bits(shapes, density, seed=5) if density < 1 else full_bits(shapes)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batch(step: int, part: int = 0) -> slice:
    """Four of the twelve examples."""
    start = 4 * ((step + part) % 3)
    return slice(start, start + 4)


def train(case, optimizer: Masked, steps: int = 3) -> dict[str, torch.Tensor]:
    for step in range(steps):
        with optimizer.step():
            case.losses(case.model, batch(step)).mean().backward()
    return weights_of(case.model)


def both(case, rule: Rule, density: float, parts: int = 1, **how) -> tuple[nn.Module, nn.Module]:
    """The module after two steps, each at its own rate, and a copy that torch has trained with masked gradients. The
    copy's weights outside the mask are put back after each step: weight decay would move them."""
    compact, dense, bits = case.model, deepcopy(case.model), bits_for(case.model, density)
    before = weights_of(dense)
    masked = rule.masked(compact, bits, rule.lr, **rule.settings, **how)
    torchs = rule.dense(dense.parameters(), lr=rule.lr, **rule.settings)
    for step, lr in enumerate((rule.lr, rule.lr / 2)):
        masked.lr = torchs.param_groups[0]["lr"] = lr
        with masked.step():
            for part in range(parts):
                case.losses(compact, batch(step, part)).mean().backward()
                case.losses(dense, batch(step, part)).mean().backward()
        for name, p in dense.named_parameters():
            p.grad *= bits[name]
        if how.get("clip"):
            torch.nn.utils.clip_grad_norm_(dense.parameters(), how["clip"])
        torchs.step()
        torchs.zero_grad()
        with torch.no_grad():
            for name, p in dense.named_parameters():
                p.copy_(torch.where(bits[name], p, before[name]))
    moved = sum(int((p != before[name]).sum()) for name, p in compact.named_parameters())
    assert moved > 0.9 * kept(bits)[0]
    return compact, dense


def test_equals_torchs_optimizer_with_a_masked_gradient_bit_for_bit(case, rule):
    compact, dense = both(case, rule, 0.3)
    assert same(weights_of(compact), weights_of(dense))


def test_with_every_weight_in_the_mask_it_is_torchs_optimizer(case, full_rule):
    compact, dense = both(case, full_rule, 1.0)
    assert same(weights_of(compact), weights_of(dense))


def test_gradients_that_are_held_are_summed_as_torch_sums_them(case, full_rule):
    compact, dense = both(case, full_rule, 0.3, 2, holds=True)
    assert same(weights_of(compact), weights_of(dense))


@pytest.mark.parametrize(("parts", "clip"), [(1, 1e-3), (2, 1e3)])
def test_a_clipped_update_is_torchs_to_rounding(case, full_rule, parts, clip):
    compact, dense = both(case, full_rule, 0.3, parts, clip=clip)
    for name, p in dense.named_parameters():
        torch.testing.assert_close(compact.get_parameter(name), p, rtol=1e-4, atol=0.01 * full_rule.lr * min(clip, 1))


def test_clipping_bounds_the_update(case):
    """Without it, the same step is much larger."""
    start, moved = deepcopy(case.model), {}
    for clip in (None, 1e-3):
        case.model.load_state_dict(start.state_dict())
        train(case, sgd := MaskedSGD(case.model, bits_for(start), 1.0, clip=clip), steps=1)
        sgd.close()
        moves = [(p - start.get_parameter(name)).flatten() for name, p in case.model.named_parameters()]
        moved[clip] = torch.cat(moves).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2) and moved[None] > 1e-2


def test_outside_the_mask_no_bit_moves(case, full_rule):
    bits, before = bits_for(case.model, 0.1), weights_of(case.model)
    optimizer = full_rule.masked(case.model, bits, full_rule.lr, **full_rule.settings)
    after = train(case, optimizer)
    assert all(torch.equal(before[name][~b], after[name][~b]) for name, b in bits.items())
    assert same(optimizer.values(), {name: after[name][b] for name, b in bits.items() if b.any()})
    assert all(p.grad is None for p in case.model.parameters())


def test_state_is_for_salient_weights_only(batch_norm, rule):
    bits = bits_for(batch_norm.model, 0.1)
    optimizer = rule.masked(batch_norm.model, bits, rule.lr, **rule.settings)
    train(batch_norm, optimizer)
    floats = 3 if rule.dense is ADAM.dense else 2 if rule.settings["momentum"] else 1
    assert sum(t.nbytes for t in optimizer.state().values()) == 4 * floats * kept(bits)[0]


def test_a_parameter_without_a_salient_weight_is_frozen(case):
    name, _ = next(case.model.named_parameters())
    bits = Bits.of((n, b & (n != name)) for n, b in bits_for(case.model).items())
    optimizer, before = MaskedAdam(case.model, bits, 1e-3), weights_of(case.model)
    after, frozen = train(case, optimizer), {n for n, b in bits.items() if not b.any()}
    assert name in frozen and len(frozen) < len(bits) / 2
    assert {n for n, p in case.model.named_parameters() if not p.requires_grad} == frozen
    assert {n for n in bits if torch.equal(before[n], after[n])} == frozen


def test_the_statistics_of_batch_norm_are_no_weights(batch_norm):
    """They follow the forward passes in training mode, as with torch's optimizers; in eval mode they stay."""
    before = {name: b.clone() for name, b in batch_norm.model.named_buffers()}
    compact, dense = both(batch_norm, RULES["sgd-0.9-0.0005"], 0.3)
    after = {name: b.clone() for name, b in compact.named_buffers()}
    assert not bits_for(compact).keys() & after.keys()
    assert same(after, dict(dense.named_buffers()))
    assert not any(torch.equal(before[name], after[name]) for name in after)

    before, evaluated = weights_of(dense), batch_norm._replace(model=dense.eval())
    assert not same(train(evaluated, MaskedSGD(dense, bits_for(dense), 0.1)), before)
    assert same(after, dict(dense.named_buffers()))


def test_bfloat16_weights_are_the_rounding_of_float32_values(unet):
    """Updates too small for bfloat16 add up instead of getting lost, and outside the mask no bit moves."""
    base, bits = weights_of(unet.model), bits_for(unet.model)
    unet.model.to(torch.bfloat16)
    before = weights_of(unet.model)
    optimizer = MaskedAdam(unet.model, bits, 1e-6, values=base)
    after, values = train(unet, optimizer), optimizer.values()
    for name, b in bits.items():
        assert torch.equal(after[name][~b], before[name][~b])
        assert torch.equal(after[name][b], values.get(name, torch.empty(0)).to(torch.bfloat16))
    moved = sum(int((values[name] != base[name][bits[name]]).sum()) for name in values)
    assert moved > 0.9 * kept(bits)[0]


def test_a_restored_state_goes_on_with_the_same_bits(case, full_rule):
    start, bits = deepcopy(case.model), bits_for(case.model)
    make = lambda: full_rule.masked(case.model, bits, full_rule.lr, **full_rule.settings)  # noqa: E731
    whole = train(case, optimizer := make(), steps=4)
    optimizer.close()

    case.model.load_state_dict(start.state_dict())
    train(case, optimizer := make(), steps=2)
    state = {name: t.clone() for name, t in optimizer.state().items()}
    optimizer.close()
    case.model.load_state_dict(start.state_dict())
    optimizer = make()
    optimizer.restore(state, 2)
    assert optimizer.steps == 2
    for step in (2, 3):
        with optimizer.step():
            case.losses(case.model, batch(step)).mean().backward()
    assert same(weights_of(case.model), whole)


def test_closed_it_lets_go_of_the_module(case):
    optimizer = MaskedAdam(case.model, full_bits({n: p.shape for n, p in case.model.named_parameters()}), 1e-3)
    before = train(case, optimizer)
    optimizer.close()
    case.losses(case.model, batch(0)).mean().backward()
    assert all(p.grad is not None for p in case.model.parameters()) and not optimizer.state()
    assert same(weights_of(case.model), before)


# gradients of several losses, joined by the caller


def train_apart(case, optimizer: Masked, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict:
    """Two steps, each of two losses whose gradients are withdrawn one after the other and joined."""
    for step in range(2):
        with optimizer.step():
            grads = []
            for part in range(2):
                case.losses(case.model, batch(step, part)).mean().backward()
                grads.append(optimizer.withdraw())
            assert optimizer.withdraw() == {}
            optimizer.apply({name: join(grads[0][name], grad) for name, grad in grads[1].items()})
    return weights_of(case.model)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_sum_of_withdrawn_gradients_is_the_plain_update(case, full_rule, clip):
    plain, bits = deepcopy(case.model), bits_for(case.model)
    settings = {"holds": True, "clip": clip, **full_rule.settings}
    optimizer = full_rule.masked(plain, bits, full_rule.lr, **settings)
    for step in range(2):
        with optimizer.step():
            for part in range(2):
                case.losses(plain, batch(step, part)).mean().backward()
    apart = train_apart(case, full_rule.masked(case.model, bits, full_rule.lr, **settings), torch.add)
    assert same(apart, weights_of(plain))


def test_what_is_applied_is_the_join_and_not_the_sum(case):
    """SGD at rate 1 moves each salient weight by the first gradient less twice the second; no other moves."""
    before, bits = weights_of(case.model), bits_for(case.model)
    grads = []
    for part in range(2):
        copy = deepcopy(case.model)
        case.losses(copy, batch(0, part)).mean().backward()
        grads.append({name: p.grad for name, p in copy.named_parameters()})
    sgd = MaskedSGD(case.model, bits, 1.0, holds=True)
    with sgd.step():
        held = []
        for part in range(2):
            case.losses(case.model, batch(0, part)).mean().backward()
            held.append(sgd.withdraw())
        sgd.apply({name: grad - 2 * held[1][name] for name, grad in held[0].items()})
    for name, p in case.model.named_parameters():
        moved = torch.where(bits[name], grads[0][name] - 2 * grads[1][name], 0)
        torch.testing.assert_close(p, before[name] - moved, rtol=1e-5, atol=1e-6)
        assert torch.equal(p[~bits[name]], before[name][~bits[name]])


def test_a_parameter_that_is_given_no_gradient_stays(case, together):
    adam = MaskedAdam(case.model, bits_for(case.model), 1e-3, holds=True, together=together)
    before = weights_of(case.model)
    with adam.step():
        case.losses(case.model, batch(0)).mean().backward()
        name, grad = next(iter(adam.withdraw().items()))
        adam.apply({name: grad})
    assert [n for n, p in case.model.named_parameters() if not torch.equal(p, before[n])] == [name]


@pytest.mark.parametrize("holds", [False, True])
def test_a_backward_pass_may_leave_out_some_of_those_that_are_updated_together(holds):
    """They stay, and their moments too; with `holds`, their gradient may come with a later pass of the step."""
    ended = {}
    for together in (0, ALL):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(5, 5) for name in "abc"})
        adam, x = MaskedAdam(model, bits_for(model, 0.9), 1e-2, holds=holds, together=together), torch.randn(3, 5)
        for passes in (["abc"], ["a"], ["ac", "abc"] if holds else ["ac"], ["abc"]):
            before = weights_of(model)
            with adam.step():
                for names in passes:
                    sum(model[name](x).square().mean() for name in names).backward()
            stayed = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
            assert stayed == {
                f"{name}.{kind}" for name in set("abc") - set("".join(passes)) for kind in ("weight", "bias")
            }
        ended[together] = weights_of(model)
    assert same(ended[0], ended[ALL])


# wrong uses


def test_a_backward_pass_outside_a_step_is_refused(case):
    for holds in (False, True):
        model = deepcopy(case.model)
        MaskedAdam(model, bits_for(model), 1e-3, holds=holds)
        with pytest.raises(RuntimeError, match="step"):
            case.losses(model, batch(0)).mean().backward()
        assert same(weights_of(model), weights_of(case.model))


def test_a_second_backward_pass_needs_holds(case, together):
    optimizer = MaskedAdam(case.model, bits_for(case.model), 1e-3, together=together)
    with pytest.raises(RuntimeError, match="holds"), optimizer.step():
        case.losses(case.model, batch(0)).mean().backward()
        once = weights_of(case.model)
        case.losses(case.model, batch(0)).mean().backward()
    assert same(weights_of(case.model), once) and optimizer.steps == 1
    train(case, optimizer, steps=1)  # the next step is a step
    assert not same(weights_of(case.model), once) and optimizer.steps == 2


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("wrong", ["no backward pass", "an exception"])
def test_a_step_that_moves_nothing_raises_and_is_not_counted(case, holds, wrong, together):
    """What comes after it is the same as without it: no gradient is left over, and Adam's step is the first."""
    fresh, model = deepcopy(case.model), case.model
    optimizer = MaskedAdam(model, bits_for(model), 1e-3, holds=holds, together=together)
    with pytest.raises(RuntimeError if wrong == "no backward pass" else KeyError), optimizer.step():
        if wrong == "an exception":
            if holds:
                case.losses(model, batch(1)).mean().backward()
            raise KeyError
    case.losses(model, batch(1))  # a forward pass, as the one above, moves batch norm
    after = train(case, optimizer)
    expected = train(case._replace(model=fresh), MaskedAdam(fresh, bits_for(fresh), 1e-3, holds=holds))
    assert same(after, expected) and optimizer.steps == 3


def test_gradients_are_withdrawn_inside_a_step_that_holds_and_applied_once(case):
    before = weights_of(case.model)
    adam = MaskedAdam(case.model, bits_for(case.model), 1e-3)
    with pytest.raises(RuntimeError, match="holds"), adam.step():
        adam.withdraw()
    adam.close()
    adam = MaskedAdam(case.model, bits_for(case.model), 1e-3, holds=True)
    for outside in (adam.withdraw, lambda: adam.apply({})):
        with pytest.raises(RuntimeError, match="step"):
            outside()
    with pytest.raises(RuntimeError), adam.step():  # withdrawn and not applied
        case.losses(case.model, batch(0)).mean().backward()
        grads = adam.withdraw()
    assert adam.steps == 0 and same(weights_of(case.model), before)
    with pytest.raises(RuntimeError, match="once"), adam.step():
        adam.apply(grads)
        once = weights_of(case.model)
        adam.apply(grads)
    assert adam.steps == 1 and same(weights_of(case.model), once) and not same(once, before)


def test_a_gradient_that_fits_no_parameter_is_refused_and_nothing_moves(case, together):
    before = weights_of(case.model)
    adam = MaskedAdam(case.model, bits_for(case.model), 1e-3, holds=True, together=together)
    for change in ({"unknown": torch.ones(3)}, {next(iter(adam.salient)): torch.ones(1)}):
        with pytest.raises(ValueError, match=next(iter(change))), adam.step():
            case.losses(case.model, batch(0)).mean().backward()
            adam.apply(adam.withdraw() | change)
    assert adam.steps == 0 and same(weights_of(case.model), before)


def test_a_step_inside_a_step_is_refused(case):
    optimizer = MaskedAdam(case.model, bits_for(case.model), 1e-3)
    with optimizer.step():
        with pytest.raises(RuntimeError), optimizer.step():
            pass
        case.losses(case.model, batch(0)).mean().backward()
    assert optimizer.steps == 1


def test_the_mask_of_another_module_is_refused_by_the_parameter(case, full_rule):
    shapes = {name: p.shape for name, p in case.model.named_parameters()}
    first, *_, last = shapes
    others = [
        ({name: s for name, s in shapes.items() if name != first}, first),
        ({**shapes, "more.weight": torch.Size([2])}, "more.weight"),
        ({**shapes, last: torch.Size([1, *shapes[last]])}, last),
    ]
    for other, name in others:
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            full_rule.masked(case.model, full_bits(other), full_rule.lr, **full_rule.settings)
    assert all(p.requires_grad for p in case.model.parameters())
    train(case, MaskedAdam(case.model, full_bits(shapes), 1e-3))


# modules that are not a plain chain of layers


class Shared(nn.Module):
    """Two blocks with one weight, recomputed in the backward pass where that is asked for."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant
        self.second.weight = self.first.weight

    def forward(self, x):
        for block in (self.first, self.second):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = x.tanh()
        return x


def trained_with_sharing(reentrant: bool | None, holds: bool) -> dict[str, torch.Tensor]:
    model = Shared(reentrant)
    optimizer = MaskedAdam(model, bits_for(model), 1e-2, holds=holds)
    for step in range(3):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).requires_grad_(bool(reentrant))
        with optimizer.step():
            model(x).pow(2).mean().backward()
    return weights_of(model)


def test_a_shared_parameter_and_recomputed_activations_are_one_backward_pass():
    model, before = Shared(None), weights_of(Shared(None))
    adam, bits = torch.optim.Adam(model.parameters(), lr=1e-2), bits_for(model)
    for step in range(3):
        adam.zero_grad()
        model(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).pow(2).mean().backward()
        for name, p in model.named_parameters():
            p.grad *= bits[name]
        adam.step()
    dense = weights_of(model)
    assert list(dense) == ["first.weight", "first.bias", "second.bias"] and not same(dense, before)
    for reentrant in (None, False):
        for holds in (False, True):
            assert same(trained_with_sharing(reentrant, holds), dense)
    # reentrant checkpoints are backward passes of their own, each with its part of the shared gradient
    assert same(trained_with_sharing(True, True), dense)
    with pytest.raises(RuntimeError, match="holds"):
        trained_with_sharing(True, False)


def test_a_unet_that_recomputes_trains_to_the_same_bits(unet):
    recomputing = unet._replace(model=deepcopy(unet.model).train())
    recomputing.model.enable_gradient_checkpointing()
    whole, again = (train(c, MaskedAdam(c.model, bits_for(c.model), 1e-3)) for c in (unet, recomputing))
    assert same(again, whole)


def test_weights_in_another_order_of_memory_train_the_same(batch_norm):
    """channels_last: to rounding, as torch's own kernels for it."""
    other = batch_norm._replace(model=deepcopy(batch_norm.model).to(memory_format=torch.channels_last))
    assert not other.model[0].weight.is_contiguous()
    results = [train(c, MaskedSGD(c.model, bits_for(c.model), 0.1, momentum=0.9)) for c in (batch_norm, other)]
    assert not other.model[0].weight.is_contiguous()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": float("nan")}, {"clip": -1.0}, {"momentum": -0.1},
                                   {"weight_decay": float("inf")}], ids=str)  # fmt: skip
def test_numbers_that_no_optimizer_takes_are_refused_by_name(batch_norm, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MaskedSGD(batch_norm.model, bits_for(batch_norm.model), **{"lr": 0.1, **wrong})


def test_a_mask_may_be_a_plain_dictionary_of_tensors(case):
    start, bits, ends = deepcopy(case.model), bits_for(case.model), []
    for mask in (bits, dict(bits.items())):
        case.model.load_state_dict(start.state_dict())
        ends.append(train(case, optimizer := MaskedAdam(case.model, mask, 1e-3)))
        optimizer.close()
    assert same(*ends)


def test_closed_the_module_requires_gradients_as_before_and_no_step_begins(case):
    required = {name: p.requires_grad for name, p in case.model.named_parameters()}
    adam = MaskedAdam(case.model, Bits.of((n, torch.zeros_like(b)) for n, b in bits_for(case.model).items()), 1e-3)
    assert not any(p.requires_grad for p in case.model.parameters())
    adam.close()
    assert {name: p.requires_grad for name, p in case.model.named_parameters()} == required
    with pytest.raises(RuntimeError, match="closed"), adam.step():
        pass
