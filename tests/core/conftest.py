"""Two modules of different kinds, with a loss: the maths is for any."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

EXAMPLES = 12


class Case(NamedTuple):
    model: nn.Module
    losses: Callable[[nn.Module, slice], torch.Tensor]  # one of each example, [B]


def small_unet(unet: nn.Module) -> Case:
    g = torch.Generator().manual_seed(3)
    x, noise = (torch.randn(EXAMPLES, 4, 8, 8, generator=g) for _ in range(2))
    t, context = torch.randint(1000, (EXAMPLES,), generator=g), torch.randn(EXAMPLES, 6, 64, generator=g)

    def losses(unet: nn.Module, these: slice) -> torch.Tensor:
        predicted = unet(x[these].to(unet.dtype), t[these], context[these].to(unet.dtype)).sample
        return (predicted.float() - noise[these]).pow(2).flatten(1).mean(1)

    return Case(unet, losses)


def classifier() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    images, labels = torch.randn(EXAMPLES, 3, 12, 12, generator=g), torch.randint(5, (EXAMPLES,), generator=g)
    return Case(model, lambda model, these: F.cross_entropy(model(images[these]), labels[these], reduction="none"))


@pytest.fixture(params=["unet", "classifier"])
def case(request, fresh_unet) -> Case:
    return small_unet(fresh_unet) if request.param == "unet" else classifier()


@pytest.fixture
def unet(fresh_unet) -> Case:
    return small_unet(fresh_unet)


@pytest.fixture
def batch_norm() -> Case:
    return classifier()
