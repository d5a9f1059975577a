"""Images to detections: NudeNet's boxes.

Files go in, plain dicts come out one by one, so a folder of any size needs the memory of a few images.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files as resources
from pathlib import Path

import numpy as np
from PIL import Image

from salun_sd.audit.protocols import LABELS
from salun_sd.draw.images import Unreadable, in_order, read_still
from salun_sd.errors import SalunError, UsageError, first_line

RESOLUTION = 640  # of a given model that does not say its own; the library's larger files are of this one


def to_bgr(image: Image.Image) -> np.ndarray:
    """RGB image => (height, width, 3) uint8 in blue, green, red order: what `cv2.imread` gives for the same PNG."""
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


def packaged() -> Path:
    """The weights that come with the library."""
    return Path(str(resources("nudenet").joinpath("320n.onnx")))


@cache
def detector_digest(weights: Path | None = None) -> str:
    """The SHA-256 of the weights file, in hex."""
    return sha256((weights or packaged()).read_bytes()).hexdigest()


def detector_name(weights: Path | None = None) -> str:
    """The detector's package version, its weights file and the start of their SHA-256, as every detection records it.

    Example: `nudenet 3.4.2 320n.onnx` and twelve hex digits.
    """
    return f"nudenet {version('nudenet')} {(weights or packaged()).name} {detector_digest(weights)[:12]}"


def load_detector(weights: Path | None = None):
    """The library's `NudeDetector` with its own weights, or with another of its files such as 640m.onnx, at the size of
    image that the file was exported for (its metadata `imgsz`, else RESOLUTION).

    Its session computes with one thread: images go through in parallel, which uses the cores better than parts of one
    image do. Raises UsageError where the file is no NudeNet 3 detector.
    """
    import onnxruntime
    from nudenet import NudeDetector

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    detector = NudeDetector()
    try:
        detector.onnx_session = session = onnxruntime.InferenceSession(str(weights or packaged()), options)
    except Exception as e:  # its own types, one for each way in which a file can be wrong
        raise _no_detector(weights, first_line(e)) from e
    said = session.get_modelmeta().custom_metadata_map
    names = said.get("names", "{}")
    if any(f"{i}: {label!r}" not in names for i, label in enumerate(LABELS)):
        raise _no_detector(weights, "its labels are not NudeNet's 18")
    sides = {int(n) for n in said.get("imgsz", str(RESOLUTION)).strip("[]").split(",")}
    if weights:
        detector.input_width = detector.input_height = max(sides)
    detector.input_name = session.get_inputs()[0].name
    return detector


def _no_detector(weights: Path | None, reason: str) -> SalunError:
    return UsageError(f"{weights} is no NudeNet 3 detector ({reason}). Give --detector-model one of its .onnx files, "
                      "such as 640m.onnx, or leave it out for the packaged one.")  # fmt: skip


def detect(files: Iterable[Path], weights: Path | None = None) -> Iterator[dict]:
    """Each image's width and height in pixels and every box NudeNet returns, `box` being x, y, width, height in pixels;
    of an image that cannot be read, `error`, why, and no boxes.

    Boxes are the library's own, unrounded, down to its own floor (a score of 0.25, after non-maximum suppression across
    labels), and its channel order is left as it is, so that scores compare with other NudeNet 3 results.
    One image a call, a core each: what an image gets depends neither on its neighbours nor on the number of cores.
    """
    detector, name = load_detector(weights), detector_name(weights)

    def found(file: Path) -> dict:
        try:
            image = read_still(file)
        except Unreadable as e:
            return {"detector": name, "error": e.reason}
        (boxes,) = detector.detect_batch([to_bgr(image)], batch_size=1)
        return {
            "detector": name,
            "width": image.width,
            "height": image.height,
            "boxes": [{"label": box["class"], "score": box["score"], "box": box["box"]} for box in boxes],
        }

    return in_order(found, files)
