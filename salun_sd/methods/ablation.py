"""Concept ablation (arXiv 2303.13516): the concept's prediction becomes the anchor's, on images of the anchor."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from salun_sd.core.diffusion import mse
from salun_sd.methods.batches import ANCHOR, Rows
from salun_sd.methods.salun import SalUn


@dataclass(frozen=True)
class Ablation(SalUn):
    """loss = ||e(x_t|c') - e(x_t|c)||^2 (target "anchor", the paper's model-based loss) or ||noise - e(x_t|c)||^2
    (target "noise", its noise-based one), where x_t is of images that the base draws of the anchor c'
    (github.com/nupurkmr9/concept-ablation, c11fb1b).

    The first is SalUn's loss on other images, with no gradient through e(x_t|c') either. Learning rate and steps are
    those for one GPU: 2e-6 times a batch of 4, and 200.

    Deviations: Adam in place of AdamW with a weight decay of 0.01. The authors clip the norm of the gradient to 1:
    --clip-norm 1. They draw about 1,000 images from many prompts with the anchor's words, and scale and crop them at
    random; here the images come from the anchor's one prompt, as many as 200 steps of 4 need.
    """

    shows, needs_anchor, support = ANCHOR, True, "cross-attention-kv"
    published = {"lr": 8e-6, "steps": 200, "batch_size": 4, "samples": 800, "retain_weight": 0.0}

    target: Literal["anchor", "noise"] = "anchor"

    @property
    def asks(self) -> bool:
        return self.target == "anchor" and super().asks

    def losses(
        self, unet: nn.Module, prediction: torch.Tensor, rows: Rows, of_base: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        if self.target == "noise":
            return mse(prediction, rows.target)
        return super().losses(unet, prediction, rows, of_base)
