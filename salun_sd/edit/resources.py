"""How the UNet computes in a run, and the memory that the steps of the run will take."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from salun_sd.checkpoint.load import load_scheduler, load_unet
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.diffusion import Schedule
from salun_sd.draw.sample import images_per_pass
from salun_sd.edit import budget
from salun_sd.edit.budget import Drawing, Work
from salun_sd.edit.checks import check_dtype
from salun_sd.errors import SalunError
from salun_sd.runtime.device import Precision, default_device, dtype_name

logger = logging.getLogger(__name__)

LARGE = 100_000_000  # weights of a UNet whose activations are worth recomputing


class Forecast(NamedTuple):
    """What --dry-run gives in place of a result."""

    settings: dict
    plans: dict[str, dict[str, int]]  # for each step, bytes by what they are for
    fits: bool
    advice: list[tuple[str, int]]  # options that lower the largest step, with the bytes that it then needs


def schedule_of(model: Checkpoint) -> Schedule:
    """The noise schedule that a checkpoint was trained with. Raises SalunError if it predicts neither noise nor v."""
    return schedule_from(load_scheduler(model))


def schedule_from(scheduler) -> Schedule:
    """As `schedule_of`, from a scheduler of diffusers."""
    if (predicts := scheduler.config.get("prediction_type")) not in ("epsilon", "v_prediction"):
        name = type(scheduler).__name__
        raise SalunError(f"The checkpoint's {name} trains for {predicts}; salun-sd knows epsilon and v_prediction.")
    return Schedule(scheduler.alphas_cumprod.float(), predicts)


class Compute(NamedTuple):
    """How the UNet computes: it changes the result only by rounding."""

    model: Checkpoint
    precision: Precision
    checkpointing: bool  # activations are recomputed in the backward pass
    is_large: bool  # LARGE weights or more

    @classmethod
    def of(cls, model: Checkpoint, dtype: str | None, checkpointing: bool | None) -> "Compute":
        """As the options say or, where they are None, as it suits the device and the model. Logs the dtype and why."""
        check_dtype(dtype)
        precision = Precision.of(dtype, default_device())
        logger.info(f"The UNet is held in {dtype_name(precision.dtype)}: {precision.reason}.")
        is_large = sum(t.shape.numel() for t in model.unet.values()) >= LARGE
        return cls(model, precision, is_large if checkpointing is None else checkpointing, is_large)

    def unet(self) -> torch.nn.Module:
        return self.precision.prepare(load_unet(self.model, self.precision.dtype), self.checkpointing)

    def work(self, kind: type[Work], resolution: int, batch: int, **rest) -> Work:
        """A step with the UNet, for the memory plan."""
        return kind(resolution, batch, self.precision, self.checkpointing, self.model.pixels_per_latent, **rest)

    def drawing(self, resolution: int, draws: bool) -> Drawing:
        """The step that encodes images, and draws them where `draws`; in float32."""
        latents = self.model.settings("unet")["sample_size"]
        others = sum(t.shape.numel() for part, ts in self.model.parts.items() if part != "unet" for t in ts.values())
        return Drawing(
            resolution, images_per_pass(latents, latents), Precision(torch.float32, False, ""),
            pixels=self.model.pixels_per_latent, vae=self.model.settings("vae"), weights=others,
            drawn=self.model.image_size if draws else 0,
        )  # fmt: skip

    def forecast(self, steps: Sequence[Work], settings: dict) -> Forecast:
        """What --dry-run gives."""
        device, plans = default_device(), self._plans(steps)
        fits = all(budget.fits(sizes, device) for sizes in plans.values())
        largest = max(steps, key=lambda work: budget.needed(plans[work.step]))
        advice = [] if fits else budget.advice(self.model.settings("unet"), largest, device)
        return Forecast(settings, plans, fits, advice)

    def planned_bytes(self, steps: Sequence[Work]) -> dict[str, int]:
        """Bytes that each step will take; a warning names a step that does not fit the device. Only for a large UNet,
        and without the step of the images, which may be cached."""
        plans = self._plans([work for work in steps if not isinstance(work, Drawing)]) if self.is_large else {}
        for step, sizes in plans.items():
            if not budget.fits(sizes, default_device()):
                size = f"{sum(sizes.values()) / 2**30:.1f} GiB"
                logger.warning(f"The {step} step takes {size}, more than is free: --dry-run names options that take "
                               "less.")  # fmt: skip
        return {step: sum(sizes.values()) for step, sizes in plans.items()}

    def _plans(self, steps: Sequence[Work]) -> dict[str, dict[str, int]]:
        config, device = self.model.settings("unet"), default_device()
        return {work.step: budget.plan(config, work, device) for work in steps}
