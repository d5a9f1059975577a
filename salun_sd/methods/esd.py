"""ESD (arXiv 2303.07345): away from the concept, along the base's own guidance."""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn

from salun_sd.core.diffusion import joined, mse, predict
from salun_sd.methods.batches import TRAJECTORY, Rows
from salun_sd.methods.loop import Method


@dataclass(frozen=True)
class ESD(Method):
    """loss = ||e(x_t|c) - (s - scale (e_base(x_t|c) - e_base(x_t|"")))||^2, where s is e_base(x_t|c), or e_base(x_t|c')
    with an anchor (github.com/rohitgandikota/erasing, 25613d2).

    Without an anchor this is the paper's e_base(x_t|"") - eta (e_base(x_t|c) - e_base(x_t|"")) with scale = 1 + eta:
    its eta of 1 is the scale of 2 here. x_t lies on the path by which the base draws the concept, with diffusers'
    guidance scale `start_guidance`. The shares of the predictions add up to 1, so that a model that predicts v has the
    same equation.

    Deviations: the authors draw each x_t just before its step, with the model's own scheduler; here DDIM draws all of
    them before the first step. By default there is one for each step, as with them. Their second prompt, erase_from, is
    no anchor: they train its own prediction, on its own path.
    """

    shows, needs_anchor, support = TRAJECTORY, False, "cross-attention"  # their esd-x
    published = {"lr": 5e-5, "steps": 200, "batch_size": 1, "samples": 200, "retain_weight": 0.0}
    asks = needs_empty = True

    scale: float = 2.0
    start_guidance: float = 3.0

    def of_base(self, unet: nn.Module, rows: Rows) -> torch.Tensor:
        """The target. One forward pass for its two or three predictions."""
        conditions = [c for c in (rows.condition, rows.empty, rows.anchor) if c is not None]
        together, count = reduce(joined, conditions), len(conditions)
        predictions = predict(unet, rows.x_t.repeat(count, 1, 1, 1), rows.t.repeat(count), together)
        concept, empty, *anchor = predictions.chunk(count)
        return (anchor[0] if anchor else concept) - self.scale * (concept - empty)

    def losses(
        self, unet: nn.Module, prediction: torch.Tensor, rows: Rows, of_base: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        return mse(prediction, of_base)
