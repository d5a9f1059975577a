"""l1-sparse: fine-tuning towards few weights."""

from collections.abc import Iterator

import torch

from salun_sd.classifier.methods.ft import ft
from salun_sd.classifier.methods.task import Task


def l1_sparse(task: Task, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Fine-tuning and alpha (1 - epoch / epochs) |theta|_1, over all weights (Jia et al., NeurIPS 2023, arXiv
    2304.04934). alpha was never published; that of the code, 0.2, is of another scale."""
    alpha = task.settings["alpha"] * (1 - epoch / task.settings["epochs"])
    for loss in ft(task, epoch, generator):
        yield loss + alpha * sum(p.abs().sum() for p in task.classifier.net.parameters())
