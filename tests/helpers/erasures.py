"""An erasure of a small UNet by any method, step by step."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch

from salun_sd.core.mask import Bits, full_bits
from salun_sd.core.masked import MaskedAdam
from salun_sd.methods import loop
from salun_sd.methods.batches import Batch, Training
from salun_sd.methods.loop import Erasure, Method, Retain


def erasure_by(
    method: Method, schedule, forget, retain=None, *, weight=0.0, target="noise", steps=2, batch_size=4, **fields
) -> Erasure:  # fmt: skip
    """Of one concept; `fields` are those of a Training."""
    concepts = torch.zeros(0 if forget is None else len(forget), dtype=torch.int64)
    training = Training(schedule, forget, retain, concepts, **fields)
    return Erasure(method, Retain(weight, target), training, steps, batch_size, seed=0)


def train(
    unet, erasure: Erasure, *, bits: Bits | None = None, lr: float = 1e-3, name: str = "the model"
) -> Iterator[dict[str, float]]:  # fmt: skip
    """The steps of an erasure; the model that it asks is the UNet as it is before the first."""
    base, batches = deepcopy(unet), list(erasure.batches())

    def known(step: int) -> torch.Tensor | None:
        terms = erasure.terms(batches[step - 1], erasure.share(), base.device)
        return loop.of_base(base, terms) if erasure.asks else None

    bits = bits or full_bits({name: p.shape for name, p in unet.named_parameters()})
    return loop.erase(unet, MaskedAdam(unet, bits, lr, holds=erasure.holds), erasure, of_base=known, name=name)


def check_forget_loss(unet, erasure: Erasure, naive: Callable[[Batch], torch.Tensor]) -> None:
    """Assert at each step that the forget loss is what `naive` gives just before it."""
    steps = train(unet, erasure)
    for batch in erasure.batches():
        with torch.no_grad():
            wanted = naive(batch).item()
        assert next(steps)["forget"] == pytest.approx(wanted, rel=1e-3)


def of_prompt(unet, contexts, x_t: torch.Tensor, t: torch.Tensor, row: int) -> torch.Tensor:
    """The UNet's prediction with one of the prompts for all of x_t."""
    return unet(x_t, t, contexts["context"][row : row + 1].expand(len(x_t), -1, -1)).sample
