"""The gradient of the forgetting loss over the whole forget set: how much each weight matters to the concept."""

from collections.abc import Iterator
from functools import partial

import torch

from salun_sd import ranks
from salun_sd.diffusion import (
    Condition,
    Examples,
    Schedule,
    add_noise,
    guide,
    joined,
    moved,
    mse,
    noise_for,
    predict,
    target,
)
from salun_sd.errors import SalunError
from salun_sd.mask import pass_size
from salun_sd.memory import roomy


def forget_loss(
    unet, schedule: Schedule, x0, condition: Condition, empty: Condition, noise, t, guidance: float
) -> torch.Tensor:
    """l_f = -MSE(noise, prediction at x_t for the concept), one value per image: [B].

    SalUn's paper (arXiv 2310.12508, section 4) has the plain conditional prediction, guidance 0. The authors'
    generate_mask.py guides inside the loss, (1 + w) e(x_t|c) - w e(x_t|""), with w = 7.5, gradients through both.
    x0 and noise [B, 4, h, w], t [B]; empty: the prompt "", one row, in whose place the image's own size and crop stay.
    """
    x_t = add_noise(schedule, x0, noise, t)
    if guidance:  # in one forward: in two, a parameter's gradient of one would wait for that of the other
        nothing = condition | {k: v.expand_as(condition[k]) for k, v in empty.items()}
        both = predict(unet, torch.cat([x_t, x_t]), torch.cat([t, t]), joined(condition, nothing))
        prediction = guide(*both.chunk(2), guidance)
    else:
        prediction = predict(unet, x_t, t, condition)
    return -mse(prediction, target(schedule, x0, noise, t))


# Sums of fewer weights than this are kept in double precision, so that the order of the addends, and with it the
# number of processes, changes no mask: 0.8 GB at most.
PRECISE = 100_000_000


def sum_dtype(weights: int) -> torch.dtype:
    """Of the sums of gradients of a UNet with so many weights."""
    return torch.float64 if weights < PRECISE else torch.float32


class Saliency:
    """Accumulates the signed gradient of the mean forgetting loss, batch by batch; read it once with `result`.

    Gradients are summed signed and made absolute once at the end: |sum of gradients|, not a sum of |gradients|.
    Each image's timestep and noise depend on (seed, its position), so the batch size changes only the rounding.
    The UNet's weights are never touched. A parameter's gradient is added to its sum as soon as it is made, and freed:
    the gradients never stand in memory together. Processes that run together take batches in turn.
    """

    def __init__(self, unet, schedule: Schedule, empty: Condition, guidance: float, seed: int):
        self.unet, self.schedule, self.empty, self.guidance, self.seed = unet, schedule, empty, guidance, seed
        named = dict(unet.requires_grad_(True).named_parameters())
        weights = sum(p.numel() for p in named.values())
        dtype = sum_dtype(weights)
        home = roomy(unet.device, weights * dtype.itemsize)
        self.sums = {name: torch.zeros(p.shape, dtype=dtype, device=home) for name, p in named.items()}
        self._hooks = [p.register_post_accumulate_grad_hook(partial(self._add, self.sums[n])) for n, p in named.items()]

    @staticmethod
    def _add(total: torch.Tensor, p: torch.Tensor) -> None:
        grad = p.grad.to(total.device).contiguous().view(-1)
        size = pass_size(p.numel(), grad.device)  # the CPU adds values of another dtype by way of a converted copy
        for into, more in zip(total.view(-1).split(size), grad.split(size), strict=True):
            into += more
        p.grad = None

    def accumulate(self, forget: Examples, batch_size: int) -> Iterator[int]:
        """Go once over the forget set; yields the number of images done so far, by all processes about."""
        device = self.unet.device
        self.images = len(forget)
        for start in range(ranks.rank() * batch_size, len(forget), ranks.count() * batch_size):
            index = range(start, min(start + batch_size, len(forget)))
            x0 = forget.latents[start : index.stop].to(device)
            condition = moved(forget.condition(torch.arange(start, index.stop)), device)
            t, noise = noise_for(index, x0.shape[1:], len(self.schedule.alphas_cumprod), self.seed)
            losses = forget_loss(
                self.unet, self.schedule, x0, condition, moved(self.empty, device), noise.to(device), t.to(device),
                self.guidance,
            )  # fmt: skip
            losses.sum().backward()
            yield min(len(forget), (start // batch_size + ranks.count() - ranks.rank()) * batch_size)

    def result(self) -> dict[str, torch.Tensor]:
        """|gradient of the mean forgetting loss| per weight: name -> float32, the parameter's shape.

        Raises SalunError if a value is not finite.
        """
        for hook in self._hooks:
            hook.remove()
        for name in list(self.sums):
            found = ranks.added(self.sums.pop(name)).div_(self.images).abs_().float()
            if not torch.isfinite(found).all():
                raise SalunError(f"The saliency of {name} is not finite: check the forget images and the checkpoint.")
            self.sums[name] = found
        return self.sums
