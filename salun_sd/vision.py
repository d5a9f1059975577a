"""What image models share: images prepared for them by the threads that read, and a digest of what they answer by."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from salun_sd.images import Unreadable, in_order, read_still

if TYPE_CHECKING:
    import torch

BATCH = 32  # images that a model looks at together


def prepared(
    prepare: "Callable[[Image.Image], torch.Tensor]", files: Iterable[Path]
) -> "Iterator[torch.Tensor | Unreadable]":  # fmt: skip
    """What a model's `prepare` makes of each file's RGB image, in order, or why it cannot be read.

    The thread that reads an image prepares it, too: of large images no more are held than there are threads.
    """

    def made(file: Path) -> "torch.Tensor | Unreadable":
        try:
            return prepare(read_still(file))
        except Unreadable as e:
            return e

    return in_order(made, files)


class Vision:
    """A model that looks at images: `processor` is its transformers image processor, if it has one, `knows` all names
    that it answers with, if it does."""

    model: "torch.nn.Module"
    processor: object = None
    knows: Sequence = ()

    def prepare(self, image: Image.Image) -> "torch.Tensor":
        """RGB image => (3, height, width), float32, resized and normalised as the model takes it."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, over what it answers by: its weights, how it takes images, the names it gives."""
        how = self.processor.to_json_string() if self.processor else None
        whole = hashlib.sha256(f"{how} {json.dumps(self.knows)}".encode())
        for name, t in self.model.state_dict().items():
            whole.update(name.encode() + t.cpu().numpy().tobytes())
        return whole.hexdigest()
