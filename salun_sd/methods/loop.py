"""The loop of an erasure: a method's loss on the images to forget, a retain loss on the others, and the updates of the
weights in a mask."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from salun_sd.core.diffusion import joined, mse, predict
from salun_sd.core.masked import Masked
from salun_sd.errors import TrainingError
from salun_sd.methods import surgery
from salun_sd.methods.batches import Batch, Rows, Training, batches, forget_rows, retain_rows
from salun_sd.methods.surgery import Rule
from salun_sd.runtime import ranks
from salun_sd.runtime.finite import NotFinite

# A prediction of zero scores 1 under the retain loss, whatever the target; ten times that is no model any more.
EXPLODED = 10.0


class Method:
    """What is done to the images to forget. Each method is a frozen dataclass: its fields are its own settings, numbers
    or a Literal of words, with the published values as defaults."""

    shows: ClassVar[str | None]  # what the images to forget show; None: there are none
    needs_anchor: ClassVar[bool]
    support: ClassVar[str]  # the published support, as --mask has it
    published: ClassVar[dict[str, float | str | None]]  # by the name of their option; steps None: one pass
    asks: bool = False  # whether the loss needs to know what the model predicted before training
    needs_text: ClassVar[bool] = False  # whether it works on the tokens of a prompt
    needs_empty: ClassVar[bool] = False  # whether it needs the prediction for the prompt ""
    join: Rule | None = None  # how the gradients of its loss and of the retain term are joined; None: they are added

    def of_base(self, unet: nn.Module, rows: Rows) -> torch.Tensor:
        """What it needs to know, [n, C, h, w], from the model before training, where it asks."""
        raise NotImplementedError

    def losses(
        self, unet: nn.Module, prediction: torch.Tensor, rows: Rows, of_base: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        """The loss of each row, [n]. prediction [n, C, h, w]: the model's for the rows, with their own prompts."""
        raise NotImplementedError

    def watching(self, unet: nn.Module, rows: Rows) -> AbstractContextManager[None]:
        """Around each forward and backward pass, whose first rows these are: for a loss of more than the prediction."""
        return nullcontext()

    def check_first(self, loss: float, name: str) -> None:
        """Raises TrainingError where the loss of the first step shows that the model `name` has nothing to forget."""


