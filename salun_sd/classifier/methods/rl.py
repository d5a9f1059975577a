"""RL: random labels for the forget images."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from salun_sd.classifier.methods.ft import ft
from salun_sd.classifier.methods.task import Task


def rl(task: Task, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """In each epoch the forget images with random labels, then the retain images with theirs (Golatkar et al., CVPR
    2020, as SalUn has it). Each epoch draws new labels, uniformly over the other classes, as the paper says; the
    authors' code for CIFAR-10 also draws the true one."""
    for pixels, labels in task.batches(task.forget, generator):
        drawn = torch.randint(1, task.classes, labels.shape, generator=generator).to(labels.device)
        yield F.cross_entropy(task.classifier(pixels), (labels + drawn) % task.classes)
    yield from ft(task, epoch, generator)
