"""Prompts to images: one seed per image, resumable, nothing drawn twice."""

import io
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from salun_sd import ranks
from salun_sd.errors import UsageError
from salun_sd.files import write_atomic
from salun_sd.prompts import Prompt

PNG_END = b"IEND\xaeB`\x82"
PROVENANCE = "salun_sd"  # key of the PNG text chunk that says what an image was drawn from


def images_per_pass(unet: Mapping) -> int:
    """How many images go through the UNet together, from the latents' area: 32 at 8 x 8, 4 at 64 x 64, 1 at 128 x 128.

    A constant for a checkpoint, by its UNet's config, not a setting. Matrix kernels round by the shape of the whole
    batch, so an image can only be the same bytes in every run if every pass has the same shape: a pass with fewer
    images is padded.
    """
    return max(1, min(32, 2**14 // unet["sample_size"] ** 2))


def seed_of(prompt: Prompt, k: int) -> int:
    """The prompt's own seed for its first image; for the others 32 bits that hang on it and on k alone."""
    return prompt.seed if k == 0 else int(np.random.SeedSequence([prompt.seed, k]).generate_state(1)[0])


def file_of(prompt: Prompt, k: int) -> str:
    return f"images/{prompt.case}_{k}.png"


def draw(
    pipeline: Callable, prompts: list[Prompt], out: Path, *, steps: int, identity: str, samples: int = 1
) -> Iterator[tuple[Prompt, int]]:
    """Draw what is missing of out/images/<case>_<k>.png, k < samples; yields each (prompt, k) once it is on disk.
    Processes that run together take passes in turn, and end together. `pipeline` gives the pipeline, and is called
    only if there is something to draw.

    Image k of a prompt starts from noise drawn on the CPU from seed_of(prompt, k), and depends on nothing but its
    prompt, seed, guidance, steps and checkpoint (`identity`): the bytes are the same in any order, subset or resumed
    run (on a GPU, to the rounding of its kernels). Each PNG carries these in a text chunk; a file with others is a
    UsageError.
    """
    missing = []
    for prompt in prompts:
        for k in range(samples):
            provenance = f"{identity} steps={steps} guidance={prompt.guidance:g} seed={seed_of(prompt, k)}"
            if _is_drawn(out / file_of(prompt, k), f"{provenance} {prompt.text}"):
                yield prompt, k
            else:
                missing.append((prompt, k, f"{provenance} {prompt.text}"))
    missing.sort(key=lambda m: m[0].guidance)  # stable: a pass has one guidance scale
    ranks.wait()  # all have seen the same images missing
    for _, same_guidance in groupby(missing, key=lambda m: m[0].guidance):
        group, size = list(same_guidance), images_per_pass(pipeline().unet.config)
        for start in range(ranks.rank() * size, len(group), ranks.count() * size):
            rows = group[start : start + size]
            images = sample(pipeline(), [(p.text, seed_of(p, k)) for p, k, _ in rows], rows[0][0].guidance, steps, size)
            for (prompt, k, provenance), image in zip(rows, images, strict=True):
                info = PngImagePlugin.PngInfo()
                info.add_itxt(PROVENANCE, provenance)
                png = io.BytesIO()
                image.save(png, "png", pnginfo=info)
                write_atomic(out / file_of(prompt, k), png.getvalue())
                yield prompt, k
    ranks.wait()


@torch.no_grad()
def sample(
    pipeline, rows: list[tuple[str, int]], guidance: float, steps: int, size: int | None = None
) -> list[Image.Image]:
    """One pass through the pipeline: (text, seed) rows => images; padded to `size` rows with copies of the first."""
    padded = rows + [rows[0]] * ((size or len(rows)) - len(rows))
    return pipeline(
        [text for text, _ in padded],
        generator=[torch.Generator().manual_seed(seed) for _, seed in padded],
        guidance_scale=guidance,
        num_inference_steps=steps,
    ).images[: len(rows)]


def _is_drawn(file: Path, provenance: str) -> bool:
    if not file.is_file():
        return False
    try:
        with Image.open(file) as image:
            image.load()
            found = image.info.get(PROVENANCE)
        if not file.read_bytes().endswith(PNG_END):
            return False  # PIL reads a file whose very end is cut off
    except (OSError, SyntaxError, UnidentifiedImageError):
        return False  # damaged: draw it again
    if found != provenance:
        raise UsageError(
            f"{file} was drawn by another model or with other settings, or by another program; "
            "choose another --out, or remove the folder."
        )
    return True
