"""How far a training has come, while it runs: how often that is measured, and when the training is over."""

import logging
from collections.abc import Mapping

from torch import nn

from salun_sd.errors import TrainingError, UsageError
from salun_sd.methods.loop import Erasure
from salun_sd.methods.probe import Points, Probe, points_of, split
from salun_sd.runtime.finite import NotFinite

logger = logging.getLogger(__name__)

COST = 0.05  # the most that the probe takes, as a share of the training
PASSES = 3  # forward passes that an update counts as, for each of its rows: one forward, one backward of twice the work
RUNAWAY = 0.1  # drift of a model that is ruined; with 0.04, pocket has lost a third of RA: see benchmarks/moved.md


def check_until(until: float | None, probe_every: int | None) -> None:
    """Raise UsageError for --until without a probe."""
    if until is not None and probe_every == 0:
        raise UsageError(f"--until {until:g} needs the probe, and --probe-every is 0: raise it, or leave out --until.")


class Watch:
    """Measures a training every few steps, as `methods.probe` has it; does nothing where --probe-every is 0."""

    def __init__(self, unet: nn.Module, erasure: Erasure, settings: Mapping, name: str):
        """unet: before training, of the model that errors call `name`. settings: `concepts`, `lr`, `until` and
        `probe_every`, as in the record; steps, 0 for never, None for the fewest that cost no more than COST.
        """
        self.unet, self.settings, self.until = unet, settings, settings["until"]
        self.erasure = erasure  # without the images that are held out
        self.last: dict | None = None  # what was measured: {"step": int, "moved": {prompt: share}, "drift": share}
        self.is_over = False  # because every concept has moved far enough
        self.probe: Probe | None = None
        if settings["probe_every"] == 0:
            return
        training, held = erasure.training, None
        if training.retain is not None:
            retain, held = split(training.retain)
            self.erasure = erasure = erasure._replace(training=training._replace(retain=retain))
        if (points := points_of(training, held, erasure.seed)) is None:
            return
        self.every = settings["probe_every"] or fewest_steps(erasure, points)
        cost = _passes_of_probe(erasure, points, self.every) / _passes(erasure)
        logger.info(f"--probe-every {self.every}: the probe costs {cost:.1%} of the training.")
        size, method = max(1, len(erasure.share()[:: erasure.parts])), erasure.method
        self.probe = Probe(unet, points, size, name, keeps_goals=method.needs_anchor and method.asks)

    def at(self, step: int) -> dict:
        """What is measured after a step: {"moved": {prompt: share}, "drift": share}; {} where it is not time for it.

        Raises TrainingError where the model is ruined.
        """
        steps = self.erasure.steps
        if self.probe is None or (step % self.every and step < steps):
            return {}
        retain = self.erasure.retain
        lower = f"lower --lr, now {self.settings['lr']:g}, or --steps" + (
            f"; or raise --retain-weight, now {retain.weight:g}." if retain else "."
        )
        try:
            moved, drift = measure = self.probe(self.unet)
        except NotFinite as e:
            raise TrainingError(f"After step {step} the model predicts numbers that are not finite: {lower}") from e
        if drift is not None and drift > RUNAWAY:
            raise TrainingError(f"After step {step} the model is ruined: its drift on prompts to retain is "
                                f"{drift:.2f}, above {RUNAWAY}: {lower}")  # fmt: skip
        prompts = [concept["prompt"] for concept in self.settings["concepts"]]
        measured = {"moved": {prompts[c]: share for c, share in moved.items()}, "drift": drift}
        self.last = {"step": step, **measured}
        if self.until is not None and measure.reached(self.until):
            self.is_over = True
            logger.info(f"After step {step} of {steps}, every concept has moved {self.until:g} or more: that is all.")
        elif self.until is not None and step == steps:
            logger.warning(f"After {steps} steps, not every concept has moved {self.until:g}: raise --steps or --lr.")
        return measured

    def shown(self) -> dict[str, str]:
        """For a progress bar: the least that a concept moved, and the drift."""
        if self.last is None:
            return {}
        moved = [share for share in self.last["moved"].values() if share is not None]
        values = {"moved": min(moved, default=None), "drift": self.last["drift"]}
        return {name: f"{value:.3f}" for name, value in values.items() if value is not None}


def fewest_steps(erasure: Erasure, points: Points) -> int:
    """The fewest steps between two measures that cost no more than COST of the training, if there are such."""
    every = (n for n in range(1, erasure.steps) if _passes_of_probe(erasure, points, n) <= COST * _passes(erasure))
    return next(every, erasure.steps)


def _passes(erasure: Erasure) -> int:
    """What a training costs, in forward passes of one example. What a method adds to its one pass is not counted."""
    kinds = (erasure.training.forget is not None) + (erasure.training.retain is not None)
    return PASSES * kinds * erasure.batch_size * erasure.steps


def _passes_of_probe(erasure: Erasure, points: Points, every: int) -> int:
    """What the probe costs: less than two measures before the first step, and the measures."""
    return (2 - (-erasure.steps // every)) * points.passes
