"""IU: influence unlearning, one step without training."""

import logging

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from salun_sd.classifier.data import Part
from salun_sd.classifier.methods.task import Task
from salun_sd.runtime import memory

logger = logging.getLogger(__name__)

SHARE = 0.25  # of the free memory, at most, for the gradients of single images


def iu(task: Task) -> dict[str, int]:
    """theta += alpha F^-1 v, with v the weighted difference of the forget and the retain gradients (Koh & Liang 2017;
    Izzo et al. 2021), and F = I + the Fisher information of single retain images (Singh & Alistarh 2020, arXiv
    2004.14340). alpha was never published.

    v = sum of the forget gradients / n - sum of the retain gradients n_f / (n n_r), n = n_f + n_r. The authors' code
    starts the recursion with the first gradient and never computes F^-1 g anew, which leaves it rank one; `woodfisher`
    gives what the paper's recursion does.

    Gives the number of single images, `samples`: fewer than was asked for where no more fit in memory.
    """
    net, forget, retain = task.classifier.net.eval(), len(task.forget), len(task.retain)
    whole = forget + retain
    v = _gradient(task, task.forget) / whole - _gradient(task, task.retain) * (forget / (whole * retain))
    gradients = _samples(task, len(v))
    step = woodfisher(gradients, v)
    with torch.no_grad():
        vector_to_parameters(parameters_to_vector(net.parameters()) + task.settings["alpha"] * step, net.parameters())
    return {"samples": len(gradients)}


def woodfisher(gradients: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """F^-1 v for F = I + 1/N sum g g^T, float32 [p]. gradients: float32 [N, p]; v: float32 [p].

    It is what the recursion of the paper gives after N samples, F_n^-1 = F_{n-1}^-1 - o o^T / (N + g^T o) with
    o = F_{n-1}^-1 g and F_0 = I (arXiv 2004.14340, eq. 4), all at once: v - G^T (N I + G G^T)^-1 G v.
    """
    count = len(gradients)
    gram = (gradients @ gradients.T).double() + count * torch.eye(count, dtype=torch.float64, device=v.device)
    return v - gradients.T @ torch.linalg.solve(gram, (gradients @ v).double()).float()


def _gradient(task: Task, part: Part) -> torch.Tensor:
    """The sum of the cross-entropy's gradients over the images of a part, float32 [p]."""
    net = task.classifier.net
    net.zero_grad()
    for pixels, labels in task.batches(part):
        F.cross_entropy(task.classifier(pixels), labels, reduction="sum").backward()
    return _taken(net)


def _samples(task: Task, weights: int) -> torch.Tensor:
    """The gradients of single retain images, drawn at random: as many as were asked for and fit in memory."""
    room = int(SHARE * memory.available(task.classifier.device) / (4 * weights))
    wanted = min(int(task.settings["samples"]), len(task.retain))
    count = max(1, min(wanted, room))
    if count < wanted:
        logger.warning(f"iu takes {count:,} gradients of single images, not {wanted:,}: no more fit in memory.")
    order = torch.randperm(len(task.retain), generator=torch.Generator().manual_seed(task.seed))[:count]
    gradients = torch.empty(count, weights, device=task.classifier.device)
    for n, place in enumerate(task.retain.index[order]):
        gradients[n] = _gradient(task, Part(task.retain.images, place[None]))
    return gradients


def _taken(net: nn.Module) -> torch.Tensor:
    """The gradients of all weights in one vector; the net holds none after that."""
    vector = parameters_to_vector(p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters())
    net.zero_grad()
    return vector
