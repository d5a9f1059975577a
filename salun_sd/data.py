"""Images and prompts to latents and text embeddings, each encoded once."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from salun_sd.errors import UsageError
from salun_sd.images import read_image


def images_in(folder: Path) -> list[Path]:
    """The image files directly in a folder, by name. Raises UsageError if it is no folder or holds none."""
    if not folder.is_dir():
        raise UsageError(f"Image folder {folder} was not found.")
    known = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in known)
    if not files:
        raise UsageError(f"Image folder {folder} holds no images: give one with .png, .jpg or other image files.")
    return files


def pixels(file: Path, size: int) -> torch.Tensor:
    """Image file => [3, size, size] float32 in [-1, 1]: short side resized (bicubic), centre crop, as in the authors'
    code."""
    image = ImageOps.fit(read_image(file), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)


@torch.no_grad()
def encode_image(vae, file: Path, size: int) -> torch.Tensor:
    """Image file => latent [4, h, w] float32 on the CPU, times the scaling factor.

    The posterior's mode, so that an image has one latent; the authors' code samples it anew at each use.
    """
    posterior = vae.encode(pixels(file, size)[None].to(vae.device))
    return posterior.latent_dist.mode()[0].cpu() * vae.config.scaling_factor


@torch.no_grad()
def encode_prompts(tokenizer, text_encoder, texts: list[str]) -> torch.Tensor:
    """Prompts => text embeddings [P, L, D] float32 on the CPU, padded and cut to the tokenizer's length."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                       return_tensors="pt")  # fmt: skip
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0].cpu()
