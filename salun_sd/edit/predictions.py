"""What the base predicts at every step of an erasure: computed before the first step, and kept in one file on disk.

So training needs no base weights beside those that it changes.
"""

import math
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from salun_sd.edit.resume import PREDICTIONS
from salun_sd.errors import SalunError
from salun_sd.methods import loop
from salun_sd.methods.loop import Erasure
from salun_sd.runtime import ranks
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.files import named_where_full

DTYPE = torch.bfloat16


class Predictions:
    """For each step the predictions of the base that an erasure asks for, [asks, n, C, h, w] in bfloat16, and their
    CRC-32.

    Steps are appended one by one: a file that was cut short lacks some at its end, and these are computed again.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]):
        """shape: of one step's predictions. Each process of a run has a file of its own."""
        of = "" if ranks.count() == 1 else f"-{ranks.rank() + 1}-of-{ranks.count()}"
        self.file, self.shape = folder / f"{PREDICTIONS}{of}.bin", shape
        self.bytes = size_of(shape)  # of a step

    def __len__(self) -> int:
        """Number of steps that are whole."""
        return self.file.stat().st_size // self.bytes if self.file.is_file() else 0

    def append(self, values: torch.Tensor) -> None:
        """Add the predictions of the next step, of any dtype."""
        content = values.to("cpu", DTYPE).contiguous().view(torch.uint8).numpy().tobytes()
        with named_where_full(self.file), self.file.open("r+b" if self.file.is_file() else "wb") as f:
            f.seek(len(self) * self.bytes)
            f.write(content + zlib.crc32(content).to_bytes(4, "little"))
            f.truncate()

    def __call__(self, step: int) -> torch.Tensor:
        """The predictions of a step, counted from 1, float32. Raises SalunError where the file is damaged."""
        with self.file.open("rb") as f:
            f.seek((step - 1) * self.bytes)
            content = f.read(self.bytes)
        if len(content) < self.bytes or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
            raise SalunError(f"{self.file} is damaged: remove it, and run the same command again.")
        return torch.frombuffer(bytearray(content[:-4]), dtype=DTYPE).view(self.shape).float()


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes of a step's predictions."""
    return math.prod(shape) * DTYPE.itemsize + 4


def of_base(
    folder: Path, unet: nn.Module, erasure: Erasure, done: int = 0
) -> Callable[[int], torch.Tensor | None]:  # fmt: skip
    """What an erasure asks of the UNet before training, for each step counted from 1: computed where it is not in the
    folder already. None for an erasure that asks for nothing, or has `done` all its steps."""
    if not erasure.asks or done >= erasure.steps:
        return lambda step: None
    share, training = erasure.share(), erasure.training
    shape = (training.forget or training.retain).latents.shape[1:]
    kept = Predictions(folder, (erasure.asks, len(share), *shape))
    if (known := len(kept)) >= erasure.steps:
        return kept
    rest = islice(erasure.batches(), known, None)  # the random numbers of those before are drawn, and not used
    with Bar(rest, desc="predict", total=erasure.steps, initial=known, unit="step") as bar:
        for batch in bar:
            values = torch.empty(kept.shape)
            for i in range(erasure.parts):
                terms = erasure.terms(batch, share[i :: erasure.parts], unet.device)
                values[:, i :: erasure.parts] = loop.of_base(unet, terms).cpu()
            kept.append(values)
    return kept
