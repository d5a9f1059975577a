"""One split of the training images: forget, retain, validation; and the test. No image is in two of them."""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from salun_sd.classifier.data import Data, Part
from salun_sd.errors import UsageError, some
from salun_sd.runtime.contents import file_bytes, no_file

VALIDATION = 0.1  # of each class, held out of every training


class Wanted(NamedTuple):
    """What `--forget` asks for: a share of the training images, a class by its place, or the images of a list."""

    text: str
    share: float | None = None
    label: int | None = None
    places: tuple[int, ...] = ()


class Split(NamedTuple):
    forget: Part
    retain: Part
    validation: Part
    test: Part

    @property
    def trained(self) -> Part:
        """What the original learned from: forget and retain, in the order of the data."""
        return Part(self.retain.images, torch.cat([self.forget.index, self.retain.index]).sort().values)

    def as_json(self) -> dict:
        """The split written down: the names of all but the retain images, which are the rest of the training images."""
        names = {"forget": self.forget, "validation": self.validation}
        sizes = {part: len(getattr(self, part)) for part in self._fields}
        return {"sizes": sizes, **{part: images.names for part, images in names.items()}}


def wanted(text: str, data: Data) -> Wanted:
    """What `--forget` means: a share such as 0.1, class:NAME, or a file with the name of an image in each line.

    Raises UsageError for anything else, for a class that is not there, and for a file with images that are unknown,
    doubled or too many.
    """
    if text.startswith("class:"):
        name = text.removeprefix("class:")
        if name not in data.classes:
            raise UsageError(f"--forget {text}: there is no class {name}; there are {some(data.classes, 20)}.")
        return Wanted(text, label=data.classes.index(name))
    try:
        share = float(text)
    except ValueError:
        return Wanted(text, places=_listed(Path(text), data))
    if not (math.isfinite(share) and 0 < share < 1):
        raise UsageError(f"--forget {text} is no share: give a number between 0 and 1, such as 0.1.")
    return Wanted(text, share=share)


def _listed(file: Path, data: Data) -> tuple[int, ...]:
    if why := no_file(file):
        raise UsageError(f"--forget {file} {why}: give a share such as 0.1, class:NAME, or a file that lists images.")
    try:
        lines = [line.strip() for line in file_bytes(file).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise UsageError(
            f"--forget {file} is no UTF-8 text: give a file with the name of an image in each line."
        ) from e
    if not lines:
        raise UsageError(f"--forget {file} lists no image.")
    if doubled := [name for name, n in Counter(lines).items() if n > 1]:
        raise UsageError(f"--forget {file} lists images twice: {some(doubled)}.")
    places = {name: i for i, name in enumerate(data.train.names)}
    if unknown := [name for name in lines if name not in places]:
        raise UsageError(f"--forget {file} lists images that are not among the training images: {some(unknown)}. They "
                         f"are named as {data.train.names[0]}.")  # fmt: skip
    if len(lines) == len(places):
        raise UsageError(f"--forget {file} lists every training image: leave some to retain.")
    return tuple(sorted(places[name] for name in lines))


def held_out(data: Data, forget: Wanted, seed: int) -> torch.Tensor:
    """The places of the validation images: a tenth of each class, at random, none of a list of images to forget."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.ones(len(data.train.labels), dtype=torch.bool)
    free[list(forget.places)] = False
    chosen = []
    for label in range(len(data.classes)):
        of_class = (data.train.labels == label).nonzero().squeeze(1)
        count = round(VALIDATION * len(of_class))
        candidates = of_class[torch.randperm(len(of_class), generator=generator)]
        chosen.append(candidates[free[candidates]][:count])
    return torch.cat(chosen).sort().values


def split(data: Data, forget: Wanted, seed: int, held: torch.Tensor, empty_class: bool = False) -> Split:
    """The split of a seed: of a share, each seed forgets other images. A class that is forgotten is in neither
    validation nor test.

    Raises UsageError where nothing is left to forget or to retain, and where a class has no image to retain, unless
    that was asked for.
    """
    count = len(data.train.labels)
    learned = torch.ones(count, dtype=torch.bool)
    learned[held] = False
    places, chosen = learned.nonzero().squeeze(1), torch.zeros(count, dtype=torch.bool)
    if forget.share is not None:
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        chosen[places[order[: round(forget.share * len(places))]]] = True
    elif forget.label is not None:
        chosen = (data.train.labels == forget.label) & learned
    else:
        chosen[list(forget.places)] = True
    parts = [Part(data.train, mask.nonzero().squeeze(1)) for mask in (chosen, learned & ~chosen)]
    parts += [Part(data.train, held), Part(data.test, torch.arange(len(data.test.labels)))]
    if forget.label is not None:
        parts[2:] = [part.without(forget.label) for part in parts[2:]]
    if small := [
        name for name, part in zip(Split._fields, parts, strict=True) if name != "validation" and not len(part)
    ]:
        raise UsageError(f"--forget {forget.text} leaves no image to {small[0]}: forget more or fewer, or add images.")
    left = torch.bincount(parts[1].labels, minlength=len(data.classes)).tolist()
    gone = [name for label, name in enumerate(data.classes) if not left[label] and label != forget.label]
    if gone and not empty_class:
        raise UsageError(f"--forget {forget.text} leaves no image of {some(gone)} to retain: forget fewer images, or "
                         "go on with --empty-class.")  # fmt: skip
    return Split(*parts)
