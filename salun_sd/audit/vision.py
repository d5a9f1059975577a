"""What image models share: images prepared for them by the threads that read, and a digest of what they answer by."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from salun_sd.draw.images import Unreadable, in_order, read_still
from salun_sd.errors import SalunError, first_line

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


def loaded(
    kind: type, model: str | Path, device: str, *, what: str, advice: str, spare: str | None = None
) -> "tuple[object, torch.nn.Module, bool]":  # fmt: skip
    """A folder's or hub id's image processor, always its PIL version, so that installing torchvision changes no result;
    its `kind` of model, in float32 on `device`; and whether that has all its weights.

    Raises SalunError, with `advice`, where the two are not `what` they should be, or weights are lacking whose names do
    not have `spare` in them.
    """
    import torch
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        net, loading = kind.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # absent, of another kind, cut short: each comes as a different type
        raise SalunError(f"No {what} could be loaded from {model} ({first_line(error)}). {advice}") from error
    lacking = sorted(loading["missing_keys"])
    if needed := [key for key in lacking if spare is None or spare not in key]:
        raise SalunError(f"{model} is no trained {what}: its weights lack {', '.join(needed[:3])}.")
    return processor, net.to(device).eval(), not lacking


class Vision:
    """A model that looks at images: `processor` is its transformers image processor, if it has one, `knows` all words
    that it answers with or reads, if it does."""

    model: "torch.nn.Module"
    processor: object = None
    knows: Sequence = ()

    def prepare(self, image: Image.Image) -> "torch.Tensor":
        """RGB image => (3, height, width), float32, resized and normalised as the model takes it."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, over what it answers by: its weights, how it takes images, its words."""
        how = self.processor.to_json_string() if self.processor else None
        whole = hashlib.sha256(f"{how} {json.dumps(self.knows)}".encode())
        for name, t in self.model.state_dict().items():
            whole.update(name.encode() + t.cpu().numpy().tobytes())
        return whole.hexdigest()
