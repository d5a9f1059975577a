"""SalUn (arXiv 2310.12508): the forgetting loss whose gradient is the saliency, and the loss that makes the concept's
prediction the anchor's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from salun_sd.core.diffusion import (
    Condition,
    Examples,
    Schedule,
    add_noise,
    guide,
    joined,
    mse,
    noise_for,
    on_device,
    predict,
    target,
)
from salun_sd.methods.batches import CONCEPT, Rows
from salun_sd.methods.loop import Method
from salun_sd.runtime import ranks
from salun_sd.runtime.finite import finite


def forget_loss(
    unet, schedule: Schedule, x0, condition: Condition, empty: Condition, noise, t, guidance: float
) -> torch.Tensor:
    """l_f = -MSE(noise, prediction at x_t for the concept), one value per image: [B].

    SalUn's paper (arXiv 2310.12508, section 4) has the plain conditional prediction, guidance 0. The authors'
    generate_mask.py guides inside the loss, (1 + w) e(x_t|c) - w e(x_t|""), with w = 7.5, gradients through both.
    x0 and noise [B, C, h, w], t [B]; empty: the prompt "", one row. The unconditional prediction has the image's own
    size and crop.
    """
    x_t = add_noise(schedule, x0, noise, t)
    if guidance:  # one forward pass for both: each parameter then has one gradient, which is freed at once
        nothing = condition | {k: v.expand_as(condition[k]) for k, v in empty.items()}
        both = predict(unet, torch.cat([x_t, x_t]), torch.cat([t, t]), joined(condition, nothing))
        prediction = guide(*both.chunk(2), guidance)
    else:
        prediction = predict(unet, x_t, t, condition)
    return -mse(prediction, target(schedule, x0, noise, t))


def forget_gradient(
    unet: nn.Module, schedule: Schedule, forget: Examples, empty: Condition, *, guidance: float, seed: int,
    batch_size: int, name: str = "the model",
) -> Iterator[int]:  # fmt: skip
    """Backward passes of the forgetting loss over the forget set, for a GradientSum of the UNet. Yields how many images
    are done, estimated over all processes.

    Each image's timestep and noise depend on (seed, its position), so the batch size changes only the rounding. Several
    processes take batches in turn. Raises NotFinite where a loss is not finite; errors call the model `name`.
    """
    device, empty = unet.device, on_device(empty, unet.device)
    for start in range(ranks.rank() * batch_size, len(forget), ranks.count() * batch_size):
        index = range(start, min(start + batch_size, len(forget)))
        x0 = forget.latents[start : index.stop].to(device)
        condition = on_device(forget.condition(torch.arange(start, index.stop)), device)
        t, noise = noise_for(index, x0.shape[1:], len(schedule.alphas_cumprod), seed)
        losses = forget_loss(unet, schedule, x0, condition, empty, noise.to(device), t.to(device), guidance)
        finite(losses, f"The loss of the UNet of {name}").sum().backward()
        yield min(len(forget), (start // batch_size + ranks.count() - ranks.rank()) * batch_size)


@dataclass(frozen=True)
class SalUn(Method):
    """loss = ||e(x_t|c') - e(x_t|c)||^2 over D_f (SalUn, section 4, and the authors' nsfw_removal.py).

    No gradient flows through the anchor's prediction e(x_t|c'). It is that of the weights being trained ("current", as
    the authors do) or of those before training ("base").
    """

    shows, needs_anchor, support = CONCEPT, True, "salient:0.5"
    published = {"lr": 1e-5, "steps": None, "batch_size": 8, "samples": 800, "retain_weight": 0.5}

    anchor_from: Literal["current", "base"] = "current"

    @property
    def asks(self) -> bool:
        return self.anchor_from == "base"

    def of_base(self, unet: nn.Module, rows: Rows) -> torch.Tensor:
        return predict(unet, rows.x_t, rows.t, rows.anchor)

    def losses(
        self, unet: nn.Module, prediction: torch.Tensor, rows: Rows, of_base: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        if of_base is None:
            with torch.no_grad():
                of_base = predict(unet, rows.x_t, rows.t, rows.anchor)
        return mse(prediction, of_base)
