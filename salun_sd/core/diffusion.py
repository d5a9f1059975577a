"""The maths that mask and erase share: noising, prediction, guidance and training targets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call


class Schedule(NamedTuple):
    """What training depends on of a checkpoint's scheduler: the noise it adds and what the UNet predicts."""

    alphas_cumprod: torch.Tensor  # [T] float32, share of signal variance left at each training timestep
    prediction_type: str  # "epsilon" or "v_prediction"


# The UNet's inputs besides x_t and t, a row for each image: "context" [B, L, D], the text embedding; for SDXL
# (arXiv 2307.01952, section 2.2) also "text_embeds" [B, E], the pooled one, and "time_ids" [B, 6], size and crop. A
# class-conditional model has "class" alone, int64 [B], the number of the class; or "embedding" [B, D], which takes the
# place of the class's own.
Condition = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Examples:
    """Encoded images and the prompts that belong to them."""

    latents: torch.Tensor  # [N, C, h, w] float32, already times the VAE's scaling factor; pixels where there is no VAE
    prompts: Condition  # the distinct prompts, [P, ...] each
    which: torch.Tensor  # [N] int64, the row of prompts that captions each image
    images: Condition = field(default_factory=dict)  # inputs of the image itself, such as its size, [N, ...] each

    def __len__(self) -> int:
        return len(self.latents)

    def condition(self, index: torch.Tensor, which: torch.Tensor | None = None) -> Condition:
        """The condition of the images at index [B], with their own prompts or with those in the rows `which` [B]."""
        rows = self.which[index] if which is None else which
        return {k: v[rows] for k, v in self.prompts.items()} | {k: v[index] for k, v in self.images.items()}

    def rows(self, index: list[int]) -> Condition:
        """Some of the prompts, a row each."""
        return {k: v[index] for k, v in self.prompts.items()}


def on_device(condition: Condition, device: torch.device | str) -> Condition:
    return {k: v.to(device) for k, v in condition.items()}


def joined(a: Condition, b: Condition) -> Condition:
    """The rows of a, then those of b."""
    return {k: torch.cat([a[k], b[k]]) for k in a}


def _signal_and_noise(schedule: Schedule, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = schedule.alphas_cumprod.to(t.device)[t][:, None, None, None]  # [B, 1, 1, 1]
    return a.sqrt(), (1 - a).sqrt()


def add_noise(schedule: Schedule, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (DDPM, arXiv 2006.11239, eq. 4).

    x0 and noise [B, C, h, w], t [B] int64 in [0, T).
    """
    signal, sigma = _signal_and_noise(schedule, t)
    return signal * x0 + sigma * noise


def target(schedule: Schedule, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the UNet was trained to predict: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0
    (Salimans & Ho, arXiv 2202.00512, appendix D)."""
    if schedule.prediction_type == "epsilon":
        return noise
    signal, sigma = _signal_and_noise(schedule, t)
    return signal * noise - sigma * x0


def predict(unet, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The UNet's output [B, C, h, w] float32 for x_t [B, C, h, w], t [B] or one for all, and a condition. The UNet
    computes in its own dtype. Where a transformer predicts variances, too (DiT, arXiv 2212.09748), they are left out.
    """
    dtype = unet.dtype  # of diffusers' modules, which look through all their parts for it
    if "class" in condition:
        output = unet(x_t.to(dtype), t.expand(len(x_t)), class_labels=condition["class"]).sample
        return output[:, : x_t.shape[1]].float()
    if "embedding" in condition:  # the table of classes has a row for each image
        table, labels = condition["embedding"].to(dtype), torch.arange(len(x_t), device=x_t.device)
        inputs = (x_t.to(dtype), t.expand(len(x_t)), labels)
        return functional_call(unet, {"class_embedding.weight": table}, inputs, tie_weights=False).sample.float()
    rest = {k: v if k == "time_ids" else v.to(dtype) for k, v in condition.items()}  # bfloat16 rounds sizes
    return unet(x_t.to(dtype), t, encoder_hidden_states=rest.pop("context"), added_cond_kwargs=rest).sample.float()


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, w: float) -> torch.Tensor:
    """(1 + w) conditional - w unconditional (classifier-free guidance, arXiv 2207.12598, eq. 6).

    w = 0 is the conditional prediction alone. diffusers' guidance_scale is 1 + w.
    """
    return (1 + w) * conditional - w * unconditional


def mse(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each example: [B, ...] => [B], in float32."""
    return F.mse_loss(prediction.float(), wanted.float(), reduction="none").flatten(1).mean(1)


def noise_for(indices: Sequence[int], shape: Sequence[int], timesteps: int, seed: int):
    """Timestep and noise of each image, a function of (seed, index) alone, drawn on the CPU.

    => t [B] int64 in [0, timesteps), noise [B, *shape] float32. No batch size and no device changes them.
    """
    generators = [np.random.default_rng([seed, i]) for i in indices]  # torch's CPU generator has seeds of 32 bits only
    t = [int(rng.integers(timesteps)) for rng in generators]
    noise = [torch.from_numpy(rng.standard_normal(tuple(shape), np.float32)) for rng in generators]
    return torch.tensor(t), torch.stack(noise)
