"""Which dtype the UNet's weights are held in, which it computes in, and why."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Precision(NamedTuple):
    """Weights are held in `dtype`; where `widens`, each layer computes in float32, from its weights' values."""

    dtype: torch.dtype
    widens: bool
    reason: str

    @classmethod
    def of(cls, asked: str | None, device: str) -> "Precision":
        """As asked or, where nothing is, what the device computes in."""
        native = _knows_bfloat16(device)
        if asked == "bfloat16" and not native:
            return cls(torch.bfloat16, True, "as asked, computed in float32: this device has no bfloat16 arithmetic")
        if asked:
            return cls(getattr(torch, asked), False, "as asked")
        if native and device != "cpu":
            return cls(torch.bfloat16, False, "this GPU computes in it, and it takes half the memory")
        return cls(torch.float32, False, "the default here; --dtype bfloat16 halves the memory of the weights")

    def prepare(self, unet: nn.Module, checkpointing: bool) -> nn.Module:
        """The UNet, whose weights have the dtype already, made to compute so; with `checkpointing`, activations are
        made anew in the backward pass instead of kept."""
        if self.widens:
            for module in unet.modules():
                if type(module) in WIDE:
                    module.forward = partial(WIDE[type(module)], module)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        return unet


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _knows_bfloat16(device: str) -> bool:
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _wide(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None else t.float()


# How the layers that hold a UNet's weights compute in float32 from weights of another dtype.
WIDE: dict[type, Callable] = {
    nn.Linear: lambda m, x, *_: F.linear(x.float(), _wide(m.weight), _wide(m.bias)),
    nn.Conv2d: lambda m, x, *_: m._conv_forward(x.float(), _wide(m.weight), _wide(m.bias)),
    nn.GroupNorm: lambda m, x: F.group_norm(x.float(), m.num_groups, _wide(m.weight), _wide(m.bias), m.eps),
    nn.LayerNorm: lambda m, x: F.layer_norm(x.float(), m.normalized_shape, _wide(m.weight), _wide(m.bias), m.eps),
}


def default_device() -> str:
    """The GPU if there is one, and accelerate's config does not say otherwise."""
    from accelerate.utils import parse_flag_from_env

    return "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
