"""Whether a scheduler draws a model, without the model: steps with a UNet that knows the image."""

import math
from types import SimpleNamespace

import torch

from salun_sd.checkpoint.load import alphas_cumprod, load_scheduler
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw.sample import SCHEDULERS, denoise, new_scheduler
from salun_sd.errors import UsageError, first_line

STEPS = 20  # in which every scheduler of Stable Diffusion comes to the image
UNSEEDED = {"DPMSolverSDEScheduler"}  # its steps draw noise, and not from an image's own seed


class Oracle:
    """A UNet that knows the image x0: in x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise it finds the noise, or v."""

    dtype = torch.float32

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str, x0: torch.Tensor):
        self.alphas, self.prediction_type, self.x0 = alphas_cumprod, prediction_type, x0

    def __call__(self, x: torch.Tensor, t, **_) -> SimpleNamespace:
        """Some schedulers ask between two timesteps."""
        t, last = float(t), len(self.alphas) - 1
        if not 0 <= t <= last:
            raise ValueError(f"it asks for timestep {t:g}")
        a = torch.lerp(self.alphas[int(t)], self.alphas[min(int(t) + 1, last)], t % 1)
        noise = (x - a.sqrt() * self.x0) / (1 - a).sqrt()
        v = a.sqrt() * noise - (1 - a).sqrt() * self.x0
        return SimpleNamespace(sample=noise if self.prediction_type == "epsilon" else v)


def check(model: Checkpoint, scheduler: str, steps: int) -> None:
    """Raise UsageError unless a scheduler, by its class in diffusers, draws this model, and in so many steps.

    It has to come to the image of an `Oracle`: so each scheduler of diffusers, also one that is to come, either works
    or is refused by name before anything is drawn.
    """
    if steps > model.timesteps:
        raise UsageError(f"--denoising-steps {steps} is more than the {model.timesteps} that {model.name} was trained "
                         "on: give fewer.")  # fmt: skip
    if scheduler in UNSEEDED:
        raise _refused(model, scheduler, "it draws noise that no seed of an image determines")
    alphas, own, usual = alphas_cumprod(model), load_scheduler(model), min(STEPS, model.timesteps)
    for count in dict.fromkeys((usual, steps)):
        try:
            error = _rehearse(new_scheduler(own, scheduler), alphas, model.prediction_type, count)
            if not error < (0.1 if count >= STEPS else math.inf):
                raise ValueError("it does not come to the image")
        except (UsageError, ImportError) as e:  # diffusers has no such class, or it needs a package
            raise _refused(model, scheduler, first_line(e)) from e
        except Exception as e:  # one for other models, or with odd settings, fails in many ways
            words = f" ({first_line(e)})" if isinstance(e, ValueError) else ""  # other types speak of code
            file = model.config / "scheduler" / "scheduler_config.json"
            cause = f", as it is for another kind of model or {file} is damaged" if count == usual else ""
            raise _refused(model, scheduler, f"it fails in {count} steps{words}{cause}") from e


def _rehearse(scheduler, alphas: torch.Tensor, prediction_type: str, steps: int) -> float:
    """The mean distance of what a scheduler comes to from the image, whose values are 1 and -1."""
    generator, image = torch.Generator().manual_seed(0), torch.ones(1, 4, 8, 8)
    image[..., :4] = -1
    latents = denoise(
        Oracle(alphas, prediction_type, image), scheduler, torch.randn(image.shape, generator=generator),
        {"context": torch.zeros(1, 1, 1)}, None, torch.ones(1), steps=steps, generators=[generator],
        advance=lambda share: None,
    )  # fmt: skip
    return (latents - image).abs().mean().item()


def _refused(model: Checkpoint, scheduler: str, reason: str) -> UsageError:
    others = [name for name, (kind, _) in SCHEDULERS.items() if kind != scheduler]
    return UsageError(f"{model.name} cannot be drawn with {scheduler}: {reason}. For evaluate, give --scheduler "
                      f"{others[0]}, or another of {', '.join(others[1:])}.")  # fmt: skip
