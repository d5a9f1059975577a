"""FT, and Retrain: training on the retain images."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from salun_sd.classifier.methods.task import Task


def ft(task: Task, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The cross-entropy of the retain images: forgetting is left to chance (Golatkar et al., CVPR 2020). From new
    random weights, it is Retrain."""
    for pixels, labels in task.batches(task.retain, generator):
        yield F.cross_entropy(task.classifier(pixels), labels)
