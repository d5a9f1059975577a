"""Two gradients, of the forget term and of the retain term, joined to one update by other weights than those of a sum.

A rule gives the weights (a, b) of the update a g_f + b g_r. It knows the two gradients by their inner products alone,
g_f . g_f, g_f . g_r and g_r . g_r, over all salient weights together. g_r is that of the weighted retain term.
"""

from collections.abc import Callable

import torch

Rule = Callable[[float, float, float], tuple[float, float]]


def joined(
    forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor], rule: Rule
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The update by a rule, from parameter name -> gradient [k] of each term; one that has no gradient of a parameter
    has 0 there. Works in place: both are used up."""
    a, b = rule(_product(forget, forget), _product(forget, retain), _product(retain, retain))
    update = {name: grad.mul_(b) for name, grad in retain.items() if name not in forget}
    for name, grad in forget.items():
        update[name] = grad.mul_(a).add_(retain[name], alpha=b) if name in retain else grad.mul_(a)
    return update


def _product(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The inner product over all weights, summed in float64."""
    parts = [(one[name] * other[name]).sum(dtype=torch.float64) for name in one if name in other]
    return float(torch.stack(parts).sum()) if parts else 0.0
