"""Images to latents and back, in the VAE's dtype where that gives finite values, else in float32."""

from collections.abc import Callable

import torch

from salun_sd.runtime.finite import finite

LARGE = 768  # pixels of a side, above which a VAE takes an image in tiles: its memory grows with the area


@torch.no_grad()
def encode(pipeline, values: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1] => latents [B, C, h, w] float32, times the scaling factor: the posterior's mode.
    Raises NotFinite where the VAE gives no such values, also in float32."""
    vae = pipeline.vae
    take_in_tiles(vae, max(values.shape[2:]))
    return _in_full(pipeline, lambda x: vae.encode(x).latent_dist.mode(), values) * vae.config.scaling_factor


@torch.no_grad()
def decode(pipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w], times the scaling factor => images [B, 3, H, W] float32, about in [-1, 1]; without a VAE,
    latents are images. Raises NotFinite where the VAE gives no such values, also in float32."""
    if (vae := pipeline.vae) is None:
        return latents
    take_in_tiles(vae, max(latents.shape[2:]) * pipeline.vae_scale_factor)
    return _in_full(pipeline, lambda x: vae.decode(x, return_dict=False)[0], latents / vae.config.scaling_factor)


def take_in_tiles(vae, side: int) -> None:
    """Let a VAE take images by themselves, and in tiles of the size that it was made for, if their longer side has more
    than `LARGE` pixels. So an image depends on its own size, and on none beside it."""
    if side > LARGE:
        vae.enable_slicing()
        vae.enable_tiling()
    else:
        vae.disable_slicing()
        vae.disable_tiling()


def _in_full(pipeline, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """run(x) in float32 [B, ...]: as the VAE gives it in its own dtype; the rows that are not finite in half, from the
    VAE in float32."""
    vae, name = pipeline.vae, f"The output of the VAE of {pipeline.name_or_path}"
    x, dtype = x.to(vae.device), vae.dtype
    result = run(x.to(dtype)).float()
    if dtype != torch.float32 and (broken := ~result.isfinite().flatten(1).all(1)).any():
        vae.to(torch.float32)  # its weights are as they were: half fits into float32, and back
        result[broken] = run(x)[broken]
        vae.to(dtype)
    return finite(result, name)
