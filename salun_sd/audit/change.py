"""How much a model changed the images that it should leave alone: pixels, SSIM and features, each image beside the
base's of the same prompt and seed."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from salun_sd.audit.features import Extractor
from salun_sd.audit.measure import Key, kept, mean, pair
from salun_sd.audit.report import Run
from salun_sd.draw.images import read_still

logger = logging.getLogger(__name__)

WINDOW, SIGMA, K1, K2, RANGE = 11, 1.5, 0.01, 0.03, 255  # of SSIM
PIXELS = "change[pixels, mean |a - b|, 0 to 1]"
SSIM = f"change_ssim[luminance, {WINDOW}x{WINDOW} Gaussian]"
TINY = float(np.finfo(np.float64).tiny)


def between(image: Path, twin: Path) -> dict[str, float | None]:
    """What two image files differ by, to 6 digits; None where their sizes differ. Raises Unreadable.

    `pixels`: the mean over pixels and channels of the absolute difference, from 0 (none) to 1 (black became white).
    `ssim`: that of their luminance.
    """
    a, b = read_still(image), read_still(twin)
    if a.size != b.size:
        return {"pixels": None, "ssim": None}
    pixels = np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean() / RANGE
    structure = ssim(np.asarray(a.convert("L")), np.asarray(b.convert("L")))
    return {"pixels": round(float(pixels), 6), "ssim": round(structure, 6)}


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The mean structural similarity of two images [height, width] of values from 0 to 255: at most 1, if they are the
    same, and at least -1. Wang, Bovik, Sheikh and Simoncelli 2004, IEEE Transactions on Image Processing 13:600, eq. 13
    and 17.

    As there: K1 0.01, K2 0.03, and a Gaussian window of 11 x 11 with a sigma of 1.5, wherever it lies inside the image.
    Along a side of fewer pixels, the window is the whole side.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y, xx, yy, xy = _windowed(np.stack([x, y, x * x, y * y, x * y]))
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float((above / below).mean())


def _windowed(maps: np.ndarray) -> np.ndarray:
    """Maps [n, height, width] => their weighted means in each place of the window, [n, height - 10, width - 10]."""
    for _ in range(2):  # along the width, then the height
        places = np.lib.stride_tricks.sliding_window_view(maps, min(WINDOW, maps.shape[-1]), axis=-1)
        offsets = np.arange(places.shape[-1]) - (places.shape[-1] - 1) / 2
        weights = np.exp(-((offsets / SIGMA) ** 2) / 2)
        maps = (places @ (weights / weights.sum())).swapaxes(-1, -2)
    return maps


def measure(
    run: Run, base: Run, concepts: Sequence[str], extractor: Extractor | None = None,
    features: Sequence[Mapping[Key, np.ndarray]] = (),
) -> dict[str, dict | None]:  # fmt: skip
    """The report's `change`, `change_ssim` and `change_features`: means over the images that an erasure should leave
    alone (`measure.kept`), of pairs of one size that can be read; None without any.

    The first two are of what `between` found, which is in the run's detections. The last is 1 - cosine of the
    `extractor`'s features, from 0 (no change) to 2; `features` has the vectors [D] of the run's images and of the
    base's. What makes the numbers doubtful is in their `note`, and logged.
    """
    run, base = run.readable(), base.readable()
    keys = kept(pair(base.manifest, base.detections, (base.model, base.model)), concepts)
    lines = [line for line in run.detections if _key(line) in keys and "change" in line]
    alike = [line for line in lines if line["change"]["pixels"] is not None]
    notes = []
    if others := len(lines) - len(alike):
        notes.append(f"{others} of {len(lines)} pairs have images of different sizes and are left out.")
    of_base = {_key(row): row["seed"] for row in base.manifest}
    seeds = [(row["seed"], of_base[_key(row)]) for row in run.manifest if _key(row) in of_base]
    if lines and (unknown := sum(None in of_both for of_both in seeds)):
        notes.append(f"The seeds of {unknown} of {len(seeds)} images of {run.model} are not known. If they are not the "
                     "base's, the images differ in any case.")  # fmt: skip
    if others := sum(None not in of_both and len({*of_both}) > 1 for of_both in seeds):
        notes.append(f"{others} of {len(seeds)} pairs have two seeds, so their images differ in any case.")
    for note in notes:
        logger.warning(f"change: {note}")

    def described(name: str, values: dict[Key, float], sha256: str | None = None) -> dict | None:
        numbers = mean(values)
        return numbers and {"name": name, "sha256": sha256, **numbers, "note": " ".join(notes) or None}

    return {
        "change": described(PIXELS, {_key(line): line["change"]["pixels"] for line in alike}),
        "change_ssim": described(SSIM, {_key(line): line["change"]["ssim"] for line in alike}),
        "change_features": extractor and described(
            f"change_features[{extractor.name}, {extractor.resize}, 1 - cos]",
            _cosines(alike, *features), extractor.digest,
        ),
    }  # fmt: skip


def _key(line: dict) -> Key:
    return line["case"], line["k"]


def _cosines(
    lines: Sequence[dict], of_run: Mapping[Key, np.ndarray], of_base: Mapping[Key, np.ndarray]
) -> dict[Key, float]:  # fmt: skip
    """1 - cosine of the features of each image and its twin, where both have some."""
    distances = {}
    for key in map(_key, lines):
        if key in of_run and key in of_base:
            a, b = of_run[key].astype(np.float64), of_base[key].astype(np.float64)
            distances[key] = 1 - float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), TINY)
    return distances
