"""The gradient of the forgetting loss over the whole forget set: how much each weight matters to the concept."""

from collections.abc import Iterator

import torch

from salun_sd.diffusion import Condition, Examples, Schedule, add_noise, guide, moved, mse, noise_for, predict, target
from salun_sd.errors import SalunError


def forget_loss(
    unet, schedule: Schedule, x0, condition: Condition, empty: Condition, noise, t, guidance: float
) -> torch.Tensor:
    """l_f = -MSE(noise, prediction at x_t for the concept), one value per image: [B].

    SalUn's paper (arXiv 2310.12508, section 4) has the plain conditional prediction, guidance 0. The authors'
    generate_mask.py guides inside the loss, (1 + w) e(x_t|c) - w e(x_t|""), with w = 7.5, gradients through both.
    x0 and noise [B, 4, h, w], t [B]; empty: the prompt "", one row, in whose place the image's own size and crop stay.
    """
    x_t = add_noise(schedule, x0, noise, t)
    prediction = predict(unet, x_t, t, condition)
    if guidance:
        nothing = condition | {k: v.expand_as(condition[k]) for k, v in empty.items()}
        prediction = guide(prediction, predict(unet, x_t, t, nothing), guidance)
    return -mse(prediction, target(schedule, x0, noise, t))


class Saliency:
    """Accumulates the signed gradient of the mean forgetting loss, batch by batch; read it once with `result`.

    Gradients are summed signed and made absolute once at the end: |sum of gradients|, not a sum of |gradients|.
    Each image's timestep and noise depend on (seed, its position), so the batch size changes only the rounding.
    The UNet's weights are never touched.
    """

    def __init__(self, unet, schedule: Schedule, empty: Condition, guidance: float, seed: int):
        self.unet, self.schedule, self.empty, self.guidance, self.seed = unet, schedule, empty, guidance, seed
        self.images = 0

    def accumulate(self, forget: Examples, batch_size: int) -> Iterator[int]:
        """Go once over the forget set; yields the number of images done so far."""
        self.unet.requires_grad_(True)
        self.unet.zero_grad(set_to_none=True)
        device = self.unet.device
        for start in range(0, len(forget), batch_size):
            index = range(start, min(start + batch_size, len(forget)))
            x0 = forget.latents[start : index.stop].to(device)
            condition = moved(forget.condition(torch.arange(start, index.stop)), device)
            t, noise = noise_for(index, x0.shape[1:], len(self.schedule.alphas_cumprod), self.seed)
            losses = forget_loss(
                self.unet, self.schedule, x0, condition, moved(self.empty, device), noise.to(device), t.to(device),
                self.guidance,
            )  # fmt: skip
            losses.sum().backward()
            self.images += len(index)
            yield self.images

    def result(self) -> dict[str, torch.Tensor]:
        """|gradient of the mean forgetting loss| per weight: name -> float32, the parameter's shape.

        Raises SalunError if a value is not finite. Frees the UNet's gradients.
        """
        saliency = {}
        for name, p in self.unet.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = None
            saliency[name] = grad.float().abs_().div_(self.images)
            if not torch.isfinite(saliency[name]).all():
                raise SalunError(f"The saliency of {name} is not finite: check the forget images and the checkpoint.")
        return saliency
