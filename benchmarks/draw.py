"""How fast the audit draws, beside one prompt at a time as in the authors' eval-scripts/generate-images.py.

    python benchmarks/draw.py
    python benchmarks/draw.py --arch pocket --images 64

In one run and on the same rows, at equal steps: `evaluate`'s own drawing, in float32 as there; the authors' loop with
the same scheduler; and with theirs, LMS. Every image is encoded from its text, drawn and written as a PNG. SD 1.x is
the true architecture with random weights, which take as long as trained ones. Writes benchmarks/draw.md.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import now
from diffusers import LMSDiscreteScheduler
from helpers.models import write_pipeline
from pocket_classes import cpu
from tqdm import tqdm

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate, prompts
from salun_sd.draw.sample import Row
from salun_sd.runtime.device import default_device

DEFAULTS = {"pocket": (64, 25), "sd1": (4, 2)}  # images, steps


class Arch(str, Enum):
    pocket = "pocket"
    sd1 = "sd1"


@torch.no_grad()
def one_at_a_time(pipeline, rows: list[Row], scheduler, steps: int, out: Path) -> None:
    """The loop of generate-images.py for one image a prompt, as it stands there but for the device."""
    unet, vae, tokenizer, text_encoder = pipeline.unet, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder

    def encoded(text: str) -> torch.Tensor:
        length = tokenizer.model_max_length
        tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids.to(unet.device))[0]

    for i, row in enumerate(tqdm(rows, desc="one at a time", unit="image")):
        generator = torch.Generator().manual_seed(row.seed)
        told = torch.cat([encoded(""), encoded(row.text)])
        width, height = (side // pipeline.vae_scale_factor for side in row.size)
        latents = torch.randn((1, unet.config.in_channels, height, width), generator=generator).to(unet.device)
        scheduler.set_timesteps(steps)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            without, with_text = unet(both, t, encoder_hidden_states=told).sample.chunk(2)
            latents = scheduler.step(without + row.guidance * (with_text - without), t, latents).prev_sample
        image = vae.decode(latents / vae.config.scaling_factor).sample
        pipeline.image_processor.postprocess(image)[0].save(out / f"{i}.png")


def rate(draw: Callable[[list[Row], int, Path], None], rows: list[Row], steps: int) -> float:
    """Images a second, after one image in one step, in which kernels are chosen."""
    with tempfile.TemporaryDirectory() as out:
        draw([rows[0]._replace(seed=0)], 1, Path(out))
    with tempfile.TemporaryDirectory() as out:
        began = now()
        draw(rows, steps, Path(out))
        return len(rows) / (now() - began)


def measured(model: Checkpoint, images: int, steps: int) -> tuple[float, float, float]:
    """Images a second: ours, the authors' loop with the same scheduler, and with LMS."""
    pipeline, size = load_pipeline(model), (model.image_size, model.image_size)
    texts = [p.text for p in prompts.read("pocket", ["class!=sneaker"])]
    guidance = model.sampling[1]
    rows = [Row(texts[i * len(texts) // images], i, guidance, size) for i in range(images)]
    own = pipeline.scheduler

    def ours(rows: list[Row], steps: int, out: Path) -> None:
        wanted = {out / f"{i}.png": row for i, row in enumerate(rows)}
        for _ in generate.draw(lambda: pipeline, wanted, identity="", scheduler=type(own).__name__, steps=steps):
            pass

    def theirs(scheduler) -> Callable[[list[Row], int, Path], None]:
        return lambda rows, steps, out: one_at_a_time(pipeline, rows, scheduler.from_config(own.config), steps, out)

    return (
        rate(ours, rows, steps),
        rate(theirs(type(own)), rows, steps),
        rate(theirs(LMSDiscreteScheduler), rows, steps),
    )


def line(model: Checkpoint, name: str, images: int, steps: int) -> str:
    ours, same, lms = measured(model, images, steps)
    return (f"| {name}, {model.image_size} px | {images} | {steps} of {model.scheduler.removesuffix('Scheduler')} | "
            f"{ours:.3g} | {same:.3g} | {ours / same:.2f} | {lms:.3g} | {ours / lms:.2f} |")  # fmt: skip


def main(
    arch: Annotated[list[Arch] | None, typer.Option(help="Default: all.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Default: 64 of pocket, 4 of SD 1.x.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 25 for pocket, 2 for SD 1.x.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    table = []
    for name in [a.value for a in arch or Arch]:
        usual = DEFAULTS[name]
        how = images or usual[0], steps or usual[1]
        with tempfile.TemporaryDirectory() as folder:
            found = "pocket" if name == "pocket" else write_pipeline(Path(folder) / "sd1", "sd1", full=True)
            table.append(line(find(str(found)), {"pocket": "pocket", "sd1": "SD 1.x"}[name], *how))
        print(table[-1])
    device = torch.cuda.get_device_name() if default_device() == "cuda" else f"{cpu()}, {threads} of its cores"
    Path(__file__).with_suffix(".md").write_text(
        f"""# Images a second

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {device}, PyTorch {torch.__version__}, float32.

One run, the same rows, equal steps. "One at a time" is the loop of the authors' `generate-images.py`, one image a
prompt, with the model's own scheduler and with LMS, which they use.

| model | images | steps | `evaluate` | one at a time | times | one at a time, LMS | times |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(table)}
"""
    )


if __name__ == "__main__":
    typer.run(main)
