"""The steps of `mask`, `erase` and `attack`, as far as memory depends on them: what each holds beside the program, and
the options that make it smaller.

The weights and the state beside them are counted. What a forward and backward pass holds is measured on the meta
device.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from salun_sd.checkpoint.configs import UNET, multiple
from salun_sd.core import mask
from salun_sd.core.diffusion import Condition, Schedule, predict
from salun_sd.core.saliency import sum_dtype
from salun_sd.core.salient import TOGETHER, WAITING
from salun_sd.draw.sample import images_per_pass
from salun_sd.draw.vae import take_in_tiles
from salun_sd.methods.batches import Rows
from salun_sd.methods.loop import Method, Retain, Term, losses_of, watching
from salun_sd.methods.salun import SalUn, forget_loss
from salun_sd.runtime import memory
from salun_sd.runtime.device import Precision
from salun_sd.runtime.peak import peak_of

TOKENS = 77  # in a prompt


@dataclass(frozen=True)
class Work:
    """What a step does, as far as its memory depends on it."""

    resolution: int  # side of the images in pixels
    batch: int  # images in a batch of one process
    precision: Precision
    checkpointing: bool = False
    pixels: int = 8  # side of the square of pixels that one latent stands for

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    def in_smaller_batches(self) -> dict[str, "Work"]:
        """The step with the option that makes its batches smaller, if there is one."""
        return {}

    def cheaper(self, config: dict, device: torch.device) -> dict[str, "Work"]:
        """The step with each option that may lower its peak; first those that change the result only by rounding."""
        least = self.pixels * multiple(config)  # in pixels; sides are multiples of it
        smaller = max(self.resolution // 2 // least, 1) * least
        return {
            "--dtype bfloat16": replace(self, precision=Precision.of("bfloat16", device.type)),
            "--checkpointing": replace(self, checkpointing=True),
            **self.in_smaller_batches(),
            f"--size {smaller}": replace(self, resolution=smaller),
        }


@dataclass(frozen=True)
class Drawing(Work):
    """The pipeline draws images in batches, unless they are given, and its encoders encode them one at a time."""

    vae: dict | None = None  # its config; None: it draws pixels
    vae_dtype: torch.dtype = torch.float32
    others: int = 0  # bytes of the pipeline's parts beside the UNet
    drawn: int = 0  # side in pixels of the images that are drawn; 0: none are
    step = "images"

    def state(self, count: int, device: torch.device) -> dict[str, int]:
        return {"weights": self.others + count * self.dtype.itemsize * (self.drawn > 0)}

    def activations(self, unet: nn.Module, device: torch.device) -> int:
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            vae = AutoencoderKL.from_config(self.vae).to(self.vae_dtype) if self.vae else None
            images = torch.empty(1, 3, self.resolution, self.resolution, dtype=self.vae_dtype)
        x_t, t, condition = inputs_of(unet, replace(self, resolution=self.drawn), 2 * self.batch)

        def run_pass() -> None:
            with torch.no_grad():
                if vae:
                    take_in_tiles(vae, self.resolution)
                    vae.encode(images)
                if self.drawn:
                    predict(unet, x_t, t, condition)
                if vae and self.drawn:
                    take_in_tiles(vae, self.drawn)
                    vae.decode(x_t[: self.batch].to(self.vae_dtype))

        return peak_of([unet, vae] if vae else [unet], run_pass, lambda p: 0)

    def cheaper(self, config: dict, device: torch.device) -> dict[str, Work]:
        options = {f: w for f, w in super().cheaper(config, device).items() if f.startswith("--size")}
        return options | {"--forget and, for erase, --retain": replace(self, drawn=0)}


@dataclass(frozen=True)
class Masking(Work):
    """The gradient of the forgetting loss."""

    guidance: float = 0.0
    parts: int = 1  # that a batch is split into
    most_parts: int = 0  # the largest value of --parts; 0 where there is no such option
    step = "mask"

    def state(self, count: int, device: torch.device) -> dict[str, int]:
        sizes = {"weights": count * self.dtype.itemsize, "sums of the gradients": count * sum_dtype(count).itemsize}
        if memory.device_with_room(device, sizes["sums of the gradients"] + sizes["weights"] // 2) != device:
            del sizes["sums of the gradients"]  # they stay on the host
        return sizes

    def activations(self, unet: nn.Module, device: torch.device) -> int:
        x0, t, condition = inputs_of(unet, self, -(-self.batch // self.parts))
        schedule = Schedule(torch.empty(1000, device="meta"), "epsilon")
        empty = {k: v[:1] for k, v in condition.items() if k != "time_ids"}

        def run_pass() -> None:
            forget_loss(unet, schedule, x0, condition, empty, x0, t, self.guidance).sum().backward()

        return peak_of([unet], run_pass, lambda p: 0)

    def in_smaller_batches(self) -> dict[str, Work]:
        if self.most_parts:
            return {f"--parts {self.most_parts}": replace(self, parts=self.most_parts)}
        return {"--batch-size 1": replace(self, batch=1)}


@dataclass(frozen=True)
class Erasing(Work):
    """Updates of the weights in a mask. A batch has as many retain images as forget images, where it has both."""

    density: float = 0.5  # share of the weights that are trained
    parts: int = 1  # that a batch is split into
    most_parts: int = 1  # the largest value of --parts
    mask_is_given: bool = False  # so that --density cannot change
    clips: bool = False  # whether the norm of the gradient is limited
    method: Method = SalUn()
    retain: Retain | None = Retain(1.0)  # None: a batch has no retain images
    strips: Drawing | None = None  # sample images between updates
    step = "erase"

    @property
    def joins(self) -> bool:
        """Whether the gradients of the two terms are held apart."""
        return self.retain is not None and self.method.join is not None

    def state(self, count: int, device: torch.device) -> dict[str, int]:
        salient = mask.keep_count(self.density, count)
        return {
            "weights": count * self.dtype.itemsize,
            "salient weights and their moments": 12 * salient,
            "the mask": -(-count // 8),
            "gradients that are held": 4 * salient * (2 if self.joins else self.parts > 1 or self.clips),
            "the parts that draw strips": self.strips.others if self.strips else 0,
        }

    def activations(self, unet: nn.Module, device: torch.device) -> int:
        n = -(-self.batch // self.parts)
        x_t, t, condition = inputs_of(unet, self, n)
        tokens = torch.ones(n, TOKENS, dtype=torch.bool, device="meta")
        rows = Rows(x_t, t, condition, x_t, condition, condition, tokens)
        terms = [Term("forget", self.method, 1.0, rows)] if self.method.shows else []
        terms += [Term("retain", self.retain, self.retain.weight, rows)] if self.retain else []
        known = x_t.expand(len(terms), *x_t.shape)

        def run_pass() -> None:
            with watching(unet, terms):
                torch.cat(losses_of(unet, terms, known)).sum().backward()

        total = sum(p.numel() for p in unet.parameters())
        peak = peak_of([unet], run_pass, lambda p: self._update_size(p, total, device))
        return max(peak, self.strips.activations(unet, device)) if self.strips else peak

    def _update_size(self, p: nn.Parameter, total: int, device: torch.device) -> int:
        """Bytes that `MaskedAdam` makes from a parameter's gradient: its salient entries in their own dtype and in
        float32, and the root of their second moment; and in one pass over the bits, the bits and the places of the
        ones. A GPU does so for several parameters at a time, whose gradients wait for one another. total: the weights
        of the UNet."""
        if device.type == "cpu":
            n, k, joined = mask.pass_size(p.numel(), device), round(self.density * p.numel()), 0
        else:
            n = max(p.numel(), min(TOGETHER, total))
            k, joined = round(self.density * n), (n + min(WAITING * TOGETHER, total)) * self.dtype.itemsize
        return n + 8 * round(self.density * n) + k * (2 * self.dtype.itemsize + 8) + joined

    def cheaper(self, config: dict, device: torch.device) -> dict[str, Work]:
        half = {f"--density {self.density / 2:g}": replace(self, density=self.density / 2)}
        return super().cheaper(config, device) | ({} if self.mask_is_given else half)

    def in_smaller_batches(self) -> dict[str, Work]:
        return {f"--parts {self.most_parts}": replace(self, parts=self.most_parts)}


@dataclass(frozen=True)
class Attacking(Work):
    """A search for the concept: the gradient of what the UNet reads, whose weights are frozen. Then its images."""

    draws: Drawing | None = None  # in this resolution
    models: int = 1  # that are held at a time: 2 where the base predicts, too
    trains: bool = False  # whether all weights are trained instead, by Adam
    changes: bool = False  # whether they change, so that their first values are kept on the host
    step = "attack"

    def state(self, count: int, device: torch.device) -> dict[str, int]:
        others = self.draws.others if self.draws else 0
        sizes = {"weights": self.models * (others + count * self.dtype.itemsize)}
        if self.changes and device.type == "cpu":
            sizes["their first values"] = count * self.dtype.itemsize
        return sizes | ({"gradients and moments": 12 * count} if self.trains else {})

    def activations(self, unet: nn.Module, device: torch.device) -> int:
        x_t, t, condition = inputs_of(unet, self, self.batch)
        unet.requires_grad_(self.trains)
        for value in [value for value in condition.values() if value.is_floating_point()] or [x_t]:  # a class has none
            value.requires_grad_()
        peak = peak_of([unet], lambda: predict(unet, x_t, t, condition).sum().backward(), lambda p: 0)
        if not self.draws:
            return peak
        side = self.resolution // self.pixels
        batch = images_per_pass(side, side)
        images = replace(self.draws, resolution=self.resolution, drawn=self.resolution, batch=batch)
        return max(peak, images.activations(unet, device))

    def cheaper(self, config: dict, device: torch.device) -> dict[str, Work]:
        """The dtype and the size: a search computes a large UNet's activations again anyway."""
        half = Precision.of("bfloat16", device.type)
        left_out = {"--checkpointing"} | ({"--dtype bfloat16"} if half.widens else set())
        return {flag: work for flag, work in super().cheaper(config, device).items() if flag not in left_out}


def inputs_of(
    unet: nn.Module, work: Work, images: int, device: torch.device | str = "meta"
) -> tuple[torch.Tensor, torch.Tensor, Condition]:  # fmt: skip
    """Zeros as latents [B, C, h, w], timesteps [B] and the condition of B = `images` images."""
    c, side = unet.config, work.resolution // work.pixels
    x = torch.zeros(images, c.in_channels, side, side, device=device)
    t = torch.zeros(images, dtype=torch.int64, device=device)
    if type(unet).__name__ != UNET.kind:
        return x, t, {"class": t}
    shapes = {"context": (TOKENS, c.cross_attention_dim)}
    if c.addition_embed_type == "text_time":
        shapes["text_embeds"] = (c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim,)
        shapes["time_ids"] = (6,)
    return x, t, {k: torch.zeros(images, *shape, device=device) for k, shape in shapes.items()}
