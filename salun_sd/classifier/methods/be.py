"""BE: boundary expanding, the forget images are given a class of their own."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from salun_sd.classifier.methods.task import Task
from salun_sd.errors import SalunError


def be(task: Task, epoch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The cross-entropy of the forget images with a class that is added, between `expand` and `shrink` (Chen et al.,
    CVPR 2023, arXiv 2303.11570). The authors of SalUn leave the added output in the model, where every image that falls
    into it counts as forgotten; here it is removed, as the method's own paper says."""
    for pixels, labels in task.batches(task.forget, generator):
        yield F.cross_entropy(task.classifier(pixels), torch.full_like(labels, task.classes))


def expand(net: nn.Module, seed: int) -> None:
    """Add an output to the last layer, with random weights."""
    name, old = head(net)
    torch.manual_seed(seed)
    new = nn.Linear(old.in_features, old.out_features + 1, bias=old.bias is not None).to(old.weight)
    _fill(new, old, old.out_features)
    net.set_submodule(name, new)


def shrink(net: nn.Module) -> None:
    """Remove the output that `expand` added."""
    name, old = head(net, extra=1)
    new = nn.Linear(old.in_features, old.out_features - 1, bias=old.bias is not None).to(old.weight)
    _fill(new, old, new.out_features)
    net.set_submodule(name, new)


@torch.no_grad()
def _fill(new: nn.Linear, old: nn.Linear, rows: int) -> None:
    for mine, other in zip(new.parameters(), old.parameters(), strict=True):
        mine[:rows] = other[:rows]


def head(net: nn.Module, extra: int = 0) -> tuple[str, nn.Linear]:
    """The last linear layer, whose outputs are the classes. Raises SalunError where there is none."""
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    if not layers or layers[-1][1].out_features != net.config.num_labels + extra:
        raise SalunError("The method be needs a model whose last layer is linear, with an output for each class: leave "
                         "be out.")  # fmt: skip
    return layers[-1]
