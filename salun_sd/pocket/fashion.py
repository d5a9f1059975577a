"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), from its four idx files."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Class names in the order of the data set's labels.
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array, of any rank, in a gzipped idx file, the format of MNIST's data sets."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_split(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, 32, 32] float32 in [-1, 1], padded with black, and labels [N] int64, of "train" or "t10k"."""
    pixels = torch.from_numpy(read_idx(data / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(data / f"{split}-labels-idx1-ubyte.gz").copy()).long()
    images = F.pad(pixels, (2, 2, 2, 2)).float().div(127.5).sub(1)
    return images[:, None].expand(-1, 3, -1, -1), labels
