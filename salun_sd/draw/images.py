"""Image files to RGB pixels: the one module that opens the files of other programs."""

import io
import logging
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from salun_sd.errors import SalunError
from salun_sd.runtime.contents import content_of

logger = logging.getLogger(__name__)

LONGEST_SIDE = 8192  # pixels, the most that an audit decodes: NudeNet pads to a square, and this one takes 200 MB
BLANK = 8  # of 255 levels; no eye sees a picture in so few
# Formats that are never opened: EPS starts Ghostscript, IPTC opens whatever it holds, and of the others Pillow decodes
# no pixels.
CLOSED = {"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
LAYERED = {"MPO", "PSD"}  # the first picture is the whole one: a phone's depth map, or layers, come after it
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # fmt: skip
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
PNG_PIXELS = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}  # the chunks of pixels, beside the critical ones
PNG_NOTES = {b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME"}  # not of the picture
PNG_UPRIGHT = (b"eXIf", b"tEXtRaw profile type exif\0", b"zTXtRaw profile type exif\0", b"iTXtXML:com.adobe.xmp\0\0")
PNG_TEXTS = {b"IHDR", b"tEXt", b"zTXt", b"iTXt", b"eXIf", PNG_END}  # what a PNG says, without its pixels
MOST_NOTE = 2**22  # bytes of a chunk of text, or of a block of EXIF
HEIC = "HEIC needs pip install 'salun-sd[heif]'"
Item, Result = TypeVar("Item"), TypeVar("Result")


class Unreadable(SalunError):
    """A file that cannot be read as an image; `reason` says why, without the file's name."""

    def __init__(self, name: str | Path, reason: str):
        super().__init__(f"{name} cannot be read as an image: {reason}. Replace or remove it.")
        self.reason = reason


def read_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Any format that Pillow decodes => RGB, 8 bits a channel, upright by its EXIF tag, transparency on white.

    The source is a file or the bytes of one. HEIC is read where pillow-heif is installed. Of an animation the first
    frame is read, and a warning says so. Raises Unreadable, which names the source by `name` if that is given.
    """
    encoded = isinstance(source, bytes)
    name = name or (f"An image of {len(source)} bytes" if encoded else str(source))
    try:
        with _opened(source if encoded else content_of(source)) as opened:
            if (frames := _frames(opened)) > 1:
                _warn_of_frames(name, frames)
            return _to_rgb(opened)
    except Exception as e:  # decoders raise many types on broken bytes, among them SyntaxError and struct.error
        raise Unreadable(name, _reason(e)) from e


def read_still(file: Path) -> Image.Image:
    """As `read_image`, for a file of one frame with at most LONGEST_SIDE pixels a side.

    Both are checked before any pixel is decoded. Raises Unreadable, also for an animation: only its first frame would
    be looked at.
    """
    try:
        with _opened(content_of(file)) as opened:
            if max(opened.size) > LONGEST_SIDE:
                width, height = opened.size
                raise ValueError(f"it has {width:,} x {height:,} pixels, and a side may have {LONGEST_SIDE:,}")
            if (frames := _frames(opened)) > 1:
                raise ValueError(f"it holds {frames} frames, of which one alone would be looked at")
            return _to_rgb(opened)
    except Exception as e:
        raise Unreadable(file, _reason(e)) from e


def read_notes(file: Path) -> tuple[dict[str, str], Image.Exif]:
    """The texts of an image file by their keywords, and its EXIF tags. No pixel is decoded.

    Damaged chunks of a PNG, and what has more than MOST_NOTE bytes, count as absent. Raises Unreadable, also where a
    compressed text has more than the 1 MiB that Pillow unpacks.
    """
    try:
        content = content_of(file)
        if content.startswith(PNG):
            chunks = [c for kind, c, is_whole in _chunks(content) if kind in PNG_TEXTS and is_whole]
            content = b"".join([PNG, *(c for c in chunks if len(c) <= MOST_NOTE)])
        with Image.open(io.BytesIO(content), formats=formats()) as opened:
            texts = {key: str(value) for key, value in opened.info.items() if isinstance(value, str)}
            exif, block = Image.Exif(), opened.info.get("exif") or b""
        exif.load(block if len(block) <= MOST_NOTE else b"")
        exif.get_ifd(ExifTags.IFD.Exif)  # read here, where an error is named
        return texts, exif
    except Exception as e:  # as many types as there are kinds of damage
        raise Unreadable(file, _reason(e)) from e


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names, in the order in which Pillow tries them."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if name not in CLOSED)


def _opened(content: bytes) -> Image.Image:
    """The image in a file's bytes; no pixel is decoded yet."""
    if not content:
        raise ValueError("it is empty")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of Git LFS: type git lfs pull to get the image")
    try:
        return Image.open(io.BytesIO(_without_notes(content)), formats=formats())
    except UnidentifiedImageError as e:
        raise ValueError(_unknown(content)) from e


def _unknown(content: bytes) -> str:
    """What the bytes of no image may be, in words."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"mif1", b"msf1") and "HEIF" not in formats():
        return HEIC
    if content.lstrip().startswith(b"<"):
        return "it is a text such as a web page"
    return "its format is not known, or its header is damaged"


def _without_notes(content: bytes) -> bytes:
    """A PNG without the chunks that say nothing of its pixels; other files as they are.

    Pillow refuses a whole PNG for a text or a colour profile that is long, and for a damaged note after the pixels.
    """
    if not content.startswith(PNG):
        return content
    kept, damaged = [PNG], None
    for kind, chunk, is_whole in _chunks(content):
        damaged = damaged or (None if is_whole or kind in PNG_NOTES else kind)
        of_pixels = not kind[0] & 0x20 or kind in PNG_PIXELS  # critical chunks begin with a capital letter
        if damaged and of_pixels and kind != PNG_END:
            raise ValueError(f"its chunk {damaged.decode('ascii', 'replace')} is damaged")
        if of_pixels or (is_whole and chunk[4:].startswith(PNG_UPRIGHT)):
            kept.append(chunk)
    return b"".join(kept)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Each chunk of a PNG: its kind, its bytes, and whether its checksum is that of kind and data."""
    start = len(PNG)
    while len(content) - start >= 8:
        length, kind = struct.unpack_from(">I4s", content, start)
        chunk = content[start : start + 12 + length]  # 4 bytes each of length, kind and checksum
        yield kind, chunk, struct.pack(">I", zlib.crc32(chunk[4:-4])) == chunk[8 + length :]
        start = len(content) if kind == PNG_END else start + 12 + length


def is_whole_png(content: bytes) -> bool:
    """Whether a PNG is what was written, to the last byte: every chunk's checksum is right, and it ends where it
    should."""
    chunks = list(_chunks(content)) if content.startswith(PNG) else []
    ends = bool(chunks) and chunks[-1][0] == PNG_END
    size = len(PNG) + sum(len(chunk) for _, chunk, _ in chunks)
    return ends and size == len(content) and all(is_whole for *_, is_whole in chunks)


def _frames(image: Image.Image) -> int:
    return 1 if image.format in LAYERED else getattr(image, "n_frames", 1)


@cache  # an image is read more than once
def _warn_of_frames(name: str, frames: int) -> None:
    logger.warning(f"{name} holds {frames} frames; the first is used.")


def _to_rgb(opened: Image.Image) -> Image.Image:
    opened.load()
    image = opened.transpose(turn) if (turn := _turn(opened)) is not None else opened
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


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn an image so that it is upright. A damaged EXIF block says nothing of it, nor of the pixels."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as many types as there are tags
        return None


def _reason(e: Exception) -> str:
    if isinstance(e, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    return (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB image is one colour: each channel spans at most BLANK levels. A safety filter's black square and a
    failed decode are, also after JPEG."""
    return all(high - low <= BLANK for low, high in image.getextrema())


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
