"""Rows to image files: resumable, nothing drawn twice."""

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
from salun_sd.runtime.files import one_of_many, remove_stale

logger = logging.getLogger(__name__)

PNG_END = b"IEND\xaeB`\x82"
PROVENANCE = "salun_sd"  # key of the PNG text chunk that says what an image was drawn from


def seed_of(prompt: Prompt, k: int) -> int:
    """The prompt's own seed for its first image; for the others 32 bits that hang on it and on k alone."""
    return prompt.seed if k == 0 else int(np.random.SeedSequence([prompt.seed, k]).generate_state(1)[0])


def file_of(prompt: Prompt, k: int) -> str:
    return f"images/{prompt.case}_{k}.png"


def row_of(prompt: Prompt, k: int, size: tuple[int, int]) -> Row:
    """What image k of a prompt is drawn from; `size` is that of prompts without one."""
    return Row(prompt.text, seed_of(prompt, k), prompt.guidance, prompt.size or size)


def check(model: Checkpoint, prompts: Iterable[Prompt], steps: int | None) -> None:
    """UsageError where a model cannot draw in so many steps, or a prompt's size; says where sizes are far from its own.

    A side is a multiple of what one latent stands for; where a level of the UNet cannot be halved, diffusers resizes
    on the way up.
    """
    if steps and steps > model.timesteps:
        raise UsageError(
            f"--denoising-steps {steps} is more than the {model.timesteps} that {model.name} was trained on."
        )
    sizes = {p.size: p for p in prompts if p.size}
    for (width, height), prompt in sizes.items():
        if not width or not height or width % model.pixels or height % model.pixels:
            raise UsageError(f"Case {prompt.case} is to be {width} x {height} pixels, and {model.name} draws multiples "
                             f"of {model.pixels}: give --size {model.image_size}, or another.")  # fmt: skip
    largest, own = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0)), model.image_size
    if max(largest) > 2 * own:
        logger.warning(f"The prompts ask for images of up to {largest[0]} x {largest[1]} pixels, and {model.name} was "
                       f"made for {own} x {own}: give --size {own} to draw these.")  # fmt: skip


def missing(
    wanted: Mapping[Path, Row], *, identity: str, scheduler: str, steps: int, anew: bool = False
) -> dict[Path, Row]:  # fmt: skip
    """Of the files those that are not there whole. One that was drawn otherwise than its row says is a UsageError, or
    with `anew` missing, too."""
    left = {}
    for file, row in wanted.items():
        found = _carried(file)
        if found != _provenance(row, identity=identity, scheduler=scheduler, steps=steps):
            if found is not None and not anew:
                raise UsageError(
                    f"{file} was drawn by another model or with other settings, or by another program; "
                    "choose another --out, or remove the folder."
                )
            left[file] = row
    return left


def draw(
    pipeline: Callable, wanted: Mapping[Path, Row], *, identity: str, scheduler: str, steps: int, anew: bool = False
) -> Iterator[Path]:  # fmt: skip
    """Draw what is missing of the files, a PNG for each row; yields each once it is on disk. Processes that run
    together take passes in turn, and end together. `pipeline` gives the pipeline, and is called only if there is
    something to draw; `scheduler` is a class of diffusers.

    An image starts from noise that its row's seed draws on the CPU, and depends on nothing but its row, the scheduler,
    the steps and the checkpoint (`identity`): the bytes are the same in any order, subset or resumed run (on a GPU, to
    the rounding of its kernels). Each PNG carries these in a text chunk; a file with others is a UsageError, or drawn
    `anew`.
    """
    how = {"identity": identity, "scheduler": scheduler, "steps": steps}
    left = missing(wanted, **how, anew=anew)
    yield from (file for file in wanted if file not in left)
    for folder in {file.parent for file in left} if ranks.is_main() else ():
        remove_stale(folder)
    ranks.wait()  # all have seen the same images missing
    if left:
        sampler, files, rows = Sampler(pipeline(), steps, scheduler), list(left), list(left.values())
        for places in sampler.passes(rows)[ranks.rank() :: ranks.count()]:
            for i, image in zip(places, sampler.draw([rows[i] for i in places]), strict=True):
                _write(files[i], image, _provenance(rows[i], **how))
                yield files[i]
    ranks.wait()


def _provenance(row: Row, *, identity: str, scheduler: str, steps: int) -> str:
    width, height = row.size
    return (f"{identity} scheduler={scheduler} steps={steps} size={width}x{height} guidance={row.guidance} "
            f"seed={row.seed} {row.text}")  # fmt: skip


def _write(file: Path, image: Image.Image, provenance: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PROVENANCE, provenance)
    with one_of_many(file) as partial:
        image.save(partial, "png", pnginfo=info)


def _carried(file: Path) -> str | None:
    """What an image says that it was drawn from, "" where it says nothing; None where it is damaged or not there."""
    try:
        with Image.open(file) as image:
            image.load()
            found = image.info.get(PROVENANCE, "")
        return found if file.read_bytes().endswith(PNG_END) else None  # PIL reads a file whose very end is cut off
    except Exception:  # decoders say damage with many types
        return None
