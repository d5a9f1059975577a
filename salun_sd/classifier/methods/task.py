"""What a method is given."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from salun_sd.classifier.architectures import Classifier
from salun_sd.classifier.data import Part, batches
from salun_sd.classifier.settings import BATCH


class Task(NamedTuple):
    """`classifier` is the model to train; `original` the model as it was, which nothing changes."""

    classifier: Classifier
    original: Classifier
    forget: Part
    retain: Part
    settings: Mapping[str, float]
    seed: int
    augment: str = "none"
    batch_size: int = BATCH

    @property
    def classes(self) -> int:
        return self.original.net.config.num_labels

    def batches(self, part: Part, generator: torch.Generator | None = None) -> Iterator:
        """The batches of a part: in a random order and augmented with a generator, else as they are."""
        return batches(part, self.batch_size, self.classifier.device, generator, self.augment)
