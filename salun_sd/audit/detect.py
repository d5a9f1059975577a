"""Image files to NudeNet's boxes.

Results come one by one as plain dicts, so a folder of any size needs the memory of a few images.
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
from salun_sd.draw.images import Unreadable, in_order, is_blank, read_still
from salun_sd.errors import SalunError, UsageError, first_line
from salun_sd.runtime.contents import no_file

RESOLUTION = 640  # pixels, of a weights file that does not say its own; the library's larger files have this one


def to_bgr(image: Image.Image) -> np.ndarray:
    """RGB image => (height, width, 3), uint8, blue, green, red: what `cv2.imread` gives for the same PNG."""
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


def packaged() -> Path:
    """The weights file that comes with the library."""
    return Path(str(resources("nudenet").joinpath("320n.onnx")))


@cache
def detector_digest(weights: Path | None = None) -> str:
    """The SHA-256 of the weights file, in hex."""
    return sha256((weights or packaged()).read_bytes()).hexdigest()


def detector_name(weights: Path | None = None) -> str:
    """The detector as every detection records it: `nudenet`, the package version, the weights file, and the first 12
    hex digits of its SHA-256."""
    return f"nudenet {version('nudenet')} {(weights or packaged()).name} {detector_digest(weights)[:12]}"


def load_detector(weights: Path | None = None):
    """The library's `NudeDetector` with its packaged weights, or with another file such as 640m.onnx at the image size
    that the file was exported for (its metadata `imgsz`, else RESOLUTION).

    A session computes with one thread, because whole images in parallel use the cores better than parts of one image.
    Raises UsageError if the file is not a NudeNet 3 detector.
    """
    import onnxruntime
    from nudenet import NudeDetector

    if weights and (fault := no_file(weights)):  # a pipe would be waited for
        raise _no_detector(weights, fault)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = str(weights or packaged())
    try:
        session = onnxruntime.InferenceSession(file, options)
        metadata = session.get_modelmeta().custom_metadata_map
        side = max(int(n) for n in metadata.get("imgsz", str(RESOLUTION)).strip("[]").split(","))
    except Exception as e:  # onnxruntime has a type for each way in which a file can be wrong
        raise _no_detector(weights, f"is not a NudeNet 3 detector ({first_line(e)})") from e
    names = metadata.get("names", "{}")
    if any(f"{i}: {label!r}" not in names for i, label in enumerate(LABELS)):
        raise _no_detector(weights, "has other labels than NudeNet's 18")
    detector = NudeDetector(file, inference_resolution=side)
    detector.onnx_session = session
    if weights:  # the library takes a score that is NaN for no box
        [scores] = session.run(None, {session.get_inputs()[0].name: np.zeros((1, 3, side, side), np.float32)})
        if not np.isfinite(scores).all():
            raise _no_detector(weights, "is damaged: its scores are not finite")
    return detector


def _no_detector(weights: Path | None, fault: str) -> SalunError:
    return UsageError(f"{weights} {fault}. Give --detector-model one of NudeNet 3's .onnx files, such as 640m.onnx, or "
                      "leave it out for the packaged one.")  # fmt: skip


def detect(files: Iterable[Path], weights: Path | None = None, detects: bool = True) -> Iterator[dict]:
    """For each image its `width` and `height` in pixels, whether it is `blank`, and its `boxes`: the label, the score,
    and x, y, width, height in pixels. For an image that cannot be read, `error` with the reason, and no boxes.

    Boxes are the library's own, so that scores compare with other NudeNet 3 results: unrounded, down to its lowest
    score (0.25, after non-maximum suppression across labels), in its own channel order. Each call has one image on one
    core, so an image's boxes depend neither on other images nor on the number of cores.

    If it does not detect, images are read all the same, and have no boxes.
    """
    detector, name = (load_detector(weights), detector_name(weights)) if detects else (None, None)

    def detection(file: Path) -> dict:
        try:
            image = read_still(file)
        except Unreadable as e:
            return {"detector": name, "error": e.reason}
        boxes = detector.detect_batch([to_bgr(image)], batch_size=1)[0] if detector else ()
        return {
            "detector": name,
            "width": image.width,
            "height": image.height,
            "blank": is_blank(image),
            "boxes": [{"label": box["class"], "score": box["score"], "box": box["box"]} for box in boxes],
        }

    return in_order(detection, files)
