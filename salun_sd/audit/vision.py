"""What image models share: loading, images prepared by the threads that read them, and a digest of the model."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from salun_sd.draw.images import Unreadable, in_order, read_still
from salun_sd.errors import SalunError, first_line
from salun_sd.runtime.contents import check_files
from salun_sd.runtime.finite import finite

if TYPE_CHECKING:
    import torch

BATCH = 32  # images per batch


def prepared(
    prepare: "Callable[[Image.Image], torch.Tensor]", files: Iterable[Path]
) -> "Iterator[torch.Tensor | Unreadable]":  # fmt: skip
    """Each file's RGB image after `prepare`, in order; the reason if it cannot be read.

    The thread that reads an image also prepares it. So no more large images are held than there are threads.
    """

    def prepare_file(file: Path) -> "torch.Tensor | Unreadable":
        try:
            return prepare(read_still(file))
        except Unreadable as e:
            return e

    return in_order(prepare_file, files)


def batched(images: "list[torch.Tensor]") -> "torch.Tensor":
    """At most BATCH prepared images as a batch of BATCH, the last one repeated to the end. A model rounds an image by
    the shape of its batch: so what it answers depends on the image alone, and not on how many stand beside it."""
    import torch

    return torch.stack([*images, *[images[-1]] * (BATCH - len(images))])


def loaded(
    kind: type, model: str | Path, device: str, *, what: str, advice: str, optional: str | None = None
) -> "tuple[object, torch.nn.Module, bool]":  # fmt: skip
    """The image processor and the model in a folder or hub id, and whether the model has all its weights.

    `kind` is the transformers class of the model, which is loaded in float32 on `device`. The processor is always the
    PIL version, so that installing torchvision changes no result. Raises SalunError, which says `what` was expected and
    gives `advice`, if either cannot be loaded or takes no image, if a weight is not finite, or if weights are missing
    whose names do not contain `optional`.
    """
    import torch
    from transformers import AutoImageProcessor

    check_files(Path(model))
    try:
        processor = AutoImageProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)
        net, loading = kind.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        pixels = processor(images=Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            getattr(net, "vision_model", net)(pixel_values=finite(pixels, "A prepared image"))
    except Exception as error:  # absent, of another kind, cut short: each has a type of its own
        raise SalunError(f"No {what} could be loaded from {model} ({first_line(error)}). {advice}") from error
    missing = sorted(loading["missing_keys"])
    if needed := [key for key in missing if optional is None or optional not in key]:
        raise SalunError(f"{model} is not a trained {what}: its weights lack {', '.join(needed[:3])}. {advice}")
    for key, weight in net.named_parameters():
        finite(weight, f"{key} of {model}")
    return processor, net.to(device).eval(), not missing


class Vision:
    """A model that looks at images. `processor` is its transformers image processor, if it has one; `vocabulary` all
    words that it answers with or reads, if any."""

    model: "torch.nn.Module"
    processor: object = None
    vocabulary: Sequence = ()

    def prepare(self, image: Image.Image) -> "torch.Tensor":
        """RGB image => (3, height, width), float32, resized and normalised for the model."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of all that decides its answers: weights, image processor, vocabulary."""
        settings = self.processor.to_json_string() if self.processor else None
        whole = hashlib.sha256(f"{settings} {json.dumps(self.vocabulary)}".encode())
        for name, t in self.model.state_dict().items():
            whole.update(name.encode() + t.cpu().numpy().tobytes())
        return whole.hexdigest()
