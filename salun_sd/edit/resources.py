"""How the UNet computes in a run, and the memory that the run's steps will take: chosen, foreseen, said."""

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
from salun_sd.errors import SalunError
from salun_sd.runtime.device import Precision, default_device, named

logger = logging.getLogger(__name__)

LARGE = 100_000_000  # weights of a UNet whose activations are worth recomputing


class Foreseen(NamedTuple):
    """What --dry-run gives in place of a result."""

    settings: dict
    plans: dict[str, dict[str, int]]  # for each step, bytes by what they are
    fits: bool
    advice: list[tuple[str, int]]  # options that bring the largest step down, with the bytes it then needs


def schedule_of(model: Checkpoint) -> Schedule:
    """What a checkpoint's scheduler says about training. Raises SalunError if its UNet predicts neither noise nor v."""
    return schedule_from(load_scheduler(model))


def schedule_from(scheduler) -> Schedule:
    """The same of a scheduler of diffusers."""
    if (predicts := scheduler.config.get("prediction_type")) not in ("epsilon", "v_prediction"):
        name = type(scheduler).__name__
        raise SalunError(f"The checkpoint's {name} trains for {predicts}; salun-sd knows epsilon and v_prediction.")
    return Schedule(scheduler.alphas_cumprod.float(), predicts)


class Compute(NamedTuple):
    """How the UNet computes, which changes the result by rounding only."""

    model: Checkpoint
    precision: Precision
    checkpointing: bool  # activations are made anew in the backward pass instead of kept
    is_large: bool  # the UNet

    @classmethod
    def of(cls, model: Checkpoint, dtype: str | None, checkpointing: bool | None) -> "Compute":
        """As asked or, where nothing is, what fits the device and the model; says what the dtype is and why."""
        precision = Precision.of(dtype, default_device())
        logger.info(f"The UNet is held in {named(precision.dtype)}: {precision.reason}.")
        is_large = sum(t.shape.numel() for t in model.unet.values()) >= LARGE
        return cls(model, precision, is_large if checkpointing is None else checkpointing, is_large)

    def unet(self) -> torch.nn.Module:
        return self.precision.prepare(load_unet(self.model, self.precision.dtype), self.checkpointing)

    def work(self, kind: type[Work], resolution: int, batch: int, **rest) -> Work:
        """A step with the UNet, for the memory plan."""
        return kind(resolution, batch, self.precision, self.checkpointing, self.model.pixels, **rest)

    def drawing(self, resolution: int, draws: bool) -> Drawing:
        """The step that makes images and encodes them, or only encodes them; all of it in float32."""
        latents = self.model.settings("unet")["sample_size"]
        others = sum(t.shape.numel() for part, ts in self.model.parts.items() if part != "unet" for t in ts.values())
        return Drawing(
            resolution, images_per_pass(latents, latents), Precision(torch.float32, False, ""),
            pixels=self.model.pixels, vae=self.model.settings("vae"), weights=others,
            drawn=self.model.image_size if draws else 0,
        )  # fmt: skip

    def foresee(self, steps: Sequence[Work], settings: dict) -> Foreseen:
        """What --dry-run gives."""
        device, plans = default_device(), self._plans(steps)
        fits = all(budget.fits(sizes, device) for sizes in plans.values())
        most = max(steps, key=lambda work: budget.needed(plans[work.step]))
        return Foreseen(settings, plans, fits, [] if fits else budget.advice(self.model.settings("unet"), most, device))

    def announced(self, steps: Sequence[Work]) -> dict[str, int]:
        """Bytes that each step of a run which is about to begin is planned to take, where the model is large enough to
        ask, and less the images, which may be cached; one that does not fit the device is named."""
        plans = self._plans([work for work in steps if not isinstance(work, Drawing)]) if self.is_large else {}
        for step, sizes in plans.items():
            if not budget.fits(sizes, default_device()):
                size = f"{sum(sizes.values()) / 2**30:.1f} GiB"
                logger.warning(f"The {step} step takes {size}, more than is free: --dry-run says what brings it down.")
        return {step: sum(sizes.values()) for step, sizes in plans.items()}

    def _plans(self, steps: Sequence[Work]) -> dict[str, dict[str, int]]:
        config, device = self.model.settings("unet"), default_device()
        return {work.step: budget.plan(config, work, device) for work in steps}
