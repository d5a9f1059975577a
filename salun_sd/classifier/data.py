"""Labelled images in memory, parts of them, and their batches."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

PADDING = 8  # a crop moves by up to a part in so many of the side: 4 of 32 pixels


class Images(NamedTuple):
    """pixels: uint8 [n, 3, height, width]; labels: int64 [n], places in a list of classes; names: n, each once."""

    pixels: torch.Tensor
    labels: torch.Tensor
    names: list[str]


class Data(NamedTuple):
    """A data set: what `--data` names, its classes in order, its images to train on and to test with."""

    name: str
    classes: list[str]
    train: Images
    test: Images

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of classes, pixels, labels and names."""
        whole = hashlib.sha256(repr(self.classes).encode())
        for images in (self.train, self.test):
            whole.update(images.pixels.numpy().data)
            whole.update(images.labels.numpy().data)
            whole.update("\0".join(images.names).encode())
        return whole.hexdigest()


class Part(NamedTuple):
    """Some images of a data set, by their places: int64 [k]."""

    images: Images
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> torch.Tensor:
        return self.images.labels[self.index]

    @property
    def names(self) -> list[str]:
        return [self.images.names[i] for i in self.index.tolist()]

    def without(self, label: int) -> "Part":
        """The part without a class."""
        return Part(self.images, self.index[self.labels != label])


def batches(
    part: Part, size: int, device: str, generator: torch.Generator | None = None, augment: str = "none"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Pixels, float32 [b, 3, height, width] from 0 to 1, and labels, int64 [b], on the device.

    With a generator, in a random order, and changed as `augment` says: "crop" moves each image by up to an eighth of
    its side, "crop-flip" also mirrors half of them. Without one, in their order and as they are.
    """
    order = part.index if generator is None else part.index[torch.randperm(len(part), generator=generator)]
    for places in order.split(size):
        pixels = part.images.pixels[places]
        if generator is not None and augment != "none":
            pixels = moved(pixels, generator, flip=augment == "crop-flip")
        yield pixels.to(device).float().div_(255), part.images.labels[places].to(device)


def moved(pixels: torch.Tensor, generator: torch.Generator, flip: bool) -> torch.Tensor:
    """Random crops of images with a black border, and with `flip` half of them mirrored: uint8 [b, 3, h, w], as the
    input."""
    count, _, height, width = pixels.shape
    edge = max(1, height // PADDING)
    padded = torch.nn.functional.pad(pixels, (edge, edge, edge, edge))
    top, left = (torch.randint(2 * edge + 1, (count, 1), generator=generator) for _ in range(2))
    columns = torch.arange(width).expand(count, -1)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + columns)[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def from_array(pixels: np.ndarray, labels: np.ndarray, split: str) -> Images:
    """Images from arrays: uint8 [n, h, w] or [n, 3, h, w]; they are named "train[12]"."""
    array = torch.from_numpy(np.array(pixels))
    if array.dim() == 3:
        array = array[:, None].expand(-1, 3, -1, -1).contiguous()
    names = [f"{split}[{i}]" for i in range(len(array))]
    return Images(array, torch.from_numpy(labels.astype(np.int64)), names)
