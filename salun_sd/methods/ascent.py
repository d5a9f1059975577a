"""Gradient ascent: the denoising loss of the concept's images grows."""

from dataclasses import dataclass

import torch
from torch import nn

from salun_sd.core.diffusion import mse
from salun_sd.methods.batches import CONCEPT, Rows
from salun_sd.methods.loop import Method


@dataclass(frozen=True)
class Ascent(Method):
    """loss = -||e(x_t|c) - noise||^2 over D_f, beside the denoising loss over D_r (gradient_ascent.py of SalUn's
    authors, after arXiv 2109.13398). A model that predicts v has v in place of the noise.

    The loss has no lower bound: more steps always do more damage.
    """

    shows, needs_anchor, support = CONCEPT, False, "none"
    published = {
        "lr": 1e-5, "steps": None, "batch_size": 8, "samples": 800, "retain_weight": 0.1, "retain_target": "noise",
    }  # fmt: skip

    def losses(
        self, unet: nn.Module, prediction: torch.Tensor, rows: Rows, of_base: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        return -mse(prediction, rows.target)
