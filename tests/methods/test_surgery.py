"""Two gradients joined by a rule: by hand, and in the loop on a small UNet."""

import os
import socket
from copy import deepcopy

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import PartialState

from salun_sd.core.mask import random_bits
from salun_sd.core.masked import MaskedSGD
from salun_sd.methods.batches import Training
from salun_sd.methods.erasediff import EraseDiff
from salun_sd.methods.loop import Erasure, Retain, erase, losses_of, of_base
from salun_sd.methods.salun import SalUn
from salun_sd.methods.surgery import joined
from salun_sd.runtime import ranks


def test_a_rule_sees_both_gradients_as_a_whole_and_weighs_that_of_the_forget_term():
    """Inner products over all parameters together. A parameter may lack one of the gradients."""
    f = {"x": torch.tensor([2.0]), "y": torch.tensor([1.0, 0.5]), "forget": torch.tensor([4.0])}
    r = {"x": torch.tensor([2.0]), "y": torch.tensor([-1.0, 2.0]), "retain": torch.tensor([5.0])}
    seen = []
    update = joined(f, r, lambda *products: seen.append(products) or 3.0)
    assert seen == [(4 + 1.25 + 16, 4 - 1 + 1)]
    assert {name: t.tolist() for name, t in update.items()} == {
        "x": [8], "y": [2, 3.5], "forget": [12], "retain": [5],
    }  # fmt: skip


# in the loop


def erasure_of(schedule, forget, retain, method, target="noise", parts=1):
    concepts, anchors = torch.zeros(len(forget), dtype=torch.int64), torch.full((len(forget),), 2)
    training = Training(schedule, forget, retain, concepts, anchors)
    return Erasure(method, Retain(0.5, target), training, 1, 4, 0, parts)


def moved(unet, bits, erasure, known=None) -> torch.Tensor:
    """By how much one step of SGD at rate 1 lowers the weights, as one vector."""
    trained = deepcopy(unet)
    list(erase(trained, MaskedSGD(trained, bits, 1.0, holds=erasure.holds), erasure, of_base=lambda step: known))
    return torch.cat([(a - b).detach().flatten() for a, b in zip(unet.parameters(), trained.parameters(), strict=True)])


def gradients(unet, bits, erasure, known=None) -> list[torch.Tensor]:
    """Of the forget and of the weighted retain term, masked, each as one vector, by autograd from one forward pass."""
    [batch] = erasure.batches()
    terms = erasure.terms(batch, erasure.share(), unet.device)
    of_terms = []
    for term, losses in zip(terms, losses_of(unet, terms, known), strict=True):
        grads = torch.autograd.grad(term.weight * losses.mean(), list(unet.parameters()), retain_graph=True)
        masked = [g * bits[name] for (name, _), g in zip(unet.named_parameters(), grads, strict=True)]
        of_terms.append(torch.cat([g.flatten() for g in masked]).double())
    return of_terms


class Weighted(SalUn):
    """SalUn with another weight than that of the sum."""

    def join(self, ff: float, fr: float) -> float:
        return -3.0


def constrained(f: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return r + max(0, (0.7 * (f @ f) - f @ r) / (f @ f)) * f


RULES = {  # by the place of the anchor's prediction: the method, and what it makes of the two gradients
    "weighted": (lambda source: Weighted(source), lambda f, r: r - 3 * f),
    "erasediff": (lambda source: EraseDiff(source, eta=0.7), constrained),
}


@pytest.mark.parametrize("target", ["noise", "base"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_rule_of_the_two_whole_gradients(
    fresh_unet, schedule, forget, contexts, retain, rule, target
):  # fmt: skip
    """Recomputed in float64. What the terms know of the base is here of a model that is not the one trained; with two
    that ask, each gets its own."""
    method, naive = RULES[rule]
    erasure = erasure_of(schedule, forget, retain, method("base" if target == "base" else "current"), target)
    bits = random_bits({name: p.shape for name, p in fresh_unet.named_parameters()}, 0.3, seed=5)
    base = deepcopy(fresh_unet)
    base.conv_out.bias.data += 0.3
    [batch] = erasure.batches()
    known = of_base(base, erasure.terms(batch, erasure.share(), base.device)) if erasure.asks else None
    f, r = gradients(fresh_unet, bits, erasure, known)
    update = moved(fresh_unet, bits, erasure, known)
    assert (update - naive(f, r)).norm() < 1e-4 * update.norm()
    assert (update - f - r).norm() > 1e-2 * update.norm()


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_in_parts_is_the_same_update_to_rounding(fresh_unet, schedule, forget, contexts, retain, rule):
    """The rule joins the gradients of the whole batch, not those of a part."""
    method = RULES[rule][0]("current")
    bits = random_bits({name: p.shape for name, p in fresh_unet.named_parameters()}, 0.3, seed=5)
    whole, parted = (
        moved(fresh_unet, bits, erasure_of(schedule, forget, retain, method, parts=parts)) for parts in (1, 2)
    )
    assert (whole - parted).norm() < 1e-3 * whole.norm()


def test_of_one_term_alone_nothing_is_joined(fresh_unet, schedule, forget, contexts):
    """Without images to retain, the step is the plain one, and its gradients need not wait."""
    bits = random_bits({name: p.shape for name, p in fresh_unet.named_parameters()}, 0.3, seed=5)
    plain = moved(fresh_unet, bits, erasure_of(schedule, forget, None, SalUn()))
    for method, _ in RULES.values():
        erasure = erasure_of(schedule, forget, None, method("current"))
        assert not erasure.holds and torch.equal(moved(fresh_unet, bits, erasure), plain)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_two_processes_join_the_gradients_of_the_whole_batch(
    fresh_unet, schedule, forget, contexts, retain, rule, tmp_path
):  # fmt: skip
    bits = random_bits({name: p.shape for name, p in fresh_unet.named_parameters()}, 0.3, seed=5)
    erasure = erasure_of(schedule, forget, retain, RULES[rule][0]("current"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def work(rank: int) -> None:
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        PartialState._reset_state()  # a fork of this process, in which an earlier test may have used it alone
        ranks.start("cpu")
        torch.save(moved(fresh_unet, bits, erasure), tmp_path / f"{rank}.pt")

    processes = [mp.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = moved(fresh_unet, bits, erasure)
    assert torch.equal(first, second) and (first - alone).norm() < 1e-3 * alone.norm()
