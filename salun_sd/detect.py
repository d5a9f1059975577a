"""Images to detections (NudeNet) and images to classes (any transformers image classifier).

Files go in, plain dicts and tuples come out one by one, so a folder of any size needs the memory of one batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files as resources
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from salun_sd.errors import SalunError
from salun_sd.images import read_image


def to_bgr(image: Image.Image) -> np.ndarray:
    """RGB image => (height, width, 3) uint8 in blue, green, red order: what `cv2.imread` gives for the same PNG."""
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


@cache
def detector_name() -> str:
    """The detector's package version, its weights file and the start of their SHA-256, as every detection records it.

    Example: `nudenet 3.4.2 320n.onnx` and twelve hex digits.
    """
    weights = resources("nudenet").joinpath("320n.onnx")
    return f"nudenet {version('nudenet')} {weights.name} {sha256(weights.read_bytes()).hexdigest()[:12]}"


def detect(files: Iterable[Path]) -> Iterator[dict]:
    """Each image's width and height in pixels and every box NudeNet returns, `box` being x, y, width, height in pixels.

    Boxes are the library's own, unrounded, down to its own floor (a score of 0.25, after non-maximum suppression across
    labels), and its channel order is left as it is, so that scores compare with other NudeNet 3 results.
    One image a call: what an image gets cannot depend on its neighbours, and a batch of 8 saved under a fifth of the
    time on a CPU.
    """
    from nudenet import NudeDetector

    detector = NudeDetector()
    for file in files:
        image = read_image(file)
        (boxes,) = detector.detect_batch([to_bgr(image)], batch_size=1)
        yield {
            "detector": detector_name(),
            "width": image.width,
            "height": image.height,
            "boxes": [{"label": box["class"], "score": box["score"], "box": box["box"]} for box in boxes],
        }


def synonyms(label: str) -> list[str]:
    """The names in one classifier label, ImageNet's being lists: "tench, Tinca tinca" => ["tench", "Tinca tinca"]."""
    return [name.strip() for name in label.split(",")]


def match_labels(labels: Sequence[str], classes: Iterable[str]) -> list[str]:
    """The name each classifier label is reported by: the class that equals it or one of its synonyms, whatever the
    case, else its first synonym.

    Raises SalunError where a class has no label, or two classes claim the same one.
    """
    reported = [synonyms(label)[0] for label in labels]
    claimed: dict[int, str] = {}
    unmatched = []
    for name in dict.fromkeys(classes):
        wanted = name.strip().lower()
        found = [i for i, label in enumerate(labels) if wanted in map(str.lower, [label, *synonyms(label)])]
        if not found:
            unmatched.append(name)
        for i in found:
            if i in claimed:
                raise SalunError(
                    f"The classes {claimed[i]!r} and {name!r} are both the classifier's label {labels[i]!r}. "
                    "Give them one name in the prompt set."
                )
            claimed[i] = reported[i] = name
    if unmatched:
        raise SalunError(
            f"The classifier has no label for {', '.join(map(repr, unmatched))}; it knows {some(labels)}. "
            "Use its names in the prompt set's class column, or another --classifier."
        )
    return reported


def some(labels: Sequence[str], count: int = 10) -> str:
    """The first labels in quotes, and how many more there are."""
    rest = f" and {len(labels) - count} more" if len(labels) > count else ""
    return ", ".join(map(repr, labels[:count])) + rest


class Classifier:
    """An image classifier that answers in the prompt set's class names.

    `model` is a folder or a hub id that `AutoModelForImageClassification` opens; it runs in float32 on `device`.
    Resizing and normalising are the model's own image processor's, always its PIL version, so that installing
    torchvision changes no result.
    """

    def __init__(self, model: str | Path, classes: Iterable[str], device: str = "cpu"):
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
            self.model, loading = AutoModelForImageClassification.from_pretrained(
                model, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # absent, of another kind, cut short: each comes as a different type
            reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
            raise SalunError(
                f"No image classifier could be loaded from {model} ({reason}). "
                "Give --classifier a transformers image classification model, by folder or hub id."
            ) from error
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:3])
            raise SalunError(f"{model} is no trained image classifier: its weights lack {missing}.")
        labels = self.model.config.id2label
        self.names = match_labels([labels[i] for i in range(len(labels))], classes)
        self.model.to(device).eval()

    def classify(self, files: Iterable[Path], batch_size: int = 32) -> Iterator[tuple[str, float]]:
        """Each image's top class over all labels, and its softmax probability rounded to 6 digits.

        The rounding hides what batch size does to the last bits of a float32.
        """
        import torch

        images = map(read_image, files)
        while batch := list(islice(images, batch_size)):
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]  # (batch, 3, height, width)
            with torch.inference_mode():
                logits = self.model(pixels.to(self.model.device)).logits  # (batch, labels)
            scores, tops = logits.float().softmax(dim=-1).max(dim=-1)
            for score, top in zip(scores.tolist(), tops.tolist(), strict=True):
                yield self.names[top], round(score, 6)
