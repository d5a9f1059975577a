"""Images to classes: any transformers image classifier, or CLIP without training, by the classes' names."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from salun_sd.clip import Clip, is_clip
from salun_sd.errors import SalunError, first_line
from salun_sd.images import in_order, still_or_why

if TYPE_CHECKING:
    import torch

ZERO_SHOT = "a photo of a {}"  # what CLIP is asked with, for each class


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


def digest_of(model, processor, answers: Sequence) -> str:
    """The start of the SHA-256 over what a judge answers by: its weights, how it takes images, the names it gives."""
    whole = hashlib.sha256(f"{processor.to_json_string()} {json.dumps(answers)}".encode())
    for name, t in model.state_dict().items():
        whole.update(name.encode() + t.cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


class Judge:
    """A classifier of either kind: images read ahead in order, answered in batches.

    `name` says which model it is and how it is asked; `matches` the classes and what each stands for in the model;
    `digest` is the same for two that answer the same.
    """

    name: str
    digest: str
    matches: list[tuple[str, str]]

    def chances(self, images: list[Image.Image]) -> "tuple[list[str], torch.Tensor]":
        """Images => the classes' names, and their softmax probabilities (image, class)."""
        raise NotImplementedError

    def classify(self, files: Iterable[Path], batch_size: int = 32) -> Iterator[tuple[str, float] | tuple[None, None]]:
        """Each image's top class over all labels, and its softmax probability rounded to 6 digits; None and None of one
        that cannot be read.

        The rounding hides what batch size does to the last bits of a float32.
        """
        read = in_order(still_or_why, files)
        while batch := list(islice(read, batch_size)):
            images = [image for image in batch if isinstance(image, Image.Image)]
            answers = iter(self._tops(images) if images else ())
            yield from (next(answers) if isinstance(image, Image.Image) else (None, None) for image in batch)

    def _tops(self, images: list[Image.Image]) -> list[tuple[str, float]]:
        names, chances = self.chances(images)
        scores, tops = chances.max(dim=-1)
        return [(names[top], round(score, 6)) for score, top in zip(scores.tolist(), tops.tolist(), strict=True)]


class Classifier(Judge):
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
            raise SalunError(
                f"No image classifier could be loaded from {model} ({first_line(error)}). "
                "Give --classifier a transformers image classification model or a CLIP, by folder or hub id."
            ) from error
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"])[:3])
            raise SalunError(f"{model} is no trained image classifier: its weights lack {missing}.")
        labels = [self.model.config.id2label[i] for i in range(len(self.model.config.id2label))]
        classes = list(dict.fromkeys(classes))
        self.name, self.labels = str(model), match_labels(labels, classes)
        self.matches = [(name, label) for name, label in zip(self.labels, labels, strict=True) if name in classes]
        self.model.to(device).eval()

    @cached_property
    def digest(self) -> str:
        return digest_of(self.model, self.processor, self.labels)

    def chances(self, images: list[Image.Image]) -> "tuple[list[str], torch.Tensor]":
        import torch

        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]  # (batch, 3, height, width)
        with torch.inference_mode():
            return self.labels, self.model(pixels.to(self.model.device)).logits.float().softmax(dim=-1)


class ZeroShot(Judge):
    """A CLIP model that answers with the class whose text, ZERO_SHOT, its image is nearest to (Radford et al. 2021,
    arXiv 2103.00020, section 3.1).

    It chooses among the classes given and knows no others: what became something else is named after the nearest of
    them. Raises SalunError for fewer than two classes.
    """

    def __init__(self, model: str | Path, classes: Iterable[str], device: str = "cpu"):
        self.classes = list(dict.fromkeys(classes))
        if len(self.classes) < 2:
            raise SalunError(
                f"CLIP chooses among the classes of the prompt set, and this one has only {some(self.classes)}: give "
                "--prompts with two classes or more, or --classifier an image classifier with labels of its own."
            )
        self.clip = Clip(model, device, option="--classifier")
        self.name = f"{model}, zero-shot among {len(self.classes)} classes, asked as {ZERO_SHOT.format('CLASS')!r}"
        self.matches = [(name, ZERO_SHOT.format(name)) for name in self.classes]
        self.texts = self.clip.of_texts([text for _, text in self.matches])  # (class, dimension)

    @cached_property
    def digest(self) -> str:
        return digest_of(self.clip.model, self.clip.processor, self.matches)

    def chances(self, images: list[Image.Image]) -> "tuple[list[str], torch.Tensor]":
        return self.classes, (self.clip.scale * self.clip.of_images(images) @ self.texts.T).softmax(dim=-1)


def load(model: str | Path, classes: Iterable[str], device: str = "cpu") -> Classifier | ZeroShot:
    """The judge that a folder or hub id holds; a CLIP that was not trained as a classifier is asked zero-shot."""
    return (ZeroShot if is_clip(model) else Classifier)(model, classes, device)
