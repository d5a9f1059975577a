"""Text, seed, guidance and size to an image: the loop of diffusers' pipelines, with a row's own settings in a batch."""

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from PIL import Image

from salun_sd.checkpoint import load
from salun_sd.core.diffusion import Condition, joined, on_device, predict
from salun_sd.draw import vae
from salun_sd.draw.encode import encode_prompts
from salun_sd.errors import UsageError
from salun_sd.runtime.finite import finite

# Short name -> class in diffusers, and the settings that it needs if the checkpoint's own scheduler is of another
# class. None of these draws noise in a step: an image depends on its seed's first noise alone.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
TEXTS_KEPT = 256  # embeddings in memory; 0.6 MB each for SDXL's two text encoders


class Row(NamedTuple):
    """The inputs of one image, beside the checkpoint, the scheduler and the number of steps."""

    text: str  # a prompt, or the name of a class
    seed: int  # of the first noise, which is drawn on the CPU
    guidance: float  # classifier-free guidance scale of diffusers; 1 or less: the conditional prediction alone
    size: tuple[int, int]  # width, height in pixels


class Given(NamedTuple):
    """What an image starts from, where it is not the embedding of its text and the noise of its seed."""

    condition: Condition | None = None  # [1, ...] each, in place of the text's; the row's text only names it
    start: torch.Tensor | None = None  # [1, C, h, w] float32: the latents before the step `begins`, in place of noise
    begins: int = 0  # the first denoising step, from 0


def nothing_given(row: Row) -> Given:
    return Given()


def scheduler_class(name: str) -> str:
    """The class in diffusers of a scheduler's short name. Raises UsageError if there is none."""
    if name not in SCHEDULERS:
        raise UsageError(f"There is no --scheduler {name}; give one of {', '.join(SCHEDULERS)}.")
    if name == "lms":
        from diffusers.utils import is_scipy_available

        if not is_scipy_available():
            raise UsageError("--scheduler lms needs SciPy, which is not installed: pip install scipy")
    return SCHEDULERS[name][0]


