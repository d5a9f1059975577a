"""The training loop of every method: SGD on the weights of a mask, epoch by epoch, resumable."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from salun_sd.checkpoint import tensors
from salun_sd.classifier.architectures import Classifier
from salun_sd.classifier.settings import MOMENTUM, WEIGHT_DECAY
from salun_sd.core.mask import Bits, full_bits
from salun_sd.core.masked import MaskedSGD
from salun_sd.errors import SalunError
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.documents import parse_json
from salun_sd.runtime.files import is_full, new_file
from salun_sd.runtime.finite import NotFinite

logger = logging.getLogger(__name__)

HEADER = {"run": dict, "epochs": int, "steps": int, "seconds": float}  # of a state
Losses = Callable[[int, torch.Generator], Iterator[torch.Tensor]]


class Schedule(NamedTuple):
    """epochs, the learning rate of the first, and the epochs (from 0) before which it falls to a tenth."""

    epochs: int
    lr: float
    drops: tuple[int, ...] = ()

    def rate(self, epoch: int) -> float:
        return self.lr * 0.1 ** sum(epoch >= drop for drop in self.drops)


def train(
    classifier: Classifier, losses: Losses, schedule: Schedule, *, seed: int, what: str, bits: Bits | None = None,
    keep_statistics: bool = False, state: Path | None = None, run: dict | None = None,
) -> float:  # fmt: skip
    """Train the weights of `bits`, or all; gives the seconds of the training, without those of saving.

    losses: of an epoch and its random numbers: an iterator of the loss of each update, a scalar. It is asked for the
    next after the update was made. Momentum and weight decay, of `settings`, reach the weights of the mask alone.
    keep_statistics: batch norm uses the statistics that it has, and they stay.
    state: the file from which the same `run` resumes, after each epoch; the caller removes it. On a CPU, resuming gives
    the same bits. Raises NotFinite, naming `what` and the epoch, where a loss is not finite.
    """
    net = classifier.net
    bits = full_bits({name: p.shape for name, p in net.named_parameters()}) if bits is None else bits
    sgd = MaskedSGD(net, bits, schedule.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    done, seconds = _restored(state, run or {}, classifier, sgd)
    with Bar(range(done, schedule.epochs), total=schedule.epochs, initial=done, desc=what, unit="epoch") as bar:
        for epoch in bar:
            start = time.perf_counter()
            sgd.lr = schedule.rate(epoch)
            torch.manual_seed(_mixed(seed, epoch))  # of dropout, in models that have it
            _set_mode(net, keep_statistics)
            total, updates = torch.zeros((), device=classifier.device), 0
            for loss in losses(epoch, torch.Generator().manual_seed(_mixed(seed, epoch))):
                with sgd.step():
                    loss.backward()
                total += loss.detach()
                updates += 1
            if not total.isfinite():
                if state:  # a run that went on from it would fail again
                    state.unlink(missing_ok=True)
                raise NotFinite(f"The loss of {what} is not finite after epoch {epoch + 1}: lower its learning rate, "
                                "--lr of a training, --setting METHOD.lr=VALUE of a method.")  # fmt: skip
            seconds += time.perf_counter() - start
            bar.set_postfix(loss=f"{float(total) / max(1, updates):.4f}")
            if state:
                _save(state, run or {}, classifier, sgd, epoch + 1, seconds)
    sgd.close()
    net.eval()
    return seconds


def _mixed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch of each seed."""
    return seed * 1_000_003 + epoch


def _set_mode(net: nn.Module, keep_statistics: bool) -> None:
    net.train()
    if keep_statistics:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _save(file: Path, run: dict, classifier: Classifier, sgd: MaskedSGD, epochs: int, seconds: float) -> None:
    content = {f"net/{name}": t for name, t in classifier.net.state_dict().items()}
    content |= {f"sgd/{name}": t for name, t in sgd.state().items()}
    header = {"run": run, "epochs": epochs, "steps": sgd.steps, "seconds": seconds}
    lazy = {name: tensors.in_memory(t.detach().cpu()) for name, t in content.items()}
    try:
        with new_file(file) as partial:
            tensors.write(partial, lazy, {"salun_sd": json.dumps(header)}, sealed=True)
    except OSError as e:
        if not is_full(e):
            raise
        logger.warning(f"The disk is full, so {file} was not written. The training goes on.")


def _restored(file: Path | None, run: dict, classifier: Classifier, sgd: MaskedSGD) -> tuple[int, float]:
    """Go on from a state, if there is one of the same run; gives its epochs and seconds. Another one is replaced."""
    if file is None or not file.is_file():
        return 0, 0.0
    try:
        content, metadata = tensors.read_sealed(file)
        header = parse_json(metadata["salun_sd"], str(file), HEADER)
    except (SalunError, KeyError):
        logger.warning(f"{file} is damaged: this training begins again.")
        return 0, 0.0
    if header["run"] != run:
        return 0, 0.0
    values = {name: t.read() for name, t in content.items()}
    classifier.net.load_state_dict({k.removeprefix("net/"): v for k, v in values.items() if k.startswith("net/")})
    sgd.restore({k.removeprefix("sgd/"): v for k, v in values.items() if k.startswith("sgd/")}, header["steps"])
    logger.info(f"Resuming after epoch {header['epochs']}.")
    return header["epochs"], header["seconds"]
