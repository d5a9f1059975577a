"""What holds for every method with a training loop."""

from copy import deepcopy

import pytest
import torch
from helpers.erasures import erasure_by, train

from salun_sd.core.mask import kept, random_bits
from salun_sd.methods.batches import TRAJECTORY
from salun_sd.methods.catalog import METHODS
from salun_sd.methods.uce import UCE

TRAINED = {name: kind for name, kind in METHODS.items() if kind is not UCE}


@pytest.mark.parametrize("name", TRAINED)
def test_outside_the_support_nothing_moves_and_inside_something_does(
    fresh_unet, schedule, forget, retain, contexts, name
):  # fmt: skip
    method, base = TRAINED[name](), deepcopy(fresh_unet)
    fields = {
        "anchors": torch.full((10,), 2), "empty": 0, "tokens": torch.ones(contexts["context"].shape[:2]).bool(),
        "times": torch.arange(10) * 97 if method.shows == TRAJECTORY else None,
    }  # fmt: skip
    shown = None if method.shows is None else forget
    erasure = erasure_by(method, schedule, shown, retain, weight=1.0, **fields)
    bits = random_bits({n: p.shape for n, p in base.named_parameters()}, 0.3, seed=5)
    assert len(list(train(fresh_unet, erasure, bits=bits))) == 2
    inside = 0
    for (n, before), after in zip(base.named_parameters(), fresh_unet.parameters(), strict=True):
        assert torch.equal(before[~bits[n]], after[~bits[n]]), n
        inside += int((before != after)[bits[n]].sum())
    assert inside > 0.9 * kept(bits)[0]
