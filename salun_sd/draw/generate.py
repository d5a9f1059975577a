"""Rows to image files: resumable, and no image is drawn twice."""

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from salun_sd.checkpoint import load
from salun_sd.checkpoint.families import DIT
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import rehearsal
from salun_sd.draw.images import LONGEST_SIDE, is_whole_png
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Given, Row, Sampler, nothing_given
from salun_sd.errors import UsageError, some
from salun_sd.runtime import ranks
from salun_sd.runtime.bar import Bar, in_time
from salun_sd.runtime.contents import content_of
from salun_sd.runtime.device import dtype_mark
from salun_sd.runtime.files import new_file, remove_stale, to_disk
from salun_sd.runtime.stamps import Stamps, State, state_of

logger = logging.getLogger(__name__)

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"  # n is a fraction
LONG = 60  # seconds of drawing that are announced
SETTLED = 600 * 10**9  # ns after which a file is on the disk without being put there
PROVENANCE = "salun_sd"  # key of the PNG text chunk with the row and the settings that an image was drawn from


def seed_of(prompt: Prompt, k: int) -> int:
    """The seed of a prompt's image k: the prompt's own for the first, else 32 bits derived from that seed and k."""
    return prompt.seed if k == 0 else int(np.random.SeedSequence([prompt.seed, k]).generate_state(1)[0])


def file_of(prompt: Prompt, k: int) -> str:
    return f"images/{prompt.case}_{k}.png"


def row_of(prompt: Prompt, k: int, size: tuple[int, int]) -> Row:
    """The row of a prompt's image k; `size` is for prompts without a size of their own."""
    return Row(prompt.text, seed_of(prompt, k), prompt.guidance, prompt.size or size)


def line_of(p: Prompt, k: int, file: str, row: Row | None, steps: int | None) -> dict:
    """An image's line of manifest.jsonl; `row` is what it was drawn from, None if that is unknown."""
    line = {"file": file, "case": p.case, "k": k, "prompt": p.text, "class": p.label, "seed": row and row.seed,
            "guidance": row and row.guidance, "size": row and list(row.size), "steps": steps}  # fmt: skip
    return line | ({"categories": list(p.categories)} if p.categories else {})


def check(model: Checkpoint, prompts: Iterable[Prompt], *, scheduler: str | None, steps: int | None) -> None:
    """Raise SalunError if a model is not complete, or cannot draw with a scheduler, in so many steps, or one of the
    prompts; warn of sizes far above its own. None: its own scheduler and steps.

    Width and height must be multiples of the pixels that one latent stands for. The UNet of Stable Diffusion may halve
    them to a fraction: diffusers resizes on the way up. That of a class-conditional model may not, and a DiT draws
    squares alone.
    """
    load.check(model)
    prompts = list(prompts)
    if model.classes:
        _check_classes(model, prompts)
    rehearsal.check(model, scheduler or model.scheduler, steps or model.sampling[0])
    sizes = {p.size: p for p in prompts if p.size}
    multiple, side = model.size_multiple if model.classes else model.pixels_per_latent, model.image_size
    for (width, height), prompt in sizes.items():
        if model.family is DIT and width != height:
            raise UsageError(f"Case {prompt.case} asks for {width} x {height} pixels, and {model.name} draws squares: "
                             f"give --size {side}.")  # fmt: skip
        if not width or not height or width % multiple or height % multiple:
            raise UsageError(f"Case {prompt.case} asks for {width} x {height} pixels, and {model.name} draws multiples "
                             f"of {multiple}: give --size {side}, or another multiple.")  # fmt: skip
        if max(width, height) > LONGEST_SIDE:
            raise UsageError(f"Case {prompt.case} asks for {width} x {height} pixels, and a side may have "
                             f"{LONGEST_SIDE:,}: give --size {side}.")  # fmt: skip
    largest = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    if max(largest) > 2 * side:
        logger.warning(f"The prompts ask for images of up to {largest[0]} x {largest[1]} pixels, and {model.name} was "
                       f"made for {side} x {side}: give --size {side} to draw that size.")  # fmt: skip


def _check_classes(model: Checkpoint, prompts: Iterable[Prompt]) -> None:
    """Raise UsageError for a prompt that names no class, or is guided where the model has no null class."""
    for prompt in prompts:
        model.classes.number(prompt.text)
        if prompt.guidance > 1 and not model.is_guided:
            raise UsageError(f"Case {prompt.case} asks for a guidance scale of {prompt.guidance:g}, and {model.name} "
                             "has no null class: give --guidance 1.")  # fmt: skip


def missing(
    wanted: Mapping[Path, Row], *, identity: str, scheduler: str, steps: int, dtype: str = "float32",
    redraw: bool = False,
) -> dict[Path, Row]:  # fmt: skip
    """The files, with their rows, that are absent or damaged. A whole image of another row or other settings raises
    UsageError; with `redraw` it is missing, too.

    An image that was found whole is stamped, and is not opened again while its size and its times are the same.
    """
    rows, damaged, stamps = {}, [], cache(Stamps)
    for file, row in wanted.items():
        provenance = provenance_of(row, identity=identity, scheduler=scheduler, steps=steps, dtype=dtype)
        if stamps(file.parent).of(file.name) == _brief(provenance):
            continue
        state, recorded = state_of(file), _recorded(file)
        if recorded is None and file.exists():
            damaged.append(file.name)
        if recorded == provenance:
            if ranks.is_main():
                _stamp(file, state, provenance, stamps)
        else:
            if recorded is not None and not redraw:
                raise UsageError(
                    f"{file} was drawn by another model or with other settings, or by another program; "
                    "choose another --out, or remove the folder."
                )
            rows[file] = row
    if damaged:
        logger.warning(f"Damaged images are drawn again: {some(damaged)}.")
    return rows


