"""Image files to pixels: the one module that opens the files of other programs."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from salun_sd.errors import SalunError

LONGEST_SIDE = 8192  # pixels, the most that an audit decodes: NudeNet pads to a square, and this one takes 200 MB
Item, Result = TypeVar("Item"), TypeVar("Result")


class Unreadable(SalunError):
    """A file that cannot be read as an image; `reason` says why, without the file's name."""

    def __init__(self, name: str | Path, reason: str):
        super().__init__(f"{name} cannot be read as an image: {reason}. Replace or remove it.")
        self.reason = reason


def read_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Any format that PIL opens => RGB, 8 bits a channel, upright by its EXIF tag, transparency on white.

    The source is a file or the bytes of one. Raises Unreadable, which names the source by `name` if that is given.
    """
    encoded = isinstance(source, bytes)
    try:
        with Image.open(io.BytesIO(source) if encoded else source) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grayscale, which PIL clips at 255
                values = np.asarray(image)
                if values.min() < 0 or values.max() > 0xFFFF:
                    raise ValueError("its values have more than 16 bits")
                is_8_bit = image.mode == "I" and values.max() <= 0xFF
                image = Image.fromarray((values if is_8_bit else values >> 8).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its values are floating-point numbers, whose white is not known")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as e:  # decoders raise many types on broken bytes, among them SyntaxError and struct.error
        name = name or (f"An image of {len(source)} bytes" if encoded else source)
        raise Unreadable(name, _reason(e)) from e


def _reason(e: Exception) -> str:
    if isinstance(e, UnidentifiedImageError):
        return "its format is not known"
    if isinstance(e, Image.DecompressionBombError):
        return f"it is larger than {LONGEST_SIDE:,} x {LONGEST_SIDE:,} pixels"
    return (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__


def read_still(file: Path) -> Image.Image:
    """As `read_image`, for a file of one frame with at most LONGEST_SIDE pixels a side.

    Both are checked before any pixel is decoded. Raises Unreadable, also for an animation: only its first frame would
    be looked at.
    """
    try:
        if not file.stat().st_size:
            raise ValueError("it is empty")
        with Image.open(file) as opened:
            if max(opened.size) > LONGEST_SIDE:
                width, height = opened.size
                raise ValueError(f"it has {width:,} x {height:,} pixels, and a side may have {LONGEST_SIDE:,}")
            if (frames := getattr(opened, "n_frames", 1)) > 1:
                raise ValueError(f"it holds {frames} frames, of which one alone would be looked at")
    except Exception as e:
        raise Unreadable(file, _reason(e)) from e
    return read_image(file)


def images_in(folder: Path) -> list[Path]:
    """The files of a folder that have the extension of an image, sorted, without hidden ones."""
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in extensions and file.name[0] != ".")


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """work(item) for each item, in the items' order, by one thread a core.

    The threads work ahead of the caller: at most three items a thread are started and not yet yielded.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    started: deque = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            started.append(pool.submit(work, item))
            if len(started) == 3 * threads:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
