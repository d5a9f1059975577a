"""Retrain: the exact answer, with which the others are compared."""

from collections.abc import Iterator

import torch

from salun_sd.classifier.methods.ft import ft
from salun_sd.classifier.methods.task import Task


def retrain(task: Task, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The training of the original, on the retain images alone, from new random weights."""
    return ft(task, epoch, generator)