def draw(
    pipeline: Callable, wanted: Mapping[Path, Row], *, identity: str, scheduler: str, steps: int,
    dtype: str = "float32", redraw: bool = False, what: str = "images", until: float | None = None,
    given: Callable[[Row], Given] = nothing_given,
) -> Iterator[Path]:  # fmt: skip
    """Draw the images that are missing, a PNG for each row; yields each file once it is written.

    `pipeline` returns the pipeline, and is called only if there is something to draw; `scheduler` is the name of a
    class of diffusers, `dtype` that in which the pipeline draws. Several processes take the passes in turn, and end
    together. `what` names the images on a progress bar, which moves with each denoising step: a pass of many images may
    take minutes. After the first pass, a log line says how long the others will take. No pass is begun after the moment
    `until` of time.monotonic, but the first one: the rows come first that stand first in `wanted`. `given` is that of a
    Sampler; a row's text, or `identity`, must then tell what was given.

    An image starts from noise that its row's seed draws on the CPU. It depends only on its row, the scheduler, the
    steps, the dtype and the checkpoint (`identity`): its bytes are the same in any order, subset or resumed run (on a
    GPU, to the rounding of its kernels). Each PNG carries these settings in a text chunk. An image with others raises
    UsageError, or with `redraw` is drawn again.
    """
    settings = {"identity": identity, "scheduler": scheduler, "steps": steps, "dtype": dtype}
    rows_left = missing(wanted, **settings, redraw=redraw)
    yield from (file for file in wanted if file not in rows_left)
    for folder in {file.parent for file in rows_left} if ranks.is_main() else ():
        remove_stale(folder)
    ranks.wait()  # every process has listed the same missing images
    if rows_left:
        files, rows, stamps = list(rows_left), list(rows_left.values()), cache(Stamps)
        with Bar(total=len(rows), desc=f"draw {what}", unit="image", bar_format=BAR) as bar:
            sampler = Sampler(pipeline(), steps, scheduler, given)
            passes = sampler.passes(rows)[ranks.rank() :: ranks.count()]
            bar.reset(sum(map(len, passes)))  # the time that the pipeline took to load tells nothing about images
            work, begun = [sampler.work(rows[places[0]]) for places in passes], time.monotonic()
            for n, places in enumerate(passes):
                if n and until is not None and time.monotonic() >= until:
                    break
                images = sampler.draw([rows[i] for i in places], advance=partial(_move, bar, len(places)))
                for i, image in zip(places, images, strict=True):
                    _write(files[i], image, provenance_of(rows[i], **settings))
                    yield files[i]
                for i in places:
                    _stamp(files[i], state_of(files[i]), provenance_of(rows[i], **settings), stamps)
                if not n:
                    _foretell(bar, (time.monotonic() - begun) * sum(work[1:]) / work[0])
    ranks.wait()


def _foretell(bar: Bar, seconds: float) -> None:
    """Log how long the images of a bar will take from now on, if that is long."""
    if seconds >= LONG and ranks.is_main():
        bar.clear()
        left = f"{bar.total:,} images take about {in_time(seconds)}"
        logger.info(f"{bar.desc}: {left}, as the first {bar.n:.0f} took.")


def _stamp(file: Path, state: State, provenance: str, stamps: Callable[[Path], Stamps]) -> None:
    """Note that an image is whole, once it is on the disk: else it may be lost in a power cut, and the note not."""
    if time.time_ns() - max(state[1:]) < SETTLED:
        to_disk(file)
    stamps(file.parent).add(file.name, state, _brief(provenance))


def _brief(provenance: str) -> str:
    """What a stamp says of a whole image: a digest of its provenance."""
    return hashlib.sha256(provenance.encode()).hexdigest()[:32]


def _move(bar: Bar, images: int, share: float) -> None:
    """Move a bar of images by a share of a pass. A sum of shares may be above 1 in its last digit."""
    bar.update(min(images * share, bar.total - bar.n))


def provenance_of(row: Row, *, identity: str, scheduler: str, steps: int, dtype: str) -> str:
    """What an image records of how it was drawn."""
    width, height = row.size
    return (f"{identity} scheduler={scheduler} steps={steps}{dtype_mark(dtype)} size={width}x{height} "
            f"guidance={row.guidance} seed={row.seed} {row.text}")  # fmt: skip


def _write(file: Path, image: Image.Image, provenance: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PROVENANCE, provenance)
    with new_file(file, many=True) as partial:
        image.save(partial, "png", pnginfo=info)


def _recorded(file: Path) -> str | None:
    """The provenance in an image's text chunk, "" if it has none; None if the file is damaged or absent."""
    try:
        content = content_of(file)
        if not is_whole_png(content):
            return None
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:  # its pixels are those that its checksums say
            return image.info.get(PROVENANCE, "")
    except Exception:  # decoders report damage by many types
        return None
