"""Rows to image files: resumable, and no image is drawn twice."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Row, Sampler
from salun_sd.errors import UsageError
from salun_sd.runtime import ranks
from salun_sd.runtime.files import new_file, remove_stale

logger = logging.getLogger(__name__)

PNG_END = b"IEND\xaeB`\x82"
PROVENANCE = "salun_sd"  # key of the PNG text chunk with the row and the settings that an image was drawn from


def seed_of(prompt: Prompt, k: int) -> int:
    """The seed of a prompt's image k: the prompt's own for the first, else 32 bits derived from that seed and k."""
    return prompt.seed if k == 0 else int(np.random.SeedSequence([prompt.seed, k]).generate_state(1)[0])


def file_of(prompt: Prompt, k: int) -> str:
    return f"images/{prompt.case}_{k}.png"


def row_of(prompt: Prompt, k: int, size: tuple[int, int]) -> Row:
    """The row of a prompt's image k; `size` is for prompts without a size of their own."""
    return Row(prompt.text, seed_of(prompt, k), prompt.guidance, prompt.size or size)


def check(model: Checkpoint, prompts: Iterable[Prompt], steps: int | None) -> None:
    """Raise UsageError if a model cannot draw in so many steps, or at a prompt's size; warn of sizes far above its own.

    Width and height must be multiples of the pixels that one latent stands for. The UNet may halve them to a fraction:
    diffusers resizes on the way up.
    """
    if steps and steps > model.timesteps:
        raise UsageError(
            f"--denoising-steps {steps} is more than the {model.timesteps} that {model.name} was trained on."
        )
    sizes = {p.size: p for p in prompts if p.size}
    multiple, side = model.pixels_per_latent, model.image_size
    for (width, height), prompt in sizes.items():
        if not width or not height or width % multiple or height % multiple:
            raise UsageError(f"Case {prompt.case} asks for {width} x {height} pixels, and {model.name} draws multiples "
                             f"of {multiple}: give --size {side}, or another multiple.")  # fmt: skip
    largest = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    if max(largest) > 2 * side:
        logger.warning(f"The prompts ask for images of up to {largest[0]} x {largest[1]} pixels, and {model.name} was "
                       f"made for {side} x {side}: give --size {side} to draw that size.")  # fmt: skip


def missing(
    wanted: Mapping[Path, Row], *, identity: str, scheduler: str, steps: int, redraw: bool = False
) -> dict[Path, Row]:  # fmt: skip
    """The files, with their rows, that are absent or damaged. A whole image of another row or other settings raises
    UsageError; with `redraw` it is missing, too."""
    rows = {}
    for file, row in wanted.items():
        recorded = _recorded(file)
        if recorded != _provenance(row, identity=identity, scheduler=scheduler, steps=steps):
            if recorded is not None and not redraw:
                raise UsageError(
                    f"{file} was drawn by another model or with other settings, or by another program; "
                    "choose another --out, or remove the folder."
                )
            rows[file] = row
    return rows


def draw(
    pipeline: Callable, wanted: Mapping[Path, Row], *, identity: str, scheduler: str, steps: int, redraw: bool = False
) -> Iterator[Path]:  # fmt: skip
    """Draw the images that are missing, a PNG for each row; yields each file once it is on disk.

    `pipeline` returns the pipeline, and is called only if there is something to draw; `scheduler` is the name of a
    class of diffusers. Several processes take the passes in turn, and end together.

    An image starts from noise that its row's seed draws on the CPU. It depends only on its row, the scheduler, the
    steps and the checkpoint (`identity`): its bytes are the same in any order, subset or resumed run (on a GPU, to
    the rounding of its kernels). Each PNG carries these settings in a text chunk. An image with others raises
    UsageError, or with `redraw` is drawn again.
    """
    settings = {"identity": identity, "scheduler": scheduler, "steps": steps}
    rows_left = missing(wanted, **settings, redraw=redraw)
    yield from (file for file in wanted if file not in rows_left)
    for folder in {file.parent for file in rows_left} if ranks.is_main() else ():
        remove_stale(folder)
    ranks.wait()  # every process has listed the same missing images
    if rows_left:
        sampler, files, rows = Sampler(pipeline(), steps, scheduler), list(rows_left), list(rows_left.values())
        for places in sampler.passes(rows)[ranks.rank() :: ranks.count()]:
            for i, image in zip(places, sampler.draw([rows[i] for i in places]), strict=True):
                _write(files[i], image, _provenance(rows[i], **settings))
                yield files[i]
    ranks.wait()


def _provenance(row: Row, *, identity: str, scheduler: str, steps: int) -> str:
    width, height = row.size
    return (f"{identity} scheduler={scheduler} steps={steps} size={width}x{height} guidance={row.guidance} "
            f"seed={row.seed} {row.text}")  # fmt: skip


def _write(file: Path, image: Image.Image, provenance: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PROVENANCE, provenance)
    with new_file(file, sweep=False) as partial:
        image.save(partial, "png", pnginfo=info)


def _recorded(file: Path) -> str | None:
    """The provenance in an image's text chunk, "" if it has none; None if the file is damaged or absent."""
    try:
        with Image.open(file) as image:
            image.load()
            provenance = image.info.get(PROVENANCE, "")
        return provenance if file.read_bytes().endswith(PNG_END) else None  # PIL reads a file whose very end is cut off
    except Exception:  # decoders report damage by many types
        return None
