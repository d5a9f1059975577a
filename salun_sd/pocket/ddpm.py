"""The class-conditional pocket checkpoint: a DDPM that draws a class in pixel space, with classifier-free guidance."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from salun_sd.pocket.fashion import CLASSES
from salun_sd.pocket.stage import Stage

STEPS, BATCH = 2400, 64
NULL = len(CLASSES)  # the number of the null class
NO_CLASS = 0.1  # share of the images that are trained with the null class, as the authors have it


def train_pipeline(images: torch.Tensor, labels: torch.Tensor, out: Path, steps: int, seed: int) -> DDPMPipeline:
    """Train on grey images [N, 1, 32, 32] in [-1, 1] with labels [N], with the noise schedule of DDPM (arXiv
    2006.11239, section 4). It predicts v: after as many steps, what predicts the noise draws worse. A class without an
    image is never trained."""
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, prediction_type="v_prediction"
    )
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=16,
        num_class_embeds=len(CLASSES) + 1,
    ).to(memory_format=torch.channels_last)

    def step(g):
        index = torch.randint(len(images), (BATCH,), generator=g)
        x0, noise = images[index].to(unet.device), torch.randn((BATCH, *images.shape[1:]), generator=g).to(unet.device)
        t = torch.randint(1000, (BATCH,), generator=g).to(unet.device)
        has_none = torch.rand(BATCH, generator=g) < NO_CLASS
        classes = labels[index].masked_fill(has_none, NULL).to(unet.device)
        v = scheduler.get_velocity(x0, noise, t)
        return F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t, classes).sample, v)

    unet = Stage("unet", out, {"unet": unet}, steps, 1.5e-3, seed, ema=0.999).run(step)["unet"]
    return DDPMPipeline(unet, scheduler)


def save(pipeline: DDPMPipeline, out: Path) -> None:
    """Write the pipeline in float16, with the names of the classes."""
    pipeline.to(torch.float16).save_pretrained(out)
    index = out / "model_index.json"
    settings = json.loads(index.read_text()) | {"id2label": {str(n): name for n, name in enumerate(CLASSES)}}
    index.write_text(json.dumps(settings, indent=2) + "\n")