def images_per_pass(width: int, height: int) -> int:
    """Images that go through the UNet together, for latents of one size: 32 at 8 x 8, 4 at 64 x 64, 1 at 128 x 128.

    This is no setting: matrix kernels round by the shape of the whole batch. An image has the same bytes in every run
    only if all passes of its size have the same shape, so a pass with fewer images is padded.
    """
    return max(1, min(32, 2**14 // (width * height)))


class Sampler:
    """A pipeline that draws in a number of steps, with its own scheduler or the class of diffusers that is named.

    `given` says of a row what it starts from. Its answer for a row is always the same.
    """

    def __init__(
        self, pipeline, steps: int, scheduler: str | None = None, given: Callable[[Row], Given] = nothing_given
    ):
        self.pipeline, self.steps, self.given = pipeline, steps, given
        self.scheduler = scheduler or type(pipeline.scheduler).__name__
        self._embeddings: dict[str, Condition] = {}  # of the texts that were drawn last

    def passes(self, rows: Sequence[Row]) -> list[list[int]]:
        """The rows' places, in groups that go through the UNet together.

        The rows of a group have one size and one first step, and all or none are guided: a pass without guidance is
        half the work. The first row that is in no group yet begins the next one, so a run that ends early has the first
        rows.
        """
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((row.size, row.guidance > 1, self.given(row).begins), []).append(i)
        most = {key: images_per_pass(*self._latent_size(key[0])) for key in groups}
        return sorted(
            group[i : i + most[key]] for key, group in groups.items() for i in range(0, len(group), most[key])
        )

    def work(self, row: Row) -> int:
        """The latent pixels that go through the UNet in a row's pass: how the time of passes compares."""
        width, height = self._latent_size(row.size)
        return images_per_pass(width, height) * width * height * (2 if row.guidance > 1 else 1)

    @torch.no_grad()
    def draw(
        self, rows: Sequence[Row], count: int | None = None, advance: Callable[[float], object] = lambda share: None
    ) -> list[Image.Image]:  # fmt: skip
        """The images of one of the `passes`, padded with copies of its first row to `count` rows, or to a full pass.

        After each denoising step, `advance` is called with that step's share of the pass, above 0, at most 1. Raises
        NotFinite, which names the part of the model that gives no such values.
        """
        images = vae.decode(self.pipeline, self.latents(rows, count, advance))
        return self.pipeline.image_processor.postprocess(images[: len(rows)], output_type="pil")

    @torch.no_grad()
    def latents(
        self, rows: Sequence[Row], count: int | None = None,
        advance: Callable[[float], object] = lambda share: None, ends: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What `draw` makes images of: latents [count, C, h, w] float32, the rows first. `ends` is the denoising step
        before which they are taken; None: after the last one."""
        width, height = self._latent_size(rows[0].size)
        padded = [*rows, *[rows[0]] * ((count or images_per_pass(width, height)) - len(rows))]
        unet, device = self.pipeline.unet, self.pipeline.unet.device
        generators = [torch.Generator().manual_seed(row.seed) for row in padded]
        shape, given = (1, unet.config.in_channels, height, width), [self.given(row) for row in padded]
        noise = [torch.randn(shape, generator=g) if one.start is None else one.start
                 for g, one in zip(generators, given, strict=True)]  # fmt: skip
        conditional, unconditional = self._conditions(padded, given)
        scale = torch.tensor([row.guidance for row in padded], device=device)
        latents = denoise(
            unet, self._new_scheduler(), torch.cat(noise).to(device), on_device(conditional, device),
            unconditional and on_device(unconditional, device), scale, steps=self.steps, generators=generators,
            advance=advance, begins=given[0].begins, ends=ends,
        )  # fmt: skip
        check_drawn(self.pipeline, latents, self.scheduler)
        return latents

    def _latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image in pixels => of its latents."""
        return size[0] // self.pipeline.vae_scale_factor, size[1] // self.pipeline.vae_scale_factor

    def _read(self, texts: list[str]) -> None:
        """Keep the embeddings of texts, [1, ...] each. Those of earlier passes are kept, too, up to a number."""
        if len(self._embeddings) > TEXTS_KEPT:
            self._embeddings.clear()
        if new := [text for text in dict.fromkeys(texts) if text not in self._embeddings]:
            encoded = encode_prompts(self.pipeline, new)
            self._embeddings |= {text: {k: v[i : i + 1] for k, v in encoded.items()} for i, text in enumerate(new)}

    def _conditions(self, rows: list[Row], given: list[Given]) -> tuple[Condition, Condition | None]:
        """The rows' conditions and those of the empty text; None for the latter without guidance."""
        guided, texts = rows[0].guidance > 1, [row.text for row, g in zip(rows, given, strict=True) if not g.condition]
        self._read([*texts, ""] if guided else texts)
        embeddings = [g.condition or self._embeddings[row.text] for row, g in zip(rows, given, strict=True)]
        conditional = {k: torch.cat([e[k] for e in embeddings]) for k in embeddings[0]}
        sizes = {}
        if "text_embeds" in conditional:  # SDXL: the image's own size, no crop, and the same size again
            ids = [[row.size[1], row.size[0], 0, 0, row.size[1], row.size[0]] for row in rows]
            sizes["time_ids"] = torch.tensor(ids).float()
        if not guided:
            return conditional | sizes, None
        empty = self._embeddings[""]
        if "embedding" in conditional:
            null = self.pipeline.unet.class_embedding(empty["class"].to(self.pipeline.unet.device))
            empty = {"embedding": null.to(conditional["embedding"])}
        unconditional = {k: torch.cat([v] * len(rows)) for k, v in empty.items()}
        return conditional | sizes, unconditional | sizes

    def _new_scheduler(self):
        """A scheduler without the state of an earlier pass."""
        return new_scheduler(self.pipeline.scheduler, self.scheduler)


def check_drawn(pipeline, latents: torch.Tensor, scheduler: str) -> None:
    """Raise NotFinite, which names the UNet, where it came to latents that are not finite in the dtype in which it
    computes."""
    dtype = pipeline.unet.dtype
    advice = {} if dtype == torch.float32 else {"advice": "Draw with --dtype float32."}
    finite(latents.to(dtype), f"The output of the UNet of {pipeline.name_or_path}, with {scheduler},", **advice)


def new_scheduler(of_checkpoint, name: str):
    """A copy of the checkpoint's own scheduler, or one of another class of diffusers, which takes its noise from the
    own one's config, and from there whether x_0 is clipped, as in pixel space. Raises UsageError where diffusers has no
    such scheduler."""
    if type(of_checkpoint).__name__ == name:
        return deepcopy(of_checkpoint)
    config, settings = of_checkpoint.config, dict(SCHEDULERS.values()).get(name, {})
    if "clip_sample" in config:
        settings = settings | {"clip_sample": config["clip_sample"]}
    return load.scheduler_class(name).from_config(config, **settings)


def denoise(
    unet,
    scheduler,
    noise: torch.Tensor,
    conditional: Condition,
    unconditional: Condition | None,
    scale: torch.Tensor,
    *,
    steps: int,
    generators: list[torch.Generator],
    advance: Callable[[float], object],
    begins: int = 0,
    ends: int | None = None,
) -> torch.Tensor:
    """Noise [B, C, h, w] => latents [B, C, h, w]: the loop of diffusers' pipelines, with a guidance scale [B].

    A row's prediction is unconditional + scale * (conditional - unconditional) (arXiv 2207.12598, in diffusers' form);
    with `unconditional` None, it is the conditional one. A scheduler that draws noise in its steps draws each row's
    from that row's generator, with eta = 0 where it has one. After each step, `advance` is called with that step's
    share of all steps. With `begins`, the steps before it are left out, and `noise` is what they have come to; the
    scheduler must not need the predictions of earlier steps. With `ends`, that step and those after it are left out.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    parameters = inspect.signature(scheduler.step).parameters
    extra = {name: v for name, v in {"generator": generators, "eta": 0.0}.items() if name in parameters}
    both, scale = unconditional and joined(unconditional, conditional), scale[:, None, None, None]
    x = noise if begins else noise * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps[begins:ends]
    for t in timesteps:
        if both is None:
            prediction = predict(unet, scheduler.scale_model_input(x, t), t, conditional)
        else:
            without, with_text = predict(unet, scheduler.scale_model_input(torch.cat([x, x]), t), t, both).chunk(2)
            prediction = without + scale * (with_text - without)
        x = scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        advance(1 / len(timesteps))
    return x
