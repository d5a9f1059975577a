"""Text, seed, guidance and size to an image: what diffusers' pipelines do to draw, with each row of a batch its own."""

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from PIL import Image

from salun_sd.core.diffusion import Condition, joined, on_device, predict
from salun_sd.draw.encode import encode_prompts
from salun_sd.errors import UsageError

# Samplers by the names that people know them by. None draws noise in a step: an image is its seed's first noise and
# nothing else. With the settings that Stable Diffusion needs, where a checkpoint's own scheduler is of another class.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
TEXTS_KEPT = 256  # embeddings; of SDXL's two text encoders, 0.6 MB each


class Row(NamedTuple):
    """What one image is drawn from, beside the checkpoint, its scheduler and the number of steps."""

    text: str
    seed: int  # of the first noise, which is drawn on the CPU
    guidance: float  # classifier-free guidance scale as in diffusers; 1 or less: the conditional prediction alone
    size: tuple[int, int]  # width, height in pixels


def scheduler_class(name: str) -> str:
    """The class in diffusers of a scheduler by its short name. Raises UsageError where there is none."""
    if name not in SCHEDULERS:
        raise UsageError(f"There is no --scheduler {name}; give one of {', '.join(SCHEDULERS)}.")
    if name == "lms":
        from diffusers.utils import is_scipy_available

        if not is_scipy_available():
            raise UsageError("--scheduler lms integrates with SciPy, which is not there: pip install scipy")
    return SCHEDULERS[name][0]


def images_per_pass(width: int, height: int) -> int:
    """How many images go through the UNet together, by the size of their latents: 32 at 8 x 8, 4 at 64 x 64, 1 at
    128 x 128.

    A constant for a size, not a setting. Matrix kernels round by the shape of the whole batch, so an image can only be
    the same bytes in every run if every pass of its size has the same shape: a pass with fewer images is padded.
    """
    return max(1, min(32, 2**14 // (width * height)))


class Sampler:
    """A pipeline that draws with a scheduler, by its class in diffusers, in a number of steps."""

    def __init__(self, pipeline, steps: int, scheduler: str | None = None):
        self.pipeline, self.steps = pipeline, steps
        self.scheduler = scheduler or type(pipeline.scheduler).__name__
        self._told = lru_cache(TEXTS_KEPT)(lambda text: encode_prompts(pipeline, [text]))

    def passes(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows' places in groups that go through the UNet together: of one size, and all of them guided or none,
        as a pass without guidance is half the work."""
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((row.size, row.guidance > 1), []).append(i)
        per = {key: images_per_pass(*self._latents(key[0])) for key in groups}
        return [group[i : i + per[key]] for key, group in groups.items() for i in range(0, len(group), per[key])]

    @torch.no_grad()
    def draw(self, rows: Sequence[Row], count: int | None = None) -> list[Image.Image]:
        """One of the `passes`; padded with copies of its first row to `count`, or else to what a pass has."""
        width, height = self._latents(rows[0].size)
        padded = [*rows, *[rows[0]] * ((count or images_per_pass(width, height)) - len(rows))]
        unet, device = self.pipeline.unet, self.pipeline.unet.device
        generators = [torch.Generator().manual_seed(row.seed) for row in padded]
        shape = 1, unet.config.in_channels, height, width
        noise = torch.cat([torch.randn(shape, generator=g) for g in generators])  # [B, 4, h, w] float32
        told, untold = self._conditions(padded)
        scale = torch.tensor([row.guidance for row in padded], device=device)
        latents = denoise(
            unet, self._fresh_scheduler(), noise.to(device), on_device(told, device),
            untold and on_device(untold, device), scale, steps=self.steps, generators=generators,
        )  # fmt: skip
        vae = self.pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels[: len(rows)].float(), output_type="pil")

    def _latents(self, size: tuple[int, int]) -> tuple[int, int]:
        """Pixels => latents, width and height."""
        return size[0] // self.pipeline.vae_scale_factor, size[1] // self.pipeline.vae_scale_factor

    def _conditions(self, rows: list[Row]) -> tuple[Condition, Condition | None]:
        """What the UNet is told of each row with its text, and without: None where no row is guided."""
        told = [self._told(row.text) for row in rows]
        condition = {k: torch.cat([each[k] for each in told]) for k in told[0]}
        sizes = {}
        if "text_embeds" in condition:  # SDXL: the size that is asked for, of an image that was never cropped
            ids = [[row.size[1], row.size[0], 0, 0, row.size[1], row.size[0]] for row in rows]
            sizes["time_ids"] = torch.tensor(ids).float()
        if rows[0].guidance <= 1:
            return condition | sizes, None
        return condition | sizes, {k: torch.cat([v] * len(rows)) for k, v in self._told("").items()} | sizes

    def _fresh_scheduler(self):
        """A scheduler is state. One of another class takes over what the checkpoint's own says of its noise."""
        import diffusers

        own = self.pipeline.scheduler
        settings = {} if type(own).__name__ == self.scheduler else dict(SCHEDULERS.values()).get(self.scheduler, {})
        return getattr(diffusers, self.scheduler).from_config(own.config, **settings)


def denoise(
    unet,
    scheduler,
    noise: torch.Tensor,
    told: Condition,
    untold: Condition | None,
    scale: torch.Tensor,
    *,
    steps: int,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """Noise [B, 4, h, w] => latents, the loop of diffusers' pipelines with a guidance scale for each row, `scale` [B];
    where `untold`, the condition without the texts, is None, the conditional prediction alone.

    A scheduler that draws noise of its own in a step draws each row's from that row's generator.
    """  # fmt: skip
    scheduler.set_timesteps(steps, device=noise.device)
    own = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    both, scale = untold and joined(untold, told), scale[:, None, None, None]
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        if both is None:
            prediction = predict(unet, scheduler.scale_model_input(x, t), t, told)
        else:
            without, with_text = predict(unet, scheduler.scale_model_input(torch.cat([x, x]), t), t, both).chunk(2)
            prediction = without + scale * (with_text - without)
        x = scheduler.step(prediction, t, x, **own, return_dict=False)[0]
    return x
