"""Small labelled images for classifiers: a bright corner that names the class, in noise."""

import numpy as np
import torch

from salun_sd.classifier.architectures import build
from salun_sd.classifier.data import Data, Part, from_array
from salun_sd.classifier.methods.task import Task

SIDE, CLASSES = 12, 4
TINY = ["--architecture", "resnet10", "--width", "2", "--epochs", "2", "--batch-size", "32", "--seeds", "1",
        "--tune", "none"]  # fmt: skip


def arrays(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 [count, 12, 12], and labels, int64 [count], as many of each class."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % CLASSES
    pixels = rng.integers(0, 160, (count, SIDE, SIDE))
    for i, label in enumerate(labels):
        top, left = 6 * (label // 2), 6 * (label % 2)
        pixels[i, top : top + 6, left : left + 6] += 70
    return pixels.astype(np.uint8), labels


def pictures(train: int = 80, test: int = 40) -> Data:
    names = [str(i) for i in range(CLASSES)]
    return Data("pictures", names, from_array(*arrays(train, 1), "train"), from_array(*arrays(test, 2), "test"))


def write_idx(folder, train: int = 80, test: int = 40):
    """The same images as idx files."""
    folder.mkdir(parents=True)
    for name, count, seed in (("train", train, 1), ("t10k", test, 2)):
        for kind, values in zip(("images-idx3", "labels-idx1"), arrays(count, seed), strict=True):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    return folder


def classifier(seed: int = 0, width: int = 2):
    """A small net with random weights, in evaluation mode."""
    made = build("resnet10", width, SIDE, [str(i) for i in range(CLASSES)], seed, "cpu")
    made.net.eval()
    return made


def task(settings: dict, seed: int = 0, forget: int = 16, **rest) -> Task:
    """A method's task on the pictures: forget the first, retain the others."""
    data, original = pictures(), classifier()
    places = torch.arange(len(data.train.labels))
    parts = Part(data.train, places[:forget]), Part(data.train, places[forget:])
    return Task(original.copy(), original, *parts, settings, seed, batch_size=16, **rest)
