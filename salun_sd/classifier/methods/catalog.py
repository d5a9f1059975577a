"""The methods by name, and what one run of any of them does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from salun_sd.classifier.methods.be import be, expand, shrink
from salun_sd.classifier.methods.bs import bs
from salun_sd.classifier.methods.ft import ft
from salun_sd.classifier.methods.ga import ga
from salun_sd.classifier.methods.iu import iu
from salun_sd.classifier.methods.l1_sparse import l1_sparse
from salun_sd.classifier.methods.rl import rl
from salun_sd.classifier.methods.salun import control_bits, salient_bits
from salun_sd.classifier.methods.task import Task
from salun_sd.classifier.settings import DROPS
from salun_sd.classifier.training import Schedule, train
from salun_sd.core.mask import Bits


class Method(NamedTuple):
    """How a method works: the losses of its epochs, or one step; the weights that it may move; what is done to the net
    before and after."""

    losses: Callable | None = None
    step: Callable[[Task], dict[str, int]] | None = None
    bits: Callable[[Task], Bits] | None = None
    before: Callable[[nn.Module, int], None] = lambda net, seed: None
    after: Callable[[nn.Module], None] = lambda net: None


METHODS = {
    "retrain": Method(ft),  # as the original was trained, on the retain images alone, from new random weights
    "ft": Method(ft),
    "rl": Method(rl),
    "salun": Method(rl, bits=salient_bits),
    "ga": Method(ga),
    "iu": Method(step=iu),
    "l1-sparse": Method(l1_sparse),
    "bs": Method(bs),
    "be": Method(be, before=expand, after=shrink),
    "random": Method(rl, bits=control_bits),
}


class Result(NamedTuple):
    seconds: float
    bits: Bits | None
    used: dict[str, int] = {}  # what one step used, where it could use less than was asked for


def forget(
    name: str, task: Task, *, what: str, keep_statistics: bool = False, state: Path | None = None,
    run: dict | None = None,
) -> Result:  # fmt: skip
    """Run a method on the classifier of a task; gives its seconds, those of a mask included, and the mask."""
    method, start = METHODS[name], time.perf_counter()
    bits = method.bits(task) if method.bits else None
    if method.step:
        used = method.step(task)
        return Result(time.perf_counter() - start, None, used)
    method.before(task.classifier.net, task.seed)
    of_mask, epochs = time.perf_counter() - start, int(task.settings["epochs"])
    drops = tuple(max(1, round(share * epochs)) for share in DROPS) if name == "retrain" else ()
    seconds = train(
        task.classifier, lambda epoch, generator: method.losses(task, epoch, generator),
        Schedule(epochs, task.settings["lr"], drops), seed=task.seed, what=what, bits=bits,
        keep_statistics=keep_statistics and name != "retrain", state=state, run=run,
    )  # fmt: skip
    method.after(task.classifier.net)
    return Result(of_mask + seconds, bits)
