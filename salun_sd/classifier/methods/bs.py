"""BS: boundary shrink, the forget images are given the nearest other class."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from salun_sd.classifier.architectures import Classifier
from salun_sd.classifier.methods.task import Task


def bs(task: Task, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The cross-entropy of the forget images with their nearest other class (Chen et al., CVPR 2023, arXiv 2303.11570),
    as the original sees it. The authors of SalUn take the class of the changed image, which may be the true one; here
    the true one is left out, as the method's own paper says."""
    for pixels, labels in task.batches(task.forget, generator):
        yield F.cross_entropy(task.classifier(pixels), nearest(task.original, pixels, labels, task.settings["bound"]))


def nearest(original: Classifier, pixels: torch.Tensor, labels: torch.Tensor, bound: float) -> torch.Tensor:
    """The class, other than the true one, that the original sees after one step of FGSM: each pixel, from 0 to 1, moves
    by `bound` so that the loss grows (Goodfellow et al., arXiv 1412.6572)."""
    original.net.eval()
    pixels = pixels.detach().requires_grad_()
    [slope] = torch.autograd.grad(F.cross_entropy(original(pixels), labels), pixels)
    with torch.no_grad():
        logits = original((pixels + bound * slope.sign()).clamp(0, 1))
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
