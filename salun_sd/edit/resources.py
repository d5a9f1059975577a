"""How the UNet computes in a run, and the memory that the steps of the run will take."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.load import alphas_cumprod, check, held_in, load_part
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.diffusion import Schedule
from salun_sd.draw import rehearsal
from salun_sd.draw.sample import images_per_pass
from salun_sd.edit import budget
from salun_sd.edit.steps import Drawing, Work
from salun_sd.runtime.device import Precision, check_dtype, default_device, dtype_mark, dtype_name

logger = logging.getLogger(__name__)


class Forecast(NamedTuple):
    """What --dry-run gives in place of a result."""

    settings: dict
    plans: dict[str, dict[str, int]]  # for each step, bytes by what they are for
    fits: bool
    advice: list[tuple[str, int]]  # options that lower the largest step, with the bytes that it then needs
    disk: dict[str, int]  # bytes that will be written at --out and beside it, by what they are for


def schedule_of(model: Checkpoint) -> Schedule:
    """The noise schedule that a checkpoint was trained with. Raises UsageError if its scheduler's config has none."""
    return Schedule(alphas_cumprod(model), model.prediction_type)


class Compute(NamedTuple):
    """How the model computes: it changes the result only by rounding."""

    model: Checkpoint
    precision: Precision  # of the UNet, to train
    drawn_in: Precision  # of the pipeline, to draw and encode
    checkpointing: bool  # activations are recomputed in the backward pass

    @classmethod
    def of(cls, model: Checkpoint, dtype: str | None, checkpointing: bool | None) -> "Compute":
        """As the options say or, where they are None, as it suits the device and the model. Logs the dtypes and why.

        Raises SalunError where the model's parts do not fit one another.
        """
        check_dtype(dtype)
        check(model)
        precision, drawn_in = Precision.of(dtype, default_device()), Precision.to_draw(dtype, default_device())
        logger.info(f"Images are drawn and encoded in {dtype_name(drawn_in.dtype)}: {drawn_in.reason}.")
        logger.info(f"The UNet is held in {dtype_name(precision.dtype)} to train: {precision.reason}.")
        return cls(model, precision, drawn_in, model.is_large if checkpointing is None else checkpointing)

    def dtypes(self) -> dict[str, str]:
        """The dtypes as settings: that of the training, and that of the images where it is not float32, which was the
        only one once."""
        drawn_in = dtype_name(self.drawn_in.dtype)
        return {"dtype": dtype_name(self.precision.dtype)} | ({"drawn_in": drawn_in} if dtype_mark(drawn_in) else {})

    def unet(self) -> torch.nn.Module:
        unet = load_part(self.model, self.model.denoiser, self.precision.dtype)
        return self.precision.prepare(unet, self.checkpointing)

    def work(self, kind: type[Work], resolution: int, batch: int, **rest) -> Work:
        """A step with the UNet, for the memory plan."""
        return kind(resolution, batch, self.precision, self.checkpointing, self.model.pixels_per_latent, **rest)

    def mask_bytes(self) -> int:
        """Size of a mask file, without its header."""
        return sum(-(-t.shape.numel() // 8) for t in self.model.unet.values())

    def disk(self, kept: int, format: str, reversible: bool) -> dict[str, int]:
        """Bytes that an erasure writes for `kept` weights in its mask, without the drawn images in the cache."""
        values = tensors.size(self.model.unet) * kept // self.model.weights  # kept weights of each dtype alike
        patch = self.mask_bytes() + values * (2 if reversible else 1)
        whole = sum(tensors.size(part) for part in self.model.parts.values())
        return {"the result": patch if format == "patch" else whole, "the mask": self.mask_bytes(),
                "the state, while it runs": self.mask_bytes() + 12 * kept}  # fmt: skip

    def drawing(self, resolution: int, draws: bool) -> Drawing:
        """The step that encodes images, and draws them where `draws`. Raises UsageError where the model's own scheduler
        cannot draw it."""
        if draws:
            rehearsal.check(self.model, self.model.scheduler, self.model.sampling[0])
        model, dtype = self.model, self.drawn_in.dtype
        latents = model.image_size // model.pixels_per_latent
        sizes = {part: sum(t.shape.numel() for t in model.parts[part].values()) for part in model.family.parts[1:]}
        return Drawing(
            resolution, images_per_pass(latents, latents), self.drawn_in, pixels=model.pixels_per_latent,
            vae=model.vae_settings, vae_dtype=held_in(model, "vae", dtype) if model.vae_settings else dtype,
            others=sum(size * held_in(model, part, dtype).itemsize for part, size in sizes.items()),
            drawn=model.image_size if draws else 0,
        )  # fmt: skip

    def forecast(self, steps: Sequence[Work], settings: dict, disk: dict[str, int]) -> Forecast:
        """What --dry-run gives."""
        device, plans = default_device(), self._plans(steps)
        fits = all(budget.fits(sizes, device) for sizes in plans.values())
        largest = max(steps, key=lambda work: budget.needed(plans[work.step]))
        advice = [] if fits else budget.advice(self.model.unet_settings, largest, device)
        return Forecast(settings, plans, fits, advice, disk)

    def planned_bytes(self, steps: Sequence[Work]) -> dict[str, int]:
        """Bytes that each step will take; a warning names a step that does not fit the device. Only for a large UNet,
        and without the step of the images, which may be cached."""
        trained = [work for work in steps if not isinstance(work, Drawing)]
        plans = self._plans(trained) if self.model.is_large else {}
        for step, sizes in plans.items():
            if not budget.fits(sizes, default_device()):
                size = f"{sum(sizes.values()) / 2**30:.1f} GiB"
                logger.warning(f"The {step} step takes {size}, more than is free: --dry-run names options that take "
                               "less.")  # fmt: skip
        return {step: sum(sizes.values()) for step, sizes in plans.items()}

    def _plans(self, steps: Sequence[Work]) -> dict[str, dict[str, int]]:
        config, device = self.model.unet_settings, default_device()
        return {work.step: budget.plan(config, work, device) for work in steps}
