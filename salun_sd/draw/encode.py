"""Images and prompts to latents and text embeddings."""

import numpy as np
import torch
from PIL import Image, ImageOps

from salun_sd.core.diffusion import Condition


def pixels(image: Image.Image, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB image => [3, size, size] float32 in [-1, 1], and its time ids [6] float32.

    Short side resized (bicubic), centre crop, as in the authors' code. The time ids are what SDXL is told of size and
    crop: true height and width, top and left of the crop in the resized image, and the size (arXiv 2307.01952, 2.2).
    """
    ids = image.height, image.width, *(_overhang(image, side, size) for side in "hw"), size, size
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float().div(127.5).sub(1), torch.tensor(ids).float()


def _overhang(image: Image.Image, side: str, size: int) -> int:
    """Pixels that the centre crop takes from the top (h) or the left (w), once the short side has `size` pixels."""
    length = image.height if side == "h" else image.width
    return round((length * size / min(image.size) - size) / 2)


@torch.no_grad()
def encode_image(vae, values: torch.Tensor) -> torch.Tensor:
    """[3, size, size] => latent [4, h, w] float32 on the CPU, times the scaling factor.

    The posterior's mode, so that an image has one latent; the authors' code samples it anew at each use.
    """
    posterior = vae.encode(values[None].to(vae.device))
    return posterior.latent_dist.mode()[0].cpu() * vae.config.scaling_factor


@torch.no_grad()
def encode_prompts(pipeline, texts: list[str]) -> Condition:
    """Prompts => "context" [P, L, D] and, where the pipeline pools it, "text_embeds" [P, E], float32 on the CPU.

    Each by itself, so that an embedding never depends on its neighbours; as the pipeline itself encodes them to draw,
    and "" as it encodes the lack of a prompt: SDXL base has zeros there (force_zeros_for_empty_prompt).
    """
    device = pipeline.text_encoder.device
    rows = []
    for text in texts:
        context, _, *pooled = pipeline.encode_prompt(
            text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        row = {"context": context} | ({"text_embeds": pooled[0]} if pooled else {})
        empty_is_zero = text == "" and pipeline.config.get("force_zeros_for_empty_prompt")
        rows.append({k: (v * 0 if empty_is_zero else v)[0].cpu() for k, v in row.items()})
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
