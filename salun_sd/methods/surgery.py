"""Two gradients, of the forget term and of the retain term, joined to one update by another weight than that of a sum.

A rule gives the weight s of the update g_r + s g_f. It knows the two gradients by the inner products g_f . g_f and
g_f . g_r alone, over all salient weights together. g_r is that of the weighted retain term.
"""

from collections.abc import Callable

import torch

Rule = Callable[[float, float], float]


def joined(
    forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor], rule: Rule
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The update by a rule, from parameter name -> gradient [k] of each term; one that has no gradient of a parameter
    has 0 there. Works in place: both are used up."""
    s, update = rule(_product(forget, forget), _product(forget, retain)), dict(retain)
    for name, grad in forget.items():
        update[name] = grad.mul_(s).add_(retain[name]) if name in retain else grad.mul_(s)
    return update


def _product(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The inner product over all weights, summed in float64."""
    parts = [(one[name] * other[name]).sum(dtype=torch.float64) for name in one if name in other]
    return float(torch.stack(parts).sum()) if parts else 0.0
