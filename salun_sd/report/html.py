"""Parts of a page: its template, its pictures, its axes. No torch, no network."""

import base64
import io
from functools import cache
from importlib.resources import files as resources

from salun_sd.runtime.escape import visible

THUMBNAIL = 192  # longest side in pixels
THUMBNAIL_BYTES = 12_000
QUALITIES = (85, 60, 35, 10)  # of JPEG: the first that is small enough is taken


def ticks(peak: int) -> list[int]:
    """At most five round numbers, evenly spaced from 0 to the first one that is not below the peak."""
    step = next(k * 10**power for power in range(20) for k in (1, 2, 5) if 4 * k * 10**power >= peak)
    return list(range(0, peak + step, step))


def encoded(image) -> tuple[str, bytes]:
    """The type and the bytes of an image, at most THUMBNAIL_BYTES: PNG for small images, which JPEG would blur; else
    JPEG."""
    lossless = [("png", {})] if max(image.size) <= THUMBNAIL // 2 else []
    for kind, settings in [*lossless, *(("jpeg", {"quality": quality}) for quality in QUALITIES)]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **settings)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return kind, buffer.getvalue()


def thumbnail(image) -> dict:
    """A PIL image for a page: `src`, a data URI; `size`, at most THUMBNAIL pixels a side and never enlarged; `tiny`,
    true if the screen should show hard pixels.

    The image is made smaller in place.
    """
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    kind, data = encoded(image)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"src": source, "tiny": max(image.size) <= THUMBNAIL // 2, "size": image.size}


@cache
def template(package: str, name: str):
    """A page template of a package. Every value in it is escaped, and its control characters are made visible. The
    template may include files of this package, such as report.css."""
    from jinja2 import ChoiceLoader, Environment, FunctionLoader, StrictUndefined

    def files_of(folder: str) -> FunctionLoader:
        return FunctionLoader(lambda name: _text(folder, name))

    return Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=visible,
        loader=ChoiceLoader([files_of(package), files_of(__package__)]),
    ).get_template(name)  # fmt: skip


def _text(package: str, name: str) -> str | None:
    """The text of a file in a package; None if there is no such file."""
    file = resources(package).joinpath(name)
    return file.read_text(encoding="utf-8") if file.is_file() else None
