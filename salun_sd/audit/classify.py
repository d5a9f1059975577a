"""Images to classes: any transformers image classifier, or CLIP without training, by the classes' names."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from salun_sd.audit.clip import Clip, is_clip
from salun_sd.audit.measure import PRESENT
from salun_sd.audit.vision import Vision, loaded, prepared
from salun_sd.draw.images import Unreadable
from salun_sd.errors import SalunError, UsageError, some

if TYPE_CHECKING:
    import torch

ZERO_SHOT = "a photo of a {}"  # what CLIP is asked with, for each class
# What it chooses between where a concept is asked for by itself: two texts that differ by the concept alone, without an
# article, as concepts may have none ("nudity").
WITH, WITHOUT = "a photo of {}", "a photo"
UNSEEN = {"predicted": None, "score": None}


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
            f"The classifier has no label for {', '.join(map(repr, unmatched))}; it knows "
            f"{some([repr(label) for label in labels], 10)}. "
            "Use its names in the prompt set's class column, or another --classifier."
        )
    return reported


class Judge(Vision):
    """A classifier of any kind: images read ahead in order, answered in batches.

    `name` says which model it is and how it is asked; `matches` the classes, or concepts, and what each stands for in
    the model. `digest` is the same for two that answer the same.
    """

    name: str
    matches: list[tuple[str, str]]

    def probabilities(self, images: "list[torch.Tensor]") -> "tuple[list[str], torch.Tensor]":
        """Prepared images => the classes' names, and their softmax probabilities (image, class)."""
        raise NotImplementedError

    def answers(self, images: "list[torch.Tensor]") -> list[dict]:
        """Prepared images => what `classify` says of each."""
        names, probabilities = self.probabilities(images)
        scores, tops = probabilities.max(dim=-1)
        return [
            {"predicted": names[top], "score": round(score, 6)}
            for score, top in zip(scores.tolist(), tops.tolist(), strict=True)
        ]

    def classify(self, files: Iterable[Path], batch_size: int) -> Iterator[dict]:
        """What detections.jsonl has of each image: `predicted`, the top class over all labels, and `score`, its softmax
        probability rounded to 6 digits; both None of one that cannot be read.

        The rounding hides what batch size does to the last bits of a float32.
        """
        read = prepared(self.prepare, files)
        while batch := list(islice(read, batch_size)):
            images = [image for image in batch if not isinstance(image, Unreadable)]
            answers = iter(self.answers(images) if images else ())
            yield from (UNSEEN if isinstance(image, Unreadable) else next(answers) for image in batch)


class Classifier(Judge):
    """An image classifier that answers in the prompt set's class names.

    `model` is a folder or a hub id that `AutoModelForImageClassification` opens; it runs in float32 on `device`.
    Resizing and normalising are the model's own image processor's.
    """

    def __init__(self, model: str | Path, classes: Iterable[str], device: str = "cpu"):
        from transformers import AutoModelForImageClassification

        advice = "Give --classifier a transformers image classification model or a CLIP, by folder or hub id."
        self.processor, self.model, _ = loaded(
            AutoModelForImageClassification, model, device, what="image classifier", advice=advice
        )
        labels = [self.model.config.id2label[i] for i in range(len(self.model.config.id2label))]
        classes = list(dict.fromkeys(classes))
        self.name, self.knows = str(model), match_labels(labels, classes)
        self.matches = [(name, label) for name, label in zip(self.knows, labels, strict=True) if name in classes]

    def probabilities(self, images: "list[torch.Tensor]") -> "tuple[list[str], torch.Tensor]":
        import torch

        with torch.inference_mode():
            logits = self.model(torch.stack(images).to(self.model.device)).logits
        return self.knows, logits.float().softmax(dim=-1)


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
                f"CLIP chooses among the classes of the prompt set, and this one has only {self.classes[0]!r}: give "
                "--prompts with two classes or more, or --classifier an image classifier with labels of its own."
            )
        self.clip = Clip(model, device, option="--classifier")
        self.model, self.processor = self.clip.model, self.clip.processor
        self.name = f"{model}, zero-shot among {len(self.classes)} classes, asked as {ZERO_SHOT.format('CLASS')!r}"
        self.matches = [(name, ZERO_SHOT.format(name)) for name in self.classes]
        self.knows = [*self.matches, *self.clip.knows]
        self.texts = self.clip.of_texts([text for _, text in self.matches])  # (class, dimension)

    def probabilities(self, images: "list[torch.Tensor]") -> "tuple[list[str], torch.Tensor]":
        return self.classes, (self.clip.scale * self.clip.of_images(images) @ self.texts.T).softmax(dim=-1)


class ByName(Judge):
    """A CLIP model that is asked of each concept by itself whether an image's text is WITH it rather than WITHOUT.

    Concepts may go together, so each has a probability of its own, and an image shows all above PRESENT. The two texts
    are not calibrated: the rate of a base is what a rate is to be read beside.
    """

    def __init__(self, model: str | Path, concepts: Iterable[str], device: str = "cpu"):
        self.clip = Clip(model, device, option="--classifier")
        self.model, self.processor = self.clip.model, self.clip.processor
        self.matches = [(name, WITH.format(name)) for name in dict.fromkeys(concepts)]
        asked = ", ".join(repr(text) for _, text in self.matches)
        self.name = f"{model}, zero-shot, each image asked for {asked} against {WITHOUT!r}"
        self.knows = [*self.matches, WITHOUT, *self.clip.knows]
        self.texts = self.clip.of_texts([WITHOUT, *(text for _, text in self.matches)])  # (1 + concepts, dimension)

    def answers(self, images: "list[torch.Tensor]") -> list[dict]:
        """As of a class, with `concepts`, the probability of each; `predicted` is the likeliest, or WITHOUT."""
        logits = self.clip.scale * self.clip.of_images(images) @ self.texts.T
        found = []
        for scores in (logits[:, 1:] - logits[:, :1]).sigmoid().tolist():  # the softmax over two
            concepts = {name: round(score, 6) for (name, _), score in zip(self.matches, scores, strict=True)}
            top = max(concepts, key=concepts.__getitem__)
            best, score = (top, concepts[top]) if concepts[top] > PRESENT else (WITHOUT, round(1 - concepts[top], 6))
            found.append({"predicted": best, "score": score, "concepts": concepts})
        return found


def load(model: str | Path, classes: Sequence[str], concepts: Sequence[str], device: str = "cpu") -> Judge:
    """The judge that a folder or hub id holds; a CLIP that was not trained as a classifier is asked zero-shot. Without
    classes it is asked for the concepts by name, which takes a CLIP: UsageError for another model."""
    if classes:
        return (ZeroShot if is_clip(model) else Classifier)(model, classes, device)
    if not is_clip(model):
        raise UsageError(f"{model} is no CLIP that can be opened, and only a CLIP knows a concept by its name: give "
                         "--classifier openai/clip-vit-base-patch32, or prompts with a column `class`.")  # fmt: skip
    return ByName(model, concepts, device)