class Retain(NamedTuple):
    """weight * R over D_r, what every method may add. R is, with target "noise", the denoising loss of SalUn's authors;
    with "base", ||e(x_t|r) - e_base(x_t|r)||^2: the noise has a variance that no model predicts, and it drowns what is
    to be held (AdvUnlearn, arXiv 2405.15234; EAP, 2410.15618)."""

    weight: float
    target: str = "base"

    @property
    def asks(self) -> bool:
        return self.target == "base"

    def of_base(self, unet: nn.Module, rows: Rows) -> torch.Tensor:
        return predict(unet, rows.x_t, rows.t, rows.condition)

    def losses(
        self, unet: nn.Module, prediction: torch.Tensor, rows: Rows, of_base: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        return mse(prediction, rows.target if of_base is None else of_base)


class Erasure(NamedTuple):
    """What a run trains: a method on the images to forget, a retain loss on the others."""

    method: Method
    retain: Retain | None  # None: nothing is retained
    training: Training
    steps: int
    batch_size: int
    seed: int
    parts: int = 1  # that a process works through its share of a batch in: the same update, to rounding

    def batches(self) -> Iterator[Batch]:
        return batches(self.training, self.steps, self.batch_size, self.seed)

    def share(self) -> torch.Tensor:
        """The places in a batch that this process works on."""
        return torch.arange(self.batch_size)[ranks.rank() :: ranks.count()]

    def terms(self, batch: Batch, part: torch.Tensor, device: torch.device) -> list["Term"]:
        """The terms of the loss, with their rows at the places `part` of a batch."""
        forget = forget_rows(self.training, batch, part, device)
        retain = retain_rows(self.training, batch, part, device)
        terms = [Term("forget", self.method, 1.0, forget)] if forget else []
        return terms + ([Term("retain", self.retain, self.retain.weight, retain)] if retain else [])

    @property
    def asks(self) -> int:
        """How many terms ask for predictions of the model before training."""
        forgets, retains = self.training.forget is not None, self.training.retain is not None
        return (forgets and self.method.asks) + (retains and self.retain.asks)

    @property
    def rule(self) -> Rule | None:
        """The method's own `join`, by which the gradients of the two terms are joined; None where they are added, and
        where there is one term."""
        both = self.training.forget is not None and self.training.retain is not None
        return self.method.join if both else None

    @property
    def holds(self) -> bool:
        """Whether its optimizer has to hold the gradients of a step."""
        return self.parts > 1 or self.rule is not None

    def apart(self) -> list["Erasure"]:
        """Its terms, each an erasure of its own whose gradient is made apart, if a rule joins them; else itself."""
        if self.rule is None:
            return [self]
        return [self._replace(training=self.training._replace(**{lacks: None})) for lacks in ("retain", "forget")]


class Term(NamedTuple):
    """weight * the mean of a loss over rows."""

    name: str
    loss: Method | Retain
    weight: float
    rows: Rows


def of_base(unet: nn.Module, terms: list[Term]) -> torch.Tensor:
    """What terms ask of a model before training, [asks, n, C, h, w] float32."""
    with torch.no_grad():
        return torch.stack([term.loss.of_base(unet, term.rows) for term in terms if term.loss.asks])


def losses_of(unet: nn.Module, terms: list[Term], known: torch.Tensor | None) -> list[torch.Tensor]:
    """For each term the loss of its rows, [n]. known: as `of_base` gave it; None where no term asks.

    One forward pass for all: each parameter then has one gradient, which is freed at once.
    """
    rows = [term.rows for term in terms]
    condition = rows[0].condition if len(rows) == 1 else joined(rows[0].condition, rows[1].condition)
    prediction = predict(unet, torch.cat([r.x_t for r in rows]), torch.cat([r.t for r in rows]), condition)
    asked = iter(() if known is None else known)
    return [
        term.loss.losses(unet, part, term.rows, next(asked) if term.loss.asks else None)
        for term, part in zip(terms, prediction.split([len(r.t) for r in rows]), strict=True)
    ]


def erase(
    unet: nn.Module, adam: Masked, erasure: Erasure, *,
    of_base: Callable[[int], torch.Tensor | None] = lambda step: None, name: str = "the model",
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Fine-tune the UNet in place; yields {"step", "forget", "retain", "loss"} after each update: the means over the
    batch, without those that the erasure lacks, and their weighted sum.

    of_base gives what the erasure asks of the model before training, for this process's share of a step's batch:
    [asks, n, C, h, w]. A batch is shared among the processes. Where adam has steps behind it, goes on after them.

    Raises NotFinite when the model, which errors call `name`, gives no usable loss or gradient before it is changed;
    TrainingError when that happens later, naming the step and what to lower, and where the first loss is too large.
    """
    for step, batch in enumerate(erasure.batches(), 1):
        if step <= adam.steps:
            continue
        means = _update(unet, adam, erasure, batch, of_base(step), step, name)
        if step == 1 and "forget" in means:
            erasure.method.check_first(means["forget"], name)
        if step in (1, erasure.steps):
            _check_weights(adam, step, erasure.retain, name)
        yield {"step": step, **means}


def _update(
    unet: nn.Module, adam: Masked, erasure: Erasure, batch: Batch, known: torch.Tensor | None, step: int, name: str
) -> dict[str, float]:  # fmt: skip
    """One update; gives the mean of each term, and their weighted sum, over the batch of all processes."""
    terms, means, gradients = erasure.apart(), {}, []
    asked = [None] * len(terms) if known is None else known.split([term.asks for term in terms])
    with adam.step():
        for term, of_term in zip(terms, asked, strict=True):
            means |= _add_gradient(unet, adam, term, batch, of_term, step, name)
            if erasure.rule:
                gradients.append(adam.withdraw())
        if erasure.rule:
            adam.apply(surgery.joined(*gradients, erasure.rule))
    weights = {"forget": 1.0, "retain": erasure.retain.weight if erasure.retain else 0.0}
    return means | {"loss": sum(weights[term] * mean for term, mean in means.items())}


def _add_gradient(
    unet: nn.Module, adam: Masked, erasure: Erasure, batch: Batch, known: torch.Tensor | None, step: int, name: str
) -> dict[str, float]:  # fmt: skip
    """Run the backward passes of the erasure's loss; gives the mean of each term over the batch of all processes."""
    share, parts, means = erasure.share(), erasure.parts, {}
    for i in range(parts):
        terms = erasure.terms(batch, share[i::parts], unet.device)
        with watching(unet, terms):
            losses = losses_of(unet, terms, None if known is None else known[:, i::parts].to(unet.device))
            sums = torch.stack([of_term.sum() for of_term in losses]) / erasure.batch_size
            summed = ranks.summed(sums.detach().double().cpu())
            names = [term.name for term in terms]
            of_part = dict(zip(names, (summed * parts).tolist(), strict=True))
            _check_losses(of_part, erasure.method, step, adam.lr, name)
            means = {n: means.get(n, 0.0) + mean for n, mean in zip(names, summed.tolist(), strict=True)}
            sum(term.weight * mean for term, mean in zip(terms, sums, strict=True)).backward()
    return means


def watching(unet: nn.Module, terms: list[Term]) -> AbstractContextManager[None]:
    """What a method may need around `losses_of` and the backward pass."""
    first = terms[0]
    return first.loss.watching(unet, first.rows) if isinstance(first.loss, Method) else nullcontext()


def _check_losses(losses: dict[str, float], method: Method, step: int, lr: float, name: str) -> None:
    """Raise an error unless the losses of a step are those of a model that works. At the first step the weights are
    still the model's own, and a loss that is finite may be too large by the method's own settings."""
    if all(abs(loss) <= EXPLODED for loss in losses.values()):
        return
    words = ", ".join(f"{term} {loss:.3g}" for term, loss in losses.items())
    if step == 1 and not all(map(math.isfinite, losses.values())):
        raise NotFinite(f"The UNet of {name} is damaged: before training, its losses are {words}. Use another copy of "
                        "this model.")  # fmt: skip
    if step == 1:
        numbers = [f"--setting {key}={value:g}" for key, value in asdict(method).items() if isinstance(value, float)]
        change = f"change {' '.join(numbers)}, or " if numbers else ""
        raise TrainingError(f"Before training, the losses of the UNet of {name} are {words}, and may be {EXPLODED:g} "
                            f"at most: {change}use another copy of this model.")  # fmt: skip
    raise TrainingError(f"The loss exploded at step {step} ({words}): lower --lr, now {lr:g}.")


def _check_weights(adam: Masked, step: int, retain: Retain | None, name: str) -> None:
    """Raise an error unless all weights are finite after a step. No learning rate makes the first step infinite."""
    if adam.are_finite():
        return
    if step == 1:
        lower = f"lower --retain-weight, now {retain.weight:g}, or " if retain else ""
        raise NotFinite(f"The gradient of the UNet of {name} is not finite: {lower}use another copy of this model.")
    raise TrainingError(f"A weight is no longer finite after step {step}: lower --lr, now {adam.lr:g}.")
