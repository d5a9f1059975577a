"""Saliency: the gradient of a loss over many batches, summed signed, made absolute once at the end."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from salun_sd.core.mask import pass_size
from salun_sd.errors import SalunError
from salun_sd.runtime import ranks

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
    freed: the gradients never stand in memory together. In a run of several processes, `result` adds all their sums.

    `home` is the device of the sums; by default each lies beside its parameter. Entering makes every parameter require
    a gradient, and raises ValueError where one holds a gradient already; leaving restores what was set before.
    """

    def __init__(self, model: nn.Module, home: torch.device | str | None = None):
        self._parameters = dict(model.named_parameters())
        self._home = home
        self._sums: dict[str, torch.Tensor] = {}
        self._hooks: list = []
        self._result: tuple[int, Mapping[str, torch.Tensor]] | None = None

    def __enter__(self) -> "GradientSum":
        if self._sums or self._result:
            raise RuntimeError("This GradientSum was entered before: make a new one.")
        if left := [name for name, p in self._parameters.items() if p.grad is not None]:
            raise ValueError(f"{left[0]} holds a gradient already: call zero_grad() before.")
        self._required = {name: p.requires_grad for name, p in self._parameters.items()}
        dtype = sum_dtype(sum(p.numel() for p in self._parameters.values()))
        for name, p in self._parameters.items():
            total = torch.zeros(p.shape, dtype=dtype, device=self._home or p.device)
            self._sums[name] = total
            self._hooks.append(p.requires_grad_(True).register_post_accumulate_grad_hook(partial(_add, total)))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, p in self._parameters.items():
            p.requires_grad_(self._required[name])

    def result(self, examples: int) -> Mapping[str, torch.Tensor]:
        """|sum of the gradients| / examples: parameter name -> float32 of the parameter's shape.

        Asking again gives the same. Raises RuntimeError before the end of the `with` block, ValueError for another
        number of examples than before, SalunError where a value is not finite.
        """
        if self._result:
            if examples != self._result[0]:
                raise ValueError(f"The result was of {self._result[0]} examples, not of {examples}.")
            return self._result[1]
        if self._hooks or not self._sums:
            raise RuntimeError("The sum is complete once its `with` block has ended: ask for the result after it.")
        found = {}
        for name in list(self._sums):  # one after another, so that sums and result never stand in memory together
            value = ranks.added(self._sums.pop(name)).div_(examples).abs_().float()
            if not torch.isfinite(value).all():
                raise SalunError(f"The saliency of {name} is not finite: check the forget images and the checkpoint.")
            found[name] = value
        self._result = examples, MappingProxyType(found)
        return self._result[1]


def _add(total: torch.Tensor, p: nn.Parameter) -> None:
    grad = p.grad.to(total.device).contiguous().view(-1)
    size = pass_size(p.numel(), grad.device)  # the CPU adds values of another dtype by way of a converted copy
    for into, more in zip(total.view(-1).split(size), grad.split(size), strict=True):
        into += more
    p.grad = None
