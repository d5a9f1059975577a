"""How fast the audit draws, beside diffusers' pipeline and the loop of the authors' eval-scripts/generate-images.py.

    python benchmarks/draw.py
    python benchmarks/draw.py --arch pocket --images 64

In one run and on the same rows, with the model's own scheduler at equal steps: `evaluate`'s own drawing; diffusers'
pipeline, in batches of the same size; and the authors' loop, one prompt at a time, in float32 as there. In float32, and
in half where the device computes in it. Every image is encoded from its text, drawn and written as a PNG. SD 1.x is the
true architecture with random weights, which take as long as trained ones. Writes benchmarks/draw.md.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from enum import Enum
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from common import now
from helpers.models import write_pipeline
from kept_rows import cpu
from tqdm import tqdm

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import generate, prompts
from salun_sd.draw.sample import Row, images_per_pass
from salun_sd.runtime.device import Precision, default_device, dtype_name

DEFAULTS = {"pocket": (64, 25), "sd1": (8, 10) if default_device() == "cuda" else (4, 2)}  # images, steps
FILE = Path(__file__).with_suffix(".md")
NAMES = {"pocket": "pocket", "sd1": "SD 1.x"}


class Arch(str, Enum):
    pocket = "pocket"
    sd1 = "sd1"


class Other(str, Enum):
    diffusers = "diffusers"
    authors = "authors"


def ours(pipeline, rows: list[Row], steps: int, out: Path) -> None:
    wanted, scheduler = {out / f"{i}.png": row for i, row in enumerate(rows)}, type(pipeline.scheduler).__name__
    for _ in generate.draw(lambda: pipeline, wanted, identity="", scheduler=scheduler, steps=steps):
        pass


def of_diffusers(pipeline, rows: list[Row], steps: int, out: Path) -> None:
    """diffusers' pipeline, in batches of the size of ours."""
    [(width, height)], [guidance] = {row.size for row in rows}, {row.guidance for row in rows}
    most = images_per_pass(width // pipeline.vae_scale_factor, height // pipeline.vae_scale_factor)
    for first in range(0, len(rows), most):
        batch = rows[first : first + most]
        images = pipeline(
            [row.text for row in batch], width=width, height=height, guidance_scale=guidance, num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(row.seed) for row in batch],
        ).images  # fmt: skip
        for i, image in enumerate(images, first):
            image.save(out / f"{i}.png")


@torch.no_grad()
def of_authors(pipeline, rows: list[Row], steps: int, out: Path) -> None:
    """The loop of generate-images.py for one image a prompt, as it stands there but for the device and the
    scheduler."""
    unet, vae, tokenizer, text_encoder = pipeline.unet, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder
    scheduler = pipeline.scheduler

    def encoded(text: str) -> torch.Tensor:
        length = tokenizer.model_max_length
        tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text_encoder(tokens.input_ids.to(unet.device))[0]

    for i, row in enumerate(tqdm(rows, desc="authors", unit="image")):
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


def seconds(draw: Callable, rows: list[Row], steps: int) -> float:
    """On a CPU, a second is one that its cores work for this process: what runs beside it counts for little."""
    clock = now if default_device() == "cuda" else lambda: time.process_time() / torch.get_num_threads()
    with tempfile.TemporaryDirectory() as out:
        began = clock()
        draw(rows, steps, Path(out))
        return clock() - began


def measured(
    model: Checkpoint, dtype: torch.dtype, others: list[Other], images: int, steps: int, rounds: int
) -> dict[str, float]:  # fmt: skip
    """Images a second of "ours" and of each other: the median of some rounds, in each of which all draw, after a run in
    one step, in which kernels are chosen: on a CPU of one small image."""
    size = (model.image_size, model.image_size)
    texts, guidance = [p.text for p in prompts.read("pocket", ["class!=sneaker"])], model.sampling[1]
    rows = [Row(texts[i * len(texts) // images], i, guidance, size) for i in range(images)]
    pipeline = load_pipeline(model, dtype=dtype)
    ways = {"ours": partial(ours, pipeline)}
    if Other.diffusers in others:  # it draws with all its parts in one dtype
        theirs = pipeline if dtype == torch.float32 else load_pipeline(model, dtype=dtype).to(dtype)
        ways["diffusers"] = partial(of_diffusers, theirs)
    if Other.authors in others and dtype == torch.float32:
        ways["authors"] = partial(of_authors, pipeline)
    for draw in ways.values():
        seconds(draw, rows if default_device() == "cuda" else [rows[0]._replace(size=(64, 64))], 1)
    took = [{name: seconds(draw, rows, steps) for name, draw in ways.items()} for _ in range(rounds)]
    return {name: images / median(one[name] for one in took) for name in ways}


def line(model: Checkpoint, name: str, dtype: torch.dtype, others: list[Other], *how: int) -> str:
    rates, (images, steps, _) = measured(model, dtype, others, *how), how

    def beside(other: Other) -> str:
        theirs = rates.get(other.value)
        return f"{theirs:.3g} | {rates['ours'] / theirs:.2f}" if theirs else "- | -"

    return (f"| {name}, {model.image_size} px | {dtype_name(dtype)} | {images} | "
            f"{steps} of {model.scheduler.removesuffix('Scheduler')} | {rates['ours']:.3g} | "
            f"{beside(Other.diffusers)} | {beside(Other.authors)} |")  # fmt: skip


def main(
    arch: Annotated[list[Arch] | None, typer.Option(help="Default: all.")] = None,
    against: Annotated[list[Other] | None, typer.Option(help="Default: all.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Default: 64 of pocket, 4 of SD 1.x; on a GPU 8.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 25 for pocket, 2 for SD 1.x; on a GPU 10.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In each, all draw.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
    out: Annotated[Path, typer.Option(help="The file to write.")] = FILE,
) -> None:
    torch.set_num_threads(threads)
    table, half = [], Precision.to_draw("bfloat16", default_device()).dtype  # float32 where there is none
    for name in [a.value for a in arch or Arch]:
        how = images or DEFAULTS[name][0], steps or DEFAULTS[name][1], rounds
        with tempfile.TemporaryDirectory() as folder:
            model = find("pocket" if name == "pocket" else str(write_pipeline(Path(folder) / name, name, full=True)))
            for dtype in dict.fromkeys((torch.float32, half)):
                table.append(line(model, NAMES[name], dtype, against or list(Other), *how))
                print(table[-1])
    device = torch.cuda.get_device_name() if default_device() == "cuda" else f"{cpu()}, {threads} of its cores"
    out.write_text(
        f"""# Images a second

`python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}`
{date.today()}, {device}, PyTorch {torch.__version__}.

One run, the same rows, the model's own scheduler, equal steps; the median of {rounds} rounds. "diffusers" is its own
pipeline, in batches of the same size. "authors" is the loop of their `generate-images.py`, one image a prompt. On a
CPU, a second is one that the cores work for the program.

| model | dtype | images | steps | `evaluate` | diffusers | times | authors | times |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(table)}
"""
    )


if __name__ == "__main__":
    typer.run(main)
