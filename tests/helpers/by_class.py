"""Class-conditional pipelines with random weights, on disk: a DDPM in pixel space, and a DiT with its VAE. Tiny, or of
the true architecture of DiT-XL/2 256."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel

LABELS = ("bag", "coat", "ankle boot, boot")
NOISE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def write_ddpm(
    folder: Path, labels: Sequence[str] | None = LABELS, *, embeddings: int | None = None, channels: int = 1,
    guidance: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """It draws 8 x 8 pixels in two steps. embeddings: one more than labels, for the null class, if not given."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=embeddings or len(labels) + 1,
    )
    DDPMPipeline(unet.to(dtype), DDIMScheduler(**NOISE, clip_sample=True)).save_pretrained(folder)
    return _finished(folder, labels, guidance)


def write_dit(
    folder: Path, labels: Sequence[str] | None = LABELS, *, embeddings: int | None = None, guidance: float = 3.0,
    seed: int = 0, dtype: torch.dtype = torch.float32, full: bool = False,
) -> Path:  # fmt: skip
    """It predicts variances, too. Tiny: latents of 4 x 4, images of 8 x 8, two steps. embeddings: of classes, without
    the null class; as many as labels, if not given."""
    torch.manual_seed(seed)
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4}
    levels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    if full:
        size = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
        levels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 256}
    transformer = DiTTransformer2DModel(
        **size, in_channels=4, out_channels=8, num_embeds_ada_norm=embeddings or len(labels)
    )
    count = len(levels["block_out_channels"])
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count
    }  # fmt: skip
    vae = AutoencoderKL(**levels, **types, latent_channels=4)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False)
    DiTPipeline(transformer.to(dtype), vae.to(dtype), scheduler).save_pretrained(folder)
    return _finished(folder, labels, guidance)


def _finished(folder: Path, labels: Sequence[str] | None, guidance: float) -> Path:
    if labels is not None:
        change(folder / "model_index.json", id2label={str(n): label for n, label in enumerate(labels)})
    (folder / "sampling.json").write_text(json.dumps({"steps": 2, "guidance": guidance}))
    return folder


def change(file: Path, **values) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
