"""Pages: the template's environment, pictures in them, axes. No torch, no network."""

import base64
import io
from functools import cache
from importlib.resources import files as resources

from salun_sd.report.escape import visible

THUMBNAIL = 192  # longest side in pixels
THUMBNAIL_BYTES = 12_000
QUALITIES = (85, 60, 35, 10)  # of JPEG: the best that is small enough


def ticks(peak: int) -> list[int]:
    """Round numbers from 0 to the first that is not below the peak, at most five."""
    step = next(k * 10**power for power in range(20) for k in (1, 2, 5) if 4 * k * 10**power >= peak)
    return list(range(0, peak + step, step))


def encoded(image) -> tuple[str, bytes]:
    """An image's type and file: PNG for the smallest, which would blur, else JPEG; of at most THUMBNAIL_BYTES."""
    forms = [("png", {})] if max(image.size) <= THUMBNAIL // 2 else []
    for kind, how in [*forms, *(("jpeg", {"quality": quality}) for quality in QUALITIES)]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **how)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return kind, buffer.getvalue()


def thumbnail(image) -> dict:
    """A PIL image as a data URI at most THUMBNAIL pixels a side, never enlarged; `tiny` asks for hard pixels on screen.

    The image is made smaller in place.
    """
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    kind, data = encoded(image)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"src": source, "tiny": max(image.size) <= THUMBNAIL // 2, "size": image.size}


@cache
def template(package: str, name: str):
    """A package's page template. Whatever is put into it is escaped, and its control characters shown; it may include
    files of this package, such as report.css."""
    from jinja2 import ChoiceLoader, Environment, FunctionLoader, StrictUndefined

    def text_of(folder: str) -> FunctionLoader:
        return FunctionLoader(lambda name: _text(folder, name))

    return Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=visible,
        loader=ChoiceLoader([text_of(package), text_of(__package__)]),
    ).get_template(name)  # fmt: skip


def _text(package: str, name: str) -> str | None:
    """A file of a package; None where it has none of that name."""
    file = resources(package).joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else None
