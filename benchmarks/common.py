"""What the measurements share: true architectures with random weights, in memory, random data for them, and a clock."""

import json
import sys
import time
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from salun_sd.checkpoint.model import POCKET
from salun_sd.core.diffusion import Condition, Examples, Schedule
from salun_sd.core.mask import Bits
from salun_sd.runtime import memory
from salun_sd.runtime.device import Precision, default_device

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from helpers.models import FULL, skeleton  # noqa: E402


def _of_pocket(part: str) -> dict:
    settings = json.loads((POCKET / part / "config.json").read_text())
    return {k: v for k, v in settings.items() if not k.startswith("_")}


_HALF = FULL["sd1"]["unet"] | {"block_out_channels": (160, 320, 640, 640)}  # so that the reference fits in 24 GB
ARCHS = {
    "pocket": {part: _of_pocket(part) for part in ("unet", "vae")},
    "sd1-half": FULL["sd1"] | {"unet": _HALF},
    **FULL,
}
SCHEDULE = Schedule((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0), "epsilon")


class Case(NamedTuple):
    arch: str
    latents: int  # side
    batch: int  # images to forget in a step, and as many to retain
    dtype: str
    checkpointing: bool

    @property
    def pixels(self) -> int:
        return self.latents * 2 ** (len(ARCHS[self.arch]["vae"]["block_out_channels"]) - 1)

    @property
    def computes_in(self) -> str:
        return "float32" if Precision.of(self.dtype, default_device()).widens else self.dtype

    def unet(self, dtype: str | None = None):
        precision = Precision.of(dtype or self.dtype, default_device())
        return precision.prepare(built(self.arch, "unet", precision.dtype), self.checkpointing)

    def examples(self, n: int) -> Examples:
        """Random latents, and embeddings in place of three prompts: the concept, the anchor, the empty one."""
        settings = ARCHS[self.arch]["unet"]
        prompts = {"context": torch.randn(3, 77, settings["cross_attention_dim"])}
        images: Condition = {}
        if settings.get("addition_embed_type"):
            pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
            side = float(self.pixels)
            prompts["text_embeds"] = torch.randn(3, pooled)
            images["time_ids"] = torch.tensor([side, side, 0, 0, side, side]).repeat(n, 1)
        latents = torch.randn(n, 4, self.latents, self.latents)
        return Examples(latents, prompts, torch.zeros(n, dtype=torch.int64), images)


@cache
def shapes(arch: str, part: str = "unet") -> dict[str, torch.Size]:
    return {name: p.shape for name, p in skeleton(part, ARCHS[arch][part]).named_parameters()}


def weights(arch: str, part: str = "unet") -> int:
    return sum(shape.numel() for shape in shapes(arch, part).values())


def built(arch: str, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """A part on the device, each weight drawn in the dtype that it stays in: norms 1, biases 0, the variance of the
    others torch's own default."""
    model = skeleton(part, ARCHS[arch][part])

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        t = torch.empty(shape, dtype=dtype, device=default_device())
        if len(shape) == 1:
            return t.fill_(float(name.endswith("weight")))
        return t.normal_(std=(3 * shape[1:].numel()) ** -0.5)

    model.load_state_dict({name: drawn(name, t.shape) for name, t in model.state_dict().items()}, assign=True)
    return model.requires_grad_(False).eval()


def random_mask(arch: str, density: float) -> Bits:
    """About that share of ones, drawn one parameter at a time: scores for the whole UNet would be the peak."""
    device = default_device()
    g = torch.Generator(device).manual_seed(0)
    drawn = ((name, torch.rand(shape, generator=g, device=device)) for name, shape in shapes(arch).items())
    return Bits.of((name, values < density) for name, values in drawn)


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(loop: Iterable) -> float:
    """Median seconds of an item; the first, in which caches and kernels are made, is left out."""
    marks = [now() for _ in loop]
    return median(b - a for a, b in pairwise(marks))


def reset_peak() -> int:
    """Forget the peak so far; gives the bytes held now."""
    memory.reset_peak()
    return memory.peak()
