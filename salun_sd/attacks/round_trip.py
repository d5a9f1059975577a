"""Storage as an attack: the weights rounded to fewer bits, as files for small GPUs have them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from salun_sd.attacks.attack import Scene
from salun_sd.attacks.weights import Weights


@dataclass(frozen=True)
class RoundTrip(Weights):
    """The weights are rounded to each format and back; nothing is trained. Not published as an attack: the settings are
    ours. An erasure whose changes are smaller than a format's steps is rounded away.

    float16 and bfloat16 round every weight of the UNet; the others its matrices and kernels, not its biases and norms.
    int8 has a scale for each output channel, and zero stays zero; the 8-bit floats have no scale. Rounded are the
    weights as the UNet holds them: where it draws in bfloat16, that format changes nothing more.
    """

    counts_last: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    formats: tuple[str, ...] = ("float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")

    def names(self) -> list[str]:
        return list(self.formats)

    @torch.no_grad()
    def change(self, scene: Scene) -> Iterator[None]:
        for format in self.formats:
            for p in scene.target.unet.parameters():
                if p.ndim > 1 or format in ("float16", "bfloat16"):
                    p.copy_(rounded(p, format))
            yield


def rounded(weights: torch.Tensor, format: str) -> torch.Tensor:
    """Weights [n, ...] that a format has stored, by its name in torch, in float32. A float out of its range becomes the
    nearest in it."""
    weights, dtype = weights.float(), getattr(torch, format)
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        return weights.clamp(limits.min, limits.max).to(dtype).float()
    steps = weights.flatten(1).abs().amax(1).clamp(min=1e-12) / torch.iinfo(dtype).max
    steps = steps.view(-1, *[1] * (weights.ndim - 1))
    return (weights / steps).round().to(dtype).float() * steps
