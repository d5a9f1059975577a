"""GA: gradient ascent on the forget images."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from salun_sd.classifier.methods.task import Task


def ga(task: Task, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Minus the cross-entropy of the forget images (Thudi et al., EuroS&P 2022). Nothing is retained."""
    for pixels, labels in task.batches(task.forget, generator):
        yield -F.cross_entropy(task.classifier(pixels), labels)
