"""Points on the paths by which a base draws prompts: images that are half drawn."""

from collections.abc import Sequence

import torch

from salun_sd.core.diffusion import Examples, noise_for, on_device
from salun_sd.draw.encode import encode_prompts
from salun_sd.draw.sample import check_drawn, denoise, images_per_pass, new_scheduler
from salun_sd.runtime.bar import Bar

SCHEDULER = "DDIMScheduler"  # whose x is in the scale in which the UNet was trained, and which draws no noise in a step
STEPS = 50  # of a whole path; fewer where the base was trained on fewer timesteps


class Path:
    """A scheduler of diffusers by which each row of a batch comes to a timestep of its own, and waits there."""

    def __init__(self, scheduler, times: torch.Tensor):
        """times: among the scheduler's own, int64 [B]."""
        self._scheduler, self._times = scheduler, times

    def __getattr__(self, name: str):
        return getattr(self._scheduler, name)

    @property
    def timesteps(self) -> torch.Tensor:
        """Those at which any row still takes a step."""
        return self._scheduler.timesteps[self._scheduler.timesteps > self._times.min()]

    def step(
        self, prediction: torch.Tensor, t: torch.Tensor, x: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        [moved, *_] = self._scheduler.step(prediction, t, x, return_dict=return_dict)
        return (torch.where((self._times < t)[:, None, None, None], moved, x),)


@torch.no_grad()
def half_drawn(pipeline, texts: Sequence[str], size: int, seed: int, guidance: float) -> dict[str, torch.Tensor]:
    """A point x_t for each text, on the path from noise to an image of size x size pixels, just before one of the
    path's steps: "latents" [N, C, h, w] float32, "times", the timesteps t of those steps, int64 [N], and "time_ids"
    [N, 6] float32, as SDXL takes them. All are on the CPU.

    The path is DDIM's with the base's own noise schedule. guidance: diffusers' scale, 1 + w. Noise and step of a point,
    each step with the same chance, depend on (seed, its place). Raises NotFinite where the UNet gives no such values.
    """
    unet, side = pipeline.unet, size // pipeline.vae_scale_factor
    scheduler = new_scheduler(pipeline.scheduler, SCHEDULER)
    steps = min(STEPS, scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(steps)
    at, noise = noise_for(range(len(texts)), (unet.config.in_channels, side, side), steps, seed)
    times = scheduler.timesteps[at]
    time_ids = torch.tensor([[size, size, 0, 0, size, size]] * len(texts)).float()
    row = {text: i for i, text in enumerate(dict.fromkeys(["", *texts]))}
    prompts, which = encode_prompts(pipeline, list(row)), torch.tensor([row[text] for text in texts])
    examples = Examples(noise, prompts, which, {"time_ids": time_ids} if "text_embeds" in prompts else {})
    for places in Bar(at.argsort(stable=True).split(images_per_pass(side, side)), desc="trajectories", unit="pass"):
        path = Path(new_scheduler(pipeline.scheduler, SCHEDULER), times[places].to(unet.device))
        conditions = (examples.condition(places, rows) for rows in (which[places], torch.zeros_like(places)))
        conditional, unconditional = (on_device(condition, unet.device) for condition in conditions)
        scale = torch.full((len(places),), guidance, device=unet.device)
        noise[places] = denoise(
            unet, path, noise[places].to(unet.device), conditional, unconditional if guidance > 1 else None, scale,
            steps=steps, generators=[], advance=lambda share: None,
        ).cpu()  # fmt: skip
    check_drawn(pipeline, noise, SCHEDULER)
    return {"latents": noise, "times": times, "time_ids": time_ids}
