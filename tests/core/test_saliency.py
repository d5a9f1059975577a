"""The accumulator, for modules of any kind."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from salun_sd.core import saliency
from salun_sd.core.saliency import GradientSum
from salun_sd.errors import SalunError

N = 12


def summed(case, size=N, examples=range(N)) -> dict[str, torch.Tensor]:
    """The saliency of some of the examples, in batches of a size."""
    case.model.eval()  # else batch norm would make an example's loss depend on its batch
    with GradientSum(case.model) as gradients:
        for start in range(examples.start, examples.stop, size):
            case.losses(case.model, slice(start, min(start + size, examples.stop))).sum().backward()
    return gradients.result(len(examples))


def close(a, b, of=1e-5) -> None:
    """Equal to the rounding of values as large as the largest of the tensor."""
    torch.testing.assert_close(a, b, rtol=1e-3, atol=of * a.abs().max().item())


def test_equals_a_naive_recomputation(case):
    """The gradient of the whole loss in one go."""
    names, parameters = zip(*case.model.eval().named_parameters(), strict=True)
    naive = torch.autograd.grad(case.losses(case.model, slice(N)).mean(), parameters)
    result = summed(case, size=5)
    assert tuple(result) == names
    for name, gradient in zip(names, naive, strict=True):
        assert result[name].dtype == torch.float32 and result[name].max() > 0
        close(result[name], gradient.abs())


def test_is_independent_of_the_batch_size(case):
    one, all_of_them = summed(case, size=1), summed(case, size=N)
    for name in one:
        close(one[name], all_of_them[name])


def test_gradients_are_summed_signed_before_the_absolute_value(case):
    """|sum g| <= sum |g|, and much smaller in many places: the two are told apart. Opposite losses leave nothing."""
    whole = summed(case)
    separate = {name: torch.zeros_like(s) for name, s in whole.items()}
    for i in range(N):
        for name, s in summed(case, examples=range(i, i + 1)).items():
            separate[name] += s / N
    for name in whole:
        assert (whole[name] <= separate[name] * 1.001 + 1e-5 * separate[name].max()).all(), name
    smaller = sum(int((whole[name] < 0.5 * separate[name]).sum()) for name in whole)
    assert smaller > 0.2 * sum(s.numel() for s in whole.values())
    with GradientSum(case.model) as gradients:
        for sign in (1, -1):
            (sign * case.losses(case.model, slice(N)).sum()).backward()
    assert not any(s.any() for s in gradients.result(N).values())


def test_leaves_the_module_as_it_was(case):
    """Weights, buffers, which parameters are frozen, and no gradients; the frozen ones have a saliency, too."""
    name, frozen = next(case.model.named_parameters())
    frozen.requires_grad_(False)
    before = deepcopy(case.model.state_dict())
    assert summed(case)[name].any()
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in case.model.parameters())


def test_in_training_mode_a_forward_pass_moves_the_statistics_of_batch_norm(batch_norm):
    model = batch_norm.model.train()
    before = deepcopy(model.state_dict())
    with GradientSum(model):
        batch_norm.losses(model, slice(N)).sum().backward()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {name for name, _ in model.named_buffers()}


def test_a_module_that_holds_a_gradient_is_refused(case):
    case.losses(case.model, slice(N)).sum().backward()
    name, _ = next(case.model.named_parameters())
    with pytest.raises(ValueError, match=name), GradientSum(case.model):
        pass
    case.model.zero_grad()
    summed(case)


def test_a_result_is_for_the_end_and_always_the_same(case):
    gradients = GradientSum(case.model)
    with pytest.raises(RuntimeError):
        gradients.result(N)
    with gradients:
        case.losses(case.model, slice(N)).sum().backward()
        with pytest.raises(RuntimeError):
            gradients.result(N)
    with pytest.raises(ValueError):
        gradients.result(0)
    result = gradients.result(N)
    with pytest.raises(ValueError, match=rf"{N}.*{N + 1}"):
        gradients.result(N + 1)
    assert gradients.result(N) is result
    with pytest.raises(TypeError):
        result[next(iter(result))] = None


def test_is_entered_once(case):
    once, twice = summed(case), GradientSum(case.model)
    with twice:
        case.losses(case.model, slice(N)).sum().backward()
        with pytest.raises(RuntimeError), twice:
            pass
        case.losses(case.model, slice(N)).sum().backward()
    with pytest.raises(RuntimeError), twice:
        pass
    assert all(torch.equal(once[name], s) for name, s in twice.result(2 * N).items())  # the refusals changed nothing


def test_after_an_exception_the_hooks_are_gone_and_there_is_no_result(case):
    gradients = GradientSum(case.model)
    with pytest.raises(KeyError), gradients:
        case.losses(case.model, slice(4)).sum().backward()
        raise KeyError
    with pytest.raises(RuntimeError):
        gradients.result(4)
    case.losses(case.model, slice(4)).sum().backward()
    assert all(p.grad is not None for p in case.model.parameters())


def test_without_a_backward_pass_there_is_no_result(case):
    with GradientSum(case.model) as gradients:
        case.losses(case.model, slice(N))
    with pytest.raises(RuntimeError, match="backward"):
        gradients.result(N)


def test_a_value_that_is_not_finite_is_named_and_nothing_comes_after_it():
    model = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": nn.Linear(2, 2, bias=False), "more": nn.Linear(2, 2)})
    x = torch.ones(3, 2)
    with GradientSum(model) as gradients:
        (model["good"](x) + model["bad"](x * float("inf")) + model["more"](x)).sum().backward()
    with pytest.raises(SalunError, match=r"bad\.weight"):
        gradients.result(3)
    with pytest.raises(RuntimeError):
        gradients.result(3)


class Shared(nn.Module):
    """Two blocks with one weight, recomputed in the backward pass where that is asked for."""

    def __init__(self, recomputes: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.recomputes = nn.Linear(6, 6), nn.Linear(6, 6), recomputes
        self.second.weight = self.first.weight

    def forward(self, x):
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False) if self.recomputes else block(x)
            x = x.tanh()
        return x


def test_a_shared_parameter_counts_once_and_recomputing_changes_no_bit():
    x, results = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), []
    for recomputes in (False, True):
        model = Shared(recomputes)
        with GradientSum(model) as gradients:
            for one in x:
                model(one[None]).sum().backward()
        results.append(gradients.result(5))
    plain, recomputed = results
    assert list(plain) == ["first.weight", "first.bias", "second.bias"]
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    [naive] = torch.autograd.grad(model(x).sum(), model.first.weight)
    close(plain["first.weight"], naive.abs() / 5)


def test_sums_are_double_below_a_hundred_million_weights(monkeypatch):
    assert saliency.sum_dtype(99_999_999) == torch.float64 and saliency.sum_dtype(100_000_000) == torch.float32
    model, x = nn.Linear(1, 1, bias=False), torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    for precise, total in ((saliency.PRECISE, 1.0), (1, 0.0)):  # in single precision 2**24 + 1 is 2**24
        monkeypatch.setattr(saliency, "PRECISE", precise)
        with GradientSum(model) as gradients:
            for one in x:
                model(one).sum().backward()
        assert gradients.result(1)["weight"].item() == total
