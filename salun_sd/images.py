"""Image files to pixels: the one place that opens what other programs made."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from salun_sd.errors import SalunError


def read_image(file: Path) -> Image.Image:
    """Any format PIL knows => RGB, 8 bits a channel, upright by its EXIF tag, transparency laid on white.

    Raises SalunError naming a file that cannot be read.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grayscale, which PIL would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as e:  # decoders fail on broken bytes with many types, SyntaxError and struct.error among them
        raise SalunError(f"{file} cannot be read as an image: {e}. Replace it or take it away.") from e
