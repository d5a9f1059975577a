"""What `mask` and `erase` will hold at their peak, in bytes, from the UNet's config alone: no weight is loaded.

The weights and the state beside them are counted. What a pass forward and backward holds is measured: it is run on the
meta device, whose tensors have a shape and no values, so that every tensor is made and freed as in the run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import finalize

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from salun_sd import mask, memory
from salun_sd.diffusion import Condition, Schedule, mse, predict
from salun_sd.precision import Precision
from salun_sd.saliency import forget_loss, sum_dtype

PROGRAM = "the program"


class Work(NamedTuple):
    """What a step does, as far as its memory depends on it."""

    step: str  # "mask" or "erase"
    resolution: int  # pixels of a side
    batch: int  # images of the concept in a batch of one process; `erase` has as many to retain beside them
    precision: Precision
    checkpointing: bool
    guidance: float = 0.0  # of the mask's loss
    density: float = 0.5  # share of the weights that `erase` trains
    parts: int = 1  # that `erase` works through a batch in
    clips: bool = False  # whether `erase` bounds the norm of the gradient
    keeps_base: bool = False  # whether the anchors are predicted by the base
    tokens: int = 77  # of a prompt
    pixels: int = 8  # of a side that a latent stands for

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype


def plan(config: dict, work: Work, device: torch.device | str) -> dict[str, int]:
    """Bytes that the device holds at the step's peak, by part; they add up to it.

    config: of diffusers' UNet2DConditionModel. On the CPU that is resident memory, and the program's is what this
    process has now; on a GPU it is what torch allocates, which leaves out CUDA itself, about half a GB.
    """
    device = torch.device(device)
    unet = _unet(config, work)
    count = sum(p.numel() for p in unet.parameters())
    weights = count * work.dtype.itemsize
    if work.step == "mask":
        dtype = sum_dtype(count)
        parts = {"weights": weights, "sums of the gradients": count * dtype.itemsize}
        if memory.roomy(device, parts["sums of the gradients"] + weights // 2) != device:
            del parts["sums of the gradients"]  # they stay on the host
        parts["activations"] = _most(unet, lambda: _mask_pass(unet, work), lambda p: _added(p, dtype, device))
    else:
        salient = mask.keep_count(work.density, count)
        parts = {
            "weights": weights,
            "salient weights and their moments": 12 * salient,
            "the mask": -(-count // 8),
            "salient weights of the base": salient * work.dtype.itemsize * work.keeps_base,
            "gradients that are held": 4 * salient * (work.parts > 1 or work.clips),
        }
        parts["activations"] = _most(unet, lambda: _erase_pass(unet, work), lambda p: _taken(p, work, device))
    if device.type == "cpu":
        parts[PROGRAM] = psutil.Process().memory_info().rss
    return {name: size for name, size in parts.items() if size}


def peak(parts: dict[str, int]) -> int:
    """Bytes of all parts together."""
    return sum(parts.values())


def fits(parts: dict[str, int], device: torch.device | str) -> bool:
    """Whether the device can hold them now; the program it holds already."""
    return peak(parts) - parts.get(PROGRAM, 0) <= memory.available(device)


def advice(config: dict, work: Work, device: torch.device | str) -> list[tuple[str, int]]:
    """Options that lower the step's peak, each alone, with the bytes that it saves: the largest first."""
    device = torch.device(device)
    least = work.pixels << (len(config["block_out_channels"]) - 1)  # sides are multiples of it, in pixels
    smaller = max(work.resolution // 2 // least, 1) * least
    changes = {
        "--dtype bfloat16": {"precision": Precision.of("bfloat16", device.type)},
        "--checkpointing": {"checkpointing": True},
        f"--resolution {smaller}": {"resolution": smaller},
    }
    if work.step == "mask":
        changes["--batch-size 1"] = {"batch": 1}
    else:
        changes[f"--parts {work.batch}"] = {"parts": work.batch}
        changes[f"--density {work.density / 2:g}"] = {"density": work.density / 2}

    def needed(changed: Work) -> int:
        parts = plan(config, changed, device)
        return peak(parts) - parts.get(PROGRAM, 0)

    now = needed(work)
    saved = {flag: now - needed(work._replace(**change)) for flag, change in changes.items()
             if work._replace(**change) != work}  # fmt: skip
    return sorted(((flag, size) for flag, size in saved.items() if size > 0), key=lambda pair: -pair[1])


def _unet(config: dict, work: Work) -> nn.Module:
    """The UNet on the meta device."""
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    work.precision.prepare(nn.Module.to(unet, work.dtype))  # diffusers' own warns of other models
    if work.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.eval()


def _mask_pass(unet: nn.Module, work: Work) -> None:
    """As `Saliency.accumulate` goes over a batch."""
    x0, t, told = _inputs(unet, work, work.batch)
    schedule = Schedule(torch.empty(1000, device="meta"), "epsilon")
    empty = {k: v[:1] for k, v in told.items() if k != "time_ids"}
    forget_loss(unet, schedule, x0, told, empty, x0, t, work.guidance).sum().backward()


def _erase_pass(unet: nn.Module, work: Work) -> None:
    """As `erase` goes over a part of a batch."""
    n = -(-work.batch // work.parts)
    x_t, t, told = _inputs(unet, work, 2 * n)
    with torch.no_grad():
        wanted = predict(unet, x_t[:n], t[:n], {k: v[:n] for k, v in told.items()})
    mse(predict(unet, x_t, t, told), torch.cat([wanted, x_t[n:]])).sum().backward()


def _inputs(unet: nn.Module, work: Work, images: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Latents [B, 4, h, w], timesteps [B] and what the UNet is told, for so many images."""
    c, side = unet.config, work.resolution // work.pixels
    shapes = {"context": (work.tokens, c.cross_attention_dim)}
    if c.addition_embed_type == "text_time":
        shapes["text_embeds"] = (c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim,)
        shapes["time_ids"] = (6,)
    told = {k: torch.empty(images, *shape, device="meta") for k, shape in shapes.items()}
    x = torch.empty(images, c.in_channels, side, side, device="meta")
    return x, torch.empty(images, dtype=torch.int64, device="meta"), told


def _added(p: nn.Parameter, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that `Saliency` makes from a gradient: the CPU adds values of another dtype by way of a converted copy."""
    return p.numel() * dtype.itemsize * (device.type == "cpu" and p.dtype != dtype)


def _taken(p: nn.Parameter, work: Work, device: torch.device) -> int:
    """Bytes that `SalientAdam` makes from a gradient: its salient entries, as they are, in float32, and the root of
    their second moment; and for one pass over the bits, these and what torch finds their places with."""
    n, k = mask.pass_size(p.numel(), device), round(work.density * p.numel())
    if device.type == "cpu":  # a running count of the bits, and with several threads a copy of them as wide
        places = 8 * n * (2 if torch.get_num_threads() > 1 else 1)
    else:
        places = 8 * round(work.density * n)
    return n + places + k * (2 * work.dtype.itemsize + 8)


def _most(unet: nn.Module, work_through: Callable[[], None], made_from: Callable[[nn.Parameter], int]) -> int:
    """Bytes of what lives beside the weights at the peak of a pass. Gradients are freed one by one; `made_from`: bytes
    that are made from one, and freed with it."""
    with Live(unet.parameters()) as live, _fused_attention():

        def take(p: nn.Parameter) -> None:
            live.most = max(live.most, live.bytes + made_from(p))
            p.grad = None

        for p in unet.parameters():
            p.register_post_accumulate_grad_hook(take)
        work_through()
    return live.most


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and live, and the most there were at once."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.bytes = self.most = 0
        self._seen = {id(t.untyped_storage()) for t in known}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor):
                self._count(t.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.bytes += size
        self.most = max(self.most, self.bytes)
        finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as the devices compute it, without its matrix of L x L; on the meta device torch would make that."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v
    )[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
