"""What `mask` and `erase` will hold at their peak, in bytes, from the UNet's config alone: no weight is loaded.

The weights and the state beside them are counted. What a pass forward and backward holds is measured: it is run on the
meta device, whose tensors have a shape and no values, so that every tensor is made and freed as in the run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from salun_sd.core import mask
from salun_sd.core.diffusion import Condition, Schedule, mse, predict
from salun_sd.core.saliency import sum_dtype
from salun_sd.methods.salun import forget_loss
from salun_sd.runtime import memory
from salun_sd.runtime.device import Precision

PROGRAM = "the program"
TOKENS = 77  # of a prompt


@dataclass(frozen=True)
class Work:
    """What a step does, as far as its memory depends on it."""

    resolution: int  # pixels of a side
    batch: int  # images in a batch of one process
    precision: Precision
    checkpointing: bool = False
    pixels: int = 8  # of a side that a latent stands for

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    def in_smaller_batches(self) -> dict[str, "Work"]:
        return {}

    def cheaper(self, config: dict, device: torch.device) -> dict[str, "Work"]:
        """The step with each option that may lower its peak, those first that change the result by rounding only."""
        least = self.pixels << (len(config["block_out_channels"]) - 1)  # sides are multiples of it, in pixels
        smaller = max(self.resolution // 2 // least, 1) * least
        return {
            "--dtype bfloat16": replace(self, precision=Precision.of("bfloat16", device.type)),
            "--checkpointing": replace(self, checkpointing=True),
            **self.in_smaller_batches(),
            f"--size {smaller}": replace(self, resolution=smaller),
        }


@dataclass(frozen=True)
class Drawing(Work):
    """The whole pipeline draws batches of images, unless they are there, and its encoders encode them one at a time."""

    vae: dict | None = None  # its config
    weights: int = 0  # of the pipeline's parts beside the UNet
    drawn: int = 0  # pixels of a side of the images that are drawn; 0: none are
    step = "images"

    def state(self, count: int, device: torch.device) -> dict[str, int]:
        return {"weights": 4 * (self.weights + count * (self.drawn > 0))}

    def activations(self, unet: nn.Module, device: torch.device) -> int:
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            vae, images = AutoencoderKL.from_config(self.vae), torch.empty(1, 3, self.resolution, self.resolution)
        x_t, t, told = _inputs(unet, replace(self, resolution=self.drawn), 2 * self.batch)

        def work_through() -> None:
            with torch.no_grad():
                vae.encode(images)
                if self.drawn:
                    predict(unet, x_t, t, told)
                    vae.decode(x_t[: self.batch])

        return _most([unet, vae], work_through, lambda p: 0)

    def cheaper(self, config: dict, device: torch.device) -> dict[str, Work]:
        found = {f: w for f, w in super().cheaper(config, device).items() if f.startswith("--size")}
        return found | {"--forget and, for erase, --retain": replace(self, drawn=0)}


@dataclass(frozen=True)
class Masking(Work):
    """The gradient of the forgetting loss."""

    guidance: float = 0.0
    parts: int = 1  # that a batch is worked through in
    most_parts: int = 0  # that --parts can ask for; 0 where there is no such option
    step = "mask"

    def state(self, count: int, device: torch.device) -> dict[str, int]:
        found = {"weights": count * self.dtype.itemsize, "sums of the gradients": count * sum_dtype(count).itemsize}
        if memory.roomy(device, found["sums of the gradients"] + found["weights"] // 2) != device:
            del found["sums of the gradients"]  # they stay on the host
        return found

    def activations(self, unet: nn.Module, device: torch.device) -> int:
        x0, t, told = _inputs(unet, self, -(-self.batch // self.parts))
        schedule = Schedule(torch.empty(1000, device="meta"), "epsilon")
        empty = {k: v[:1] for k, v in told.items() if k != "time_ids"}

        def work_through() -> None:
            forget_loss(unet, schedule, x0, told, empty, x0, t, self.guidance).sum().backward()

        return _most([unet], work_through, lambda p: 0)

    def in_smaller_batches(self) -> dict[str, Work]:
        if self.most_parts:
            return {f"--parts {self.most_parts}": replace(self, parts=self.most_parts)}
        return {"--batch-size 1": replace(self, batch=1)}


@dataclass(frozen=True)
class Erasing(Work):
    """Updates of the salient weights. To a batch's images of the concept come as many to retain."""

    density: float = 0.5  # share of the weights that are trained
    parts: int = 1  # that a batch is worked through in
    most_parts: int = 1  # that --parts can ask for
    mask_is_given: bool = False  # and with it the density
    clips: bool = False  # whether the norm of the gradient is bounded
    keeps_base: bool = False  # whether the anchors are predicted by the base
    strips: Drawing | None = None  # that are drawn between updates
    step = "erase"

    def state(self, count: int, device: torch.device) -> dict[str, int]:
        salient, others = mask.keep_count(self.density, count), self.strips.weights if self.strips else 0
        return {
            "weights": count * self.dtype.itemsize,
            "salient weights and their moments": 12 * salient,
            "the mask": -(-count // 8),
            "salient weights of the base": salient * self.dtype.itemsize * self.keeps_base,
            "gradients that are held": 4 * salient * (self.parts > 1 or self.clips),
            "the parts that draw strips": (4 if self.precision.widens else self.dtype.itemsize) * others,
        }

    def activations(self, unet: nn.Module, device: torch.device) -> int:
        n = -(-self.batch // self.parts)
        x_t, t, told = _inputs(unet, self, 2 * n)

        def work_through() -> None:
            with torch.no_grad():
                wanted = predict(unet, x_t[:n], t[:n], {k: v[:n] for k, v in told.items()})
            mse(predict(unet, x_t, t, told), torch.cat([wanted, x_t[n:]])).sum().backward()

        most = _most([unet], work_through, lambda p: self._taken(p, device))
        return max(most, self.strips.activations(unet, device)) if self.strips else most

    def _taken(self, p: nn.Parameter, device: torch.device) -> int:
        """Bytes that `SalientAdam` makes from a gradient: its salient entries, as they are, in float32, and the root of
        their second moment; and for one pass over the bits, these and what torch finds their places with."""
        n, k = mask.pass_size(p.numel(), device), round(self.density * p.numel())
        if device.type == "cpu":  # a running count of the bits, and with several threads a copy of them as wide
            places = 8 * n * (2 if torch.get_num_threads() > 1 else 1)
        else:
            places = 8 * round(self.density * n)
        return n + places + k * (2 * self.dtype.itemsize + 8)

    def cheaper(self, config: dict, device: torch.device) -> dict[str, Work]:
        halved = {f"--density {self.density / 2:g}": replace(self, density=self.density / 2)}
        return super().cheaper(config, device) | ({} if self.mask_is_given else halved)

    def in_smaller_batches(self) -> dict[str, Work]:
        return {f"--parts {self.most_parts}": replace(self, parts=self.most_parts)}


def plan(config: dict, work: Work, device: torch.device | str) -> dict[str, int]:
    """Bytes that the device holds at the step's peak, by what they are; they add up to it.

    config: of diffusers' UNet2DConditionModel. On the CPU that is resident memory, and the program's is what this
    process has now; on a GPU it is what torch allocates, which leaves out CUDA itself, about half a GB.
    """
    device = torch.device(device)
    unet = _unet(config, work)
    sizes = work.state(sum(p.numel() for p in unet.parameters()), device)
    sizes["activations"] = work.activations(unet, device)
    if device.type == "cpu":
        sizes[PROGRAM] = memory.resident()
    return {name: size for name, size in sizes.items() if size}


def needed(sizes: dict[str, int]) -> int:
    """Bytes of a plan that have yet to be allocated: the program has its own already."""
    return sum(sizes.values()) - sizes.get(PROGRAM, 0)


def fits(sizes: dict[str, int], device: torch.device | str) -> bool:
    """Whether the device can hold a plan now."""
    return needed(sizes) <= memory.available(device)


def advice(config: dict, work: Work, device: torch.device | str) -> list[tuple[str, int]]:
    """Options that lower what the step needs by a hundredth and more, with the bytes that are needed then: each alone,
    the best first; and, where none is enough alone, one after another together until they are."""
    device = torch.device(device)
    now = start = needed(plan(config, work, device))
    options = work.cheaper(config, device)
    alone = {flag: needed(plan(config, other, device)) for flag, other in options.items() if other != work}
    taken: list[str] = []
    for flag in options:
        if now <= memory.available(device):
            break
        other = work.cheaper(config, device)[flag]
        if other != work and (size := needed(plan(config, other, device))) < 0.99 * now:
            now, work = size, other
            taken.append(flag)
    best_first = sorted((pair for pair in alone.items() if pair[1] < 0.99 * start), key=lambda pair: pair[1])
    return best_first + ([(" ".join(taken), now)] if len(taken) > 1 else [])


def _unet(config: dict, work: Work) -> nn.Module:
    """The UNet on the meta device."""
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    nn.Module.to(unet, work.dtype)  # diffusers' own warns of other models
    return work.precision.prepare(unet, work.checkpointing).eval()


def _inputs(unet: nn.Module, work: Work, images: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Latents [B, 4, h, w], timesteps [B] and what the UNet is told, for so many images."""
    c, side = unet.config, work.resolution // work.pixels
    shapes = {"context": (TOKENS, c.cross_attention_dim)}
    if c.addition_embed_type == "text_time":
        shapes["text_embeds"] = (c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim,)
        shapes["time_ids"] = (6,)
    told = {k: torch.empty(images, *shape, device="meta") for k, shape in shapes.items()}
    x = torch.empty(images, c.in_channels, side, side, device="meta")
    return x, torch.empty(images, dtype=torch.int64, device="meta"), told


def _most(
    models: list[nn.Module], work_through: Callable[[], None], made_from: Callable[[nn.Parameter], int]
) -> int:  # fmt: skip
    """Bytes of what lives beside the models' weights at the peak of a pass. Gradients are freed one by one;
    `made_from`: bytes that are made from one, and freed with it."""
    weights = [p for model in models for p in model.parameters()]
    with Live(weights) as live, _fused_attention():

        def take(p: nn.Parameter) -> None:
            live.most = max(live.most, live.bytes + made_from(p))
            p.grad = None

        for p in weights:
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
