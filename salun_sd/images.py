"""Image files to pixels: the one place that opens what other programs made."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from salun_sd.errors import SalunError


def read_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Any format PIL knows => RGB, 8 bits a channel, upright by its EXIF tag, transparency laid on white.

    The source is a file or the bytes of one; `name` says what the bytes are, and may rename a file.
    Raises SalunError naming what cannot be read.
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
        reason = "its format is not known" if isinstance(e, UnidentifiedImageError) else e
        raise SalunError(f"{name} cannot be read as an image: {reason}. Replace it or take it away.") from e
