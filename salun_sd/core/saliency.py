"""Saliency: the gradient of a loss over many batches, summed signed, made absolute once at the end."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from salun_sd.core.mask import pass_size
from salun_sd.runtime import ranks
from salun_sd.runtime.finite import finite

# Sums of fewer weights than this are kept in double precision, so that the order of the addends, and with it the
# number of processes, changes no mask: 0.8 GB at most.
PRECISE = 100_000_000


def sum_dtype(weights: int) -> torch.dtype:
    """The dtype of the sums for a module with so many weights: float64, or float32 from 100 million on."""
    return torch.float64 if weights < PRECISE else torch.float32


class GradientSum:
    """Adds up the gradients of all parameters of a module while it is entered. The weights are never changed.

        with GradientSum(model) as gradients:
            for batch in forget:
                loss(batch).sum().backward()
        saliency = gradients.result(examples=n)

    Gradients are summed signed and made absolute once at the end: |sum of gradients|, not a sum of |gradients| (SalUn,
    arXiv 2310.12508, section 4). A parameter's gradient is added to its sum as soon as the backward pass makes it, and
    freed: the gradients never stand in memory together. In a run of several processes that the
    commands started, `result` adds all their sums.

    `home` is the device of the sums; by default each sum lies beside its parameter. Errors call the module `name`.
    Entering makes every parameter require a gradient, and raises ValueError where one holds a gradient already; leaving
    restores what was set before. Buffers are not guarded: in training mode a forward pass moves the statistics of batch
    norm, so call model.eval().
    """

    def __init__(self, model: nn.Module, home: torch.device | str | None = None, name: str = "the model"):
        self._parameters, self._name = dict(model.named_parameters()), name
        self._home = home
        self._sums: dict[str, torch.Tensor] = {}
        self._hooks: list = []
        self._state = "new"  # then "open" while it is entered, "complete" or "broken" after that
        self._gradients = 0  # how many came
        self._result: tuple[int, Mapping[str, torch.Tensor]] | None = None

    def __enter__(self) -> "GradientSum":
        if self._state != "new":
            raise RuntimeError("This GradientSum was entered before: make a new one.")
        if holding := [name for name, p in self._parameters.items() if p.grad is not None]:
            raise ValueError(f"{holding[0]} holds a gradient already: call zero_grad() before.")
        dtype = sum_dtype(sum(p.numel() for p in self._parameters.values()))
        for name, p in self._parameters.items():
            self._sums[name] = torch.zeros(p.shape, dtype=dtype, device=self._home or p.device)
        self._required = {name: p.requires_grad for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.requires_grad_(True)
            self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._take, self._sums[name])))
        self._state = "open"
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, p in self._parameters.items():
            p.requires_grad_(self._required[name])
        self._state = "broken" if error else "complete"
        if error:
            self._sums.clear()

    def _take(self, total: torch.Tensor, p: nn.Parameter) -> None:
        """The hook that a parameter's gradient is given to as soon as it is made."""
        _add(total, p)
        self._gradients += 1

    def result(self, examples: int) -> Mapping[str, torch.Tensor]:
        """|sum of the gradients| / examples: parameter name -> float32 of the parameter's shape.

        Asking again gives the same object. Raises RuntimeError before the end of the `with` block, and where an
        exception ended it or no gradient came; ValueError for another number of examples than before, or one below 1;
        NotFinite, which names the parameter, where a value is not finite.
        """
        if self._state != "complete":
            raise RuntimeError("The sum is complete once its `with` block has ended without an exception: ask for the "
                               "result after that.")  # fmt: skip
        if self._result:
            if examples != self._result[0]:
                raise ValueError(f"The result was of {self._result[0]} examples, not of {examples}.")
            return self._result[1]
        if examples < 1:
            raise ValueError(f"The gradients are of {examples} examples: give the number that the losses were of.")
        if not int(ranks.summed(torch.tensor(self._gradients))):
            raise RuntimeError("No gradient came: call backward() inside the `with` block.")
        saliency, self._state = {}, "broken"  # until every value is found to be finite
        for name in list(self._sums):  # one after another, so that sums and result never stand in memory together
            value = ranks.summed(self._sums.pop(name)).div_(examples).abs_().float()
            saliency[name] = finite(value, f"The saliency of {name} in {self._name}")
        self._result, self._state = (examples, MappingProxyType(saliency)), "complete"
        return self._result[1]


def _add(total: torch.Tensor, p: nn.Parameter) -> None:
    grad = p.grad.to(total.device).contiguous().view(-1)
    size = pass_size(p.numel(), grad.device)  # the CPU adds values of another dtype by way of a converted copy
    for into, more in zip(total.view(-1).split(size), grad.split(size), strict=True):
        into += more
    p.grad = None
