"""Images to classes: any transformers image classifier, or a CLIP that is asked by the names of the classes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from salun_sd.audit.clip import Clip, is_clip
from salun_sd.audit.measure import PRESENT
from salun_sd.audit.vision import Vision, batched, loaded, prepared
from salun_sd.checkpoint.classes import names_of
from salun_sd.draw.images import Unreadable
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime.finite import finite

if TYPE_CHECKING:
    import torch

ZERO_SHOT = "a photo of a {}"  # the text of a class for CLIP
# The two texts for a concept that is asked by itself. They differ only by the concept, and have no article, because
# some concepts take none ("nudity").
WITH, WITHOUT = "a photo of {}", "a photo"
UNSEEN = {"predicted": None, "score": None}


def synonyms(label: str) -> list[str]:
    """The names in one label, as ImageNet lists them: "tench, Tinca tinca" => ["tench", "Tinca tinca"]."""
    return [name.strip() for name in label.split(",")]


def match_labels(labels: Sequence[str], classes: Iterable[str]) -> list[str]:
    """The reported name of each label of a classifier: the class that equals the label or one of its synonyms, ignoring
    case; without one, its first synonym.

    Raises SalunError if a class has no label, or two classes have the same one.
    """
    reported = [synonyms(label)[0] for label in labels]
    claimed: dict[int, str] = {}
    unmatched = []
    for name in dict.fromkeys(classes):
        wanted = name.strip().lower()
        matching = [i for i, label in enumerate(labels) if wanted in map(str.lower, [label, *synonyms(label)])]
        if not matching:
            unmatched.append(name)
        for i in matching:
            if i in claimed:
                raise SalunError(
                    f"The classes {claimed[i]!r} and {name!r} are both the label {labels[i]!r} of the classifier. "
                    "Use one name for both in the prompt set."
                )
            claimed[i] = reported[i] = name
    if unmatched:
        raise SalunError(
            f"The classifier has no label for {', '.join(map(repr, unmatched))}; it knows "
            f"{some([repr(label) for label in labels], 10)}. "
            "Use its labels in the column `class` of the prompt set, or give another --classifier."
        )
    return reported


class Judge(Vision):
    """A classifier of any kind. It reads images ahead, and answers in order and in batches.

    `name` says which model it is and how it is asked. `matches` has each class, or concept, with its label or text in
    the model. Two judges with the same `digest` give the same answers.
    """

    name: str
    matches: list[tuple[str, str]]
    unseen = UNSEEN  # the answer for an image that cannot be read

    def probabilities(self, images: "list[torch.Tensor]") -> "tuple[list[str], torch.Tensor]":
        """Prepared images => the names of the classes, and their softmax probabilities (image, class), float32."""
        raise NotImplementedError

    def answers(self, images: "list[torch.Tensor]") -> list[dict]:
        """Prepared images => the answer of `classify` for each. Raises NotFinite where a probability is none."""
        names, probabilities = self.probabilities(images)
        scores, tops = finite(probabilities, f"The output of --classifier {self.name}").max(dim=-1)
        return [
            {"predicted": names[top], "score": round(score, 6)}
            for score, top in zip(scores.tolist(), tops.tolist(), strict=True)
        ]

    def classify(self, files: Iterable[Path], batch_size: int) -> Iterator[dict]:
        """For each image what `answers` gives, or `unseen`: `predicted`, the top class of all labels, and `score`, its
        softmax probability rounded to 6 digits.

        The rounding hides the last bits of a float32, which depend on the batch size.
        """
        read = prepared(self.prepare, files)
        while batch := list(islice(read, batch_size)):
            images = [image for image in batch if not isinstance(image, Unreadable)]
            answers = iter(self.answers(images) if images else ())
            yield from (self.unseen if isinstance(image, Unreadable) else next(answers) for image in batch)


class Classifier(Judge):
    """An image classifier that answers with the prompt set's names of classes.

    `model` is a folder or hub id for `AutoModelForImageClassification`, in float32 on `device`. Its own image processor
    resizes and normalises.
    """

    def __init__(self, model: str | Path, classes: Iterable[str], device: str = "cpu", option: str = "--classifier"):
        from transformers import AutoModelForImageClassification

        or_clip = " or a CLIP" if option == "--classifier" else ""
        advice = f"Give {option} a transformers image classification model{or_clip}, by folder or hub id."
        self.processor, self.model, _ = loaded(
            AutoModelForImageClassification, model, device, what="image classifier", advice=advice
        )
        if (labels := names_of(self.model.config.id2label)) is None:
            raise SalunError(f"{model} is damaged: its config's id2label has to name each class, from 0 on. {advice}")
        classes = list(dict.fromkeys(classes))
        self.name, self.vocabulary = str(model), match_labels(labels, classes)
        self.matches = [(name, label) for name, label in zip(self.vocabulary, labels, strict=True) if name in classes]

    def probabilities(self, images: "list[torch.Tensor]") -> "tuple[list[str], torch.Tensor]":
        import torch

        with torch.inference_mode():
            logits = self.model(batched(images).to(self.model.device)).logits[: len(images)]
        return self.vocabulary, logits.float().softmax(dim=-1)


class ZeroShot(Judge):
    """A CLIP model that answers with the class whose text, ZERO_SHOT, is nearest to the image (Radford et al. 2021,
    arXiv 2103.00020, section 3.1).

    It chooses only among the given classes: an image of anything else gets the nearest of them. Raises SalunError for
    fewer than two classes.
    """

    def __init__(self, model: str | Path, classes: Iterable[str], device: str = "cpu"):
        self.classes = list(dict.fromkeys(classes))
        if len(self.classes) < 2:
            raise SalunError(
                f"CLIP chooses among the classes of the prompt set, and this set has only {self.classes[0]!r}: give "
                "--prompts with two classes or more, or --classifier with an image classifier."
            )
        self.clip = Clip(model, device, option="--classifier")
        self.model, self.processor = self.clip.model, self.clip.processor
        self.name = f"{model}, zero-shot among {len(self.classes)} classes, asked as {ZERO_SHOT.format('CLASS')!r}"
        self.matches = [(name, ZERO_SHOT.format(name)) for name in self.classes]
        self.vocabulary = [*self.matches, *self.clip.vocabulary]
        texts = [text for _, text in self.matches]
        self.clip.check_different(texts)
        self.texts = self.clip.of_texts(texts)  # (class, dimension)

    def probabilities(self, images: "list[torch.Tensor]") -> "tuple[list[str], torch.Tensor]":
        return self.classes, (self.clip.scale * self.clip.of_images(images) @ self.texts.T).softmax(dim=-1)


class ByName(Judge):
    """A CLIP model that is asked for each concept by itself: is the text WITH it nearer to the image than WITHOUT?

    Each concept has a probability of its own, and an image shows all concepts above PRESENT. The two texts are not
    calibrated, so read a rate beside the base's.
    """

    def __init__(self, model: str | Path, concepts: Iterable[str], device: str = "cpu"):
        self.clip = Clip(model, device, option="--classifier")
        self.model, self.processor = self.clip.model, self.clip.processor
        self.matches = [(name, WITH.format(name)) for name in dict.fromkeys(concepts)]
        asked = ", ".join(repr(text) for _, text in self.matches)
        self.name = f"{model}, zero-shot, each image asked for {asked} against {WITHOUT!r}"
        self.vocabulary = [*self.matches, WITHOUT, *self.clip.vocabulary]
        texts = [WITHOUT, *(text for _, text in self.matches)]
        self.clip.check_different(texts)
        self.texts = self.clip.of_texts(texts)  # (1 + concepts, dimension)

    def answers(self, images: "list[torch.Tensor]") -> list[dict]:
        """Prepared images => for each `predicted`, the likeliest concept or WITHOUT; its `score`; and `concepts`, the
        probability of each."""
        logits = finite(self.clip.scale * self.clip.of_images(images) @ self.texts.T, f"The output of {self.name}")
        answers = []
        for scores in (logits[:, 1:] - logits[:, :1]).sigmoid().tolist():  # the softmax over two
            concepts = {name: round(score, 6) for (name, _), score in zip(self.matches, scores, strict=True)}
            top = max(concepts, key=concepts.__getitem__)
            best, score = (top, concepts[top]) if concepts[top] > PRESENT else (WITHOUT, round(1 - concepts[top], 6))
            answers.append({"predicted": best, "score": score, "concepts": concepts})
        return answers


def load(model: str | Path, classes: Sequence[str], concepts: Sequence[str], device: str = "cpu") -> Judge:
    """The judge in a folder or hub id. A CLIP that was not trained as a classifier is asked zero-shot: for the classes
    or, without classes, for each concept by name.

    Raises UsageError without classes if the model is not a CLIP.
    """
    if classes:
        return (ZeroShot if is_clip(model) else Classifier)(model, classes, device)
    if not is_clip(model):
        raise UsageError(f"{model} cannot be opened as a CLIP, and only a CLIP knows a concept by its name: give "
                         "--classifier openai/clip-vit-base-patch32, or images whose prompts have a `class` or that "
                         "lie in a sub-folder of that name.")  # fmt: skip
    return ByName(model, concepts, device)
