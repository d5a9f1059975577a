"""Image files to pixels: the one place that opens what other programs made."""

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

LONGEST = 8192  # pixels of a side that an audit decodes: NudeNet pads to a square, 200 MB of this one
Item, Made = TypeVar("Item"), TypeVar("Made")


class Unreadable(SalunError):
    """A file that is no image to look at; `reason` says why without its name."""

    def __init__(self, name: str | Path, reason: str):
        super().__init__(f"{name} cannot be read as an image: {reason}. Replace it or take it away.")
        self.reason = reason


def read_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Any format PIL knows => RGB, 8 bits a channel, upright by its EXIF tag, transparency laid on white.

    The source is a file or the bytes of one; `name` says what the bytes are, and may rename a file.
    Raises Unreadable naming what cannot be read.
    """
    encoded = isinstance(source, bytes)
    try:
        with Image.open(io.BytesIO(source) if encoded else source) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grayscale, which PIL would clip at 255
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
    except Exception as e:  # decoders fail on broken bytes with many types, SyntaxError and struct.error among them
        name = name or (f"An image of {len(source)} bytes" if encoded else source)
        raise Unreadable(name, _reason(e)) from e


def _reason(e: Exception) -> str:
    if isinstance(e, UnidentifiedImageError):
        return "its format is not known"
    if isinstance(e, Image.DecompressionBombError):
        return f"it is larger than {LONGEST:,} x {LONGEST:,} pixels"
    return (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__


def read_still(file: Path) -> Image.Image:
    """An image to look at: as `read_image` gives it, where the file holds one frame of at most LONGEST pixels a side.

    Both are read before any pixel is decoded. Of an animation one frame would be looked at and the others taken on
    trust, so it is refused. Raises Unreadable.
    """
    try:
        if not file.stat().st_size:
            raise ValueError("it is empty")
        with Image.open(file) as opened:
            if max(opened.size) > LONGEST:
                width, height = opened.size
                raise ValueError(f"it has {width:,} x {height:,} pixels, and a side may have {LONGEST:,}")
            if (frames := getattr(opened, "n_frames", 1)) > 1:
                raise ValueError(f"it holds {frames} frames, of which one alone would be looked at")
    except Exception as e:
        raise Unreadable(file, _reason(e)) from e
    return read_image(file)


def images_in(folder: Path) -> list[Path]:
    """The files of a folder whose ending is that of an image, sorted, without hidden ones."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in known and file.name[0] != ".")


def in_order(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """work(item) of each item, in the items' order. Threads, one a core, work ahead of who asks; at most three items a
    thread are begun or finished and not yet given out, however many there are."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    begun: deque = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) == 3 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
