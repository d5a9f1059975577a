"""The device that a run uses, and the dtypes that models are held in and compute in, with the reason."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from salun_sd.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")  # of --dtype


class Precision(NamedTuple):
    """The dtype of the weights; with `widens`, each layer converts its weights and inputs to float32 to compute."""

    dtype: torch.dtype
    widens: bool
    reason: str

    @classmethod
    def of(cls, requested: str | None, device: str) -> "Precision":
        """To train in: the requested dtype, by its name in torch; None: bfloat16 on a GPU that computes in it, else
        float32. With float16 it is float32: the gradients of most weights are smaller than float16 can hold."""
        native = _computes_in("bfloat16", device)
        if requested == "float16":
            return cls(torch.float32, False, "gradients vanish in float16, which is for drawing and encoding")
        if requested == "bfloat16" and not native:
            return cls(torch.bfloat16, True, "as asked, computed in float32: this device has no bfloat16 arithmetic")
        if requested:
            return cls(getattr(torch, requested), False, "as asked")
        if native and device != "cpu":
            return cls(torch.bfloat16, False, "this GPU computes in it, and it takes half the memory")
        return cls(torch.float32, False, "the default here; --dtype bfloat16 halves the memory of the weights")

    @classmethod
    def to_draw(cls, requested: str | None, device: str) -> "Precision":
        """To draw and encode in: the requested dtype where the device computes in it, else float32. None: on a GPU
        bfloat16, or float16 where it does not compute in that; on a CPU float32."""
        half = "bfloat16" if _computes_in("bfloat16", device) else "float16"
        name = requested or ("float32" if device == "cpu" else half)
        if not _computes_in(name, device):
            return cls(torch.float32, False, f"this device has no {name} arithmetic")
        usual = "the default on a CPU" if device == "cpu" else "this GPU computes in it, and float32 takes longer"
        return cls(getattr(torch, name), False, "as asked" if requested else usual)

    def prepare(self, unet: nn.Module, checkpointing: bool) -> nn.Module:
        """Make a UNet whose weights already have the dtype compute as this precision says, and give it back.

        With `checkpointing`, the backward pass computes activations again instead of keeping them.
        """
        if self.widens:
            for module in unet.modules():
                if type(module) in FLOAT32_FORWARD:
                    module.forward = partial(FLOAT32_FORWARD[type(module)], module)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        return unet


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def dtype_mark(dtype: str) -> str:
    """What tells apart what was drawn or encoded in a dtype. float32 has no mark: it was the only one once."""
    return "" if dtype == "float32" else f" dtype={dtype}"


def check_dtype(dtype: str | None) -> None:
    """Raise UsageError for a --dtype that is none of `DTYPES`. None: it was not given."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}: give one of {', '.join(DTYPES)}.")


def _computes_in(dtype: str, device: str) -> bool:
    if dtype == "float32":
        return True
    if dtype == "float16":
        return device != "cpu" or torch.cpu._is_amx_fp16_supported()
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _float32(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None else t.float()


# The forward passes, in float32 from weights of any dtype, of every kind of layer that holds weights in a UNet.
FLOAT32_FORWARD: dict[type, Callable] = {
    nn.Linear: lambda m, x, *_: F.linear(x.float(), _float32(m.weight), _float32(m.bias)),
    nn.Conv2d: lambda m, x, *_: F.conv2d(
        x.float(), _float32(m.weight), _float32(m.bias), m.stride, m.padding, m.dilation, m.groups
    ),
    nn.Embedding: lambda m, x: _float32(F.embedding(x, m.weight)),
    nn.GroupNorm: lambda m, x: F.group_norm(x.float(), m.num_groups, _float32(m.weight), _float32(m.bias), m.eps),
    nn.LayerNorm: lambda m, x: F.layer_norm(x.float(), m.normalized_shape, _float32(m.weight), _float32(m.bias), m.eps),
}


def default_device() -> str:
    """ "cuda" if there is a GPU, unless accelerate's config sets ACCELERATE_USE_CPU; else "cpu"."""
    from accelerate.utils import parse_flag_from_env

    return "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
