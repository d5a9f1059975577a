"""The noise that a picture of the concept comes from (TINA, arXiv 2603.17828; Memories of Forgotten Concepts,
Rusanovsky et al., CVPR 2025, arXiv 2412.00782)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler

from salun_sd.attacks.attack import Attack, Scene, Try
from salun_sd.attacks.target import Target
from salun_sd.draw import vae
from salun_sd.draw.generate import row_of, seed_of
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Given, Sampler, check_drawn, new_scheduler

SCHEDULER, STEPS = "DDIMScheduler", 50


@dataclass(frozen=True)
class Latent(Attack):
    """DDIM's steps backwards, with the null text, lead from a picture of the concept to a noise. The same steps forward
    lead back to a picture, in one try.

    The facts of a try: `psnr`, how near the picture that the noise gives is to the picture that the VAE makes of the
    given one, in dB; `log_likelihood` of the noise under a standard normal distribution, in nats for each of its
    numbers: -1.42 on average for such noise.
    """

    needs: ClassVar[frozenset] = frozenset({"picture", "null"})
    from_picture: ClassVar[bool] = True
    drawing: ClassVar[tuple[str, int]] = (SCHEDULER, STEPS)
    guidance: ClassVar[float] = 1.0  # none: the text is the null text

    def passes(self, prompts: int) -> int:
        return prompts * 2 * STEPS  # backwards, and forward again

    @torch.no_grad()
    def tries(self, scene: Scene, prompt: Prompt, found: dict[str, torch.Tensor]) -> list[Try]:
        one = Try("", seed_of(prompt, int(scene.control)), guidance=self.guidance)
        if scene.control:
            return [one]
        pipeline, picture = scene.target.pipeline, scene.picture(prompt)
        noise = inverted(scene.target, picture)
        row = row_of(prompt, 0, (scene.target.model.image_size,) * 2)._replace(text="", guidance=self.guidance)
        redrawn = Sampler(pipeline, STEPS, SCHEDULER, lambda _: Given(start=noise)).latents([row], 1)
        images = [vae.decode(pipeline, latents.to(pipeline.unet.device)) for latents in (picture, redrawn)]
        likelihood = -(noise.square().mean().item() + math.log(2 * math.pi)) / 2
        return [one._replace(start=noise, facts={"psnr": psnr(*images), "log_likelihood": likelihood})]


def inverted(target: Target, picture: torch.Tensor) -> torch.Tensor:
    """Latents [1, C, h, w] of a picture => the noise [1, C, h, w] from which DDIM draws it, about: a step assumes that
    the model predicts the same at both of its ends (DDIM, arXiv 2010.02502, section 4.3)."""
    config = new_scheduler(target.pipeline.scheduler, SCHEDULER).config
    spacing = "trailing" if config.timestep_spacing == "linspace" else config.timestep_spacing  # as near as there is
    scheduler = DDIMInverseScheduler.from_config(config, timestep_spacing=spacing)
    scheduler.set_timesteps(STEPS, device=target.device)
    x, null = picture.to(target.device), target.encode("")
    for t in scheduler.timesteps:
        [x, _] = scheduler.step(target.predict(x, t.expand(1), null), t, x, return_dict=False)
    check_drawn(target.pipeline, x, type(scheduler).__name__)
    return x.cpu()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """The peak signal-to-noise ratio of two images in [-1, 1], in dB; at most 100."""
    error = F.mse_loss(a.clamp(-1, 1), b.clamp(-1, 1)).item()
    return -10 * math.log10(max(error / 4, 1e-10))
