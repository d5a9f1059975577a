import base64
import io

import numpy as np
import pytest
from PIL import Image

from salun_sd.report import html
from salun_sd.report.html import thumbnail, ticks


@pytest.mark.parametrize("peak", [0, 1, 3, 4, 5, 9, 99, 100, 4703, 10**6])
def test_axes_have_few_round_ticks_that_hold_all(peak):
    got = ticks(peak)
    assert got[0] == 0 and got[-1] >= peak and len(got) <= 5
    assert got == list(range(0, got[-1] + 1, got[1] if peak else 1))
    assert peak == 0 or got[-1] < 5 * peak


def opened(made: dict) -> Image.Image:
    data = base64.b64decode(made["src"].partition(",")[2])
    assert len(data) <= html.THUMBNAIL_BYTES
    return Image.open(io.BytesIO(data))


def test_small_images_are_never_enlarged_and_lose_nothing():
    image = Image.new("RGB", (32, 32), (200, 10, 10))
    made = thumbnail(image.copy())
    small = opened(made)
    assert small.format == "PNG" and made["tiny"] and made["size"] == (32, 32)
    assert small.convert("RGB").tobytes() == image.tobytes()


def test_large_images_become_thumbnails():
    made = thumbnail(Image.new("RGB", (512, 256), (200, 10, 10)))
    wide = opened(made)
    assert wide.size == (192, 96) == made["size"] and wide.format == "JPEG" and not made["tiny"]


@pytest.mark.parametrize("side", [96, 192])
def test_noise_fits_into_the_bytes_of_a_thumbnail(side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    assert opened(thumbnail(Image.fromarray(noise))).size == (side, side)
