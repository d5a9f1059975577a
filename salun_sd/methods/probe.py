"""How far a training has come, in what a person wants of it: measured on a few points (x_t, t) that it never sees."""

from collections import Counter
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn

from salun_sd.core.diffusion import (
    Condition,
    Examples,
    Schedule,
    add_noise,
    joined,
    noise_for,
    on_device,
    predict,
)
from salun_sd.methods.batches import Training
from salun_sd.runtime import ranks
from salun_sd.runtime.finite import finite

OF_CONCEPT, OF_CONCEPTS = 4, 16  # most points of one concept, and of all; each has one at least
OF_RETAIN = 8  # points of retain prompts
ONE_IN = 8  # at most one of so many retain prompts, or images, is held out
PROMPTS = 16  # retain prompts from which on whole prompts are held out
RETAIN = -1  # in place of the concept's number
FIRST = 2**31  # number of the first point's noise, beyond those of the images in the saliency


def split(retain: Examples) -> tuple[Examples, Examples | None]:
    """Retain images to train on, and those that are held out for the probe; None where there are too few.

    With PROMPTS prompts or more, all images of some prompts are held out: of one prompt in ONE_IN and of OF_RETAIN at
    most, spread evenly over the half of the prompts that has the fewest images. So an anchor that many images show is
    trained on. With fewer prompts, the last images are held out, as few.
    """
    counts = Counter(retain.which.tolist())  # in the order of the images: that of the rows depends on the cache
    if len(counts) >= PROMPTS:
        rare = torch.tensor(sorted(counts, key=counts.__getitem__)[: len(counts) // 2])
        is_held = torch.isin(retain.which, _spread(rare, min(OF_RETAIN, len(counts) // ONE_IN)))
    else:
        is_held = torch.arange(len(retain)) >= len(retain) - min(OF_RETAIN, len(retain) // ONE_IN)
    trained, held = (_some(retain, chosen.nonzero().squeeze(1)) for chosen in (~is_held, is_held))
    return trained, held if len(held) else None


def _spread(choices: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of them in their order; their numbers differ by one at most."""
    return choices[torch.arange(count) * len(choices) // count]


def _some(examples: Examples, index: torch.Tensor) -> Examples:
    images = {k: v[index] for k, v in examples.images.items()}
    return Examples(examples.latents[index], examples.prompts, examples.which[index], images)


class Points(NamedTuple):
    """n points, and what the model ought to predict there: what it predicted before training with the prompt `goal`."""

    x_t: torch.Tensor  # [n, 4, h, w]
    t: torch.Tensor  # int64 [n]
    prompt: Condition  # the concept c, or a retain prompt r; n rows
    goal: Condition  # the anchor c', or "" where there is none, or the same r; n rows
    concept: torch.Tensor  # int64 [n], the number of the concept, or RETAIN


def points_of(training: Training, held: Examples | None, seed: int) -> Points | None:
    """Points of each concept, on its images, and of the retain images that are held out; None where there are neither.

    Their timesteps are spread evenly over those of the schedule; their noise depends on (seed, concept, place) alone.
    """
    groups, forget = [], training.forget
    if forget is not None:
        goals = training.anchors if training.anchors is not None else torch.full_like(training.concepts, training.empty)
        concepts = training.concepts.unique()
        count = max(1, min(OF_CONCEPT, OF_CONCEPTS // len(concepts)))
        for c in concepts.tolist():
            index = _spread((training.concepts == c).nonzero().squeeze(1), count)
            groups.append(_points(training.schedule, forget, index, goals[index], c, seed, training.times))
    if held is not None:
        index = _spread(torch.arange(len(held)), OF_RETAIN)
        groups.append(_points(training.schedule, held, index, held.which[index], RETAIN, seed))
    return reduce(_joined, groups) if groups else None


def _points(
    schedule: Schedule, examples: Examples, index: torch.Tensor, goals: torch.Tensor, concept: int, seed: int,
    times: torch.Tensor | None = None,
) -> Points:  # fmt: skip
    """Points of one concept, or RETAIN, on the images at index [n], with goals [n], rows of examples.prompts. With
    times, all images are x_t of these timesteps already."""
    x_t, count, timesteps = examples.latents[index], len(index), len(schedule.alphas_cumprod)
    if times is None:
        t = (2 * torch.arange(count) + 1) * timesteps // (2 * count)
        first = FIRST + OF_RETAIN * (concept + 1)
        x_t = add_noise(schedule, x_t, noise_for(range(first, first + count), x_t.shape[1:], timesteps, seed)[1], t)
    else:
        t = times[index]
    own, goal = examples.condition(index), examples.condition(index, goals)
    return Points(x_t, t, own, goal, torch.full((count,), concept))


def _joined(a: Points, b: Points) -> Points:
    return Points(*(joined(x, y) if isinstance(x, dict) else torch.cat([x, y]) for x, y in zip(a, b, strict=True)))


class Measure(NamedTuple):
    """What a probe finds. With e the model's predictions and e_base those before training:

    moved, of each concept: sum min(<e(c) - e_base(c), w>, |w|^2) / sum |w|^2 over its points, w = e_base(c') - e_base(c)
    the way to its anchor. 0: untouched; 1: at each point it is as far as the anchor. So no point that is past the
    anchor stands for one that is not there yet. None where the base predicts the same for both prompts.
    drift: sum |e(r) - e_base(r)|^2 / sum |e_base(r)|^2 over prompts r that are to stay. None where none are held out.
    """

    moved: dict[int, float | None]
    drift: float | None

    def reached(self, until: float) -> bool:
        """Whether there is a concept, and each has moved that far."""
        return bool(self.moved) and all(moved is not None and moved >= until for moved in self.moved.values())


class Probe:
    """Measures a model at points. It keeps what the model predicted before training, float32, on the CPU.

    size: points in a forward pass. In a run of several processes each takes a share of the points.
    """

    def __init__(self, unet: nn.Module, points: Points, size: int, name: str = "the model"):
        """unet: before training. Raises NotFinite, which calls it `name`, where it is damaged."""
        self.points, self.size, self.name = points, size, name
        self.own = torch.arange(len(points.t))[ranks.rank() :: ranks.count()]
        self.base = self.predictions(unet, points.prompt)
        self.way = self.predictions(unet, points.goal) - self.base
        self.scale = self._of_points(self.base, self.way, self.way)

    def __call__(self, unet: nn.Module) -> Measure:
        """Raises NotFinite where a prediction is not finite."""
        change, concepts = self.predictions(unet, self.points.prompt) - self.base, self.points.concept
        values = self._of_points(change, change, self.way)
        values = torch.where(concepts == RETAIN, values, values.minimum(self.scale))

        def share(concept: int) -> float | None:
            value, scale = (float(of_points[concepts == concept].sum()) for of_points in (values, self.scale))
            return value / scale if scale else None

        return Measure({c: share(c) for c in concepts.unique().tolist() if c != RETAIN}, share(RETAIN))

    def _of_points(self, retained: torch.Tensor, moved: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
        """At each point |retained|^2 for a retain prompt, and else <moved, way>: [n] float64, from the values at this
        process's, [m, 4, h, w] each. All processes raise where one has a value that is not finite."""
        is_retained = (self.points.concept == RETAIN)[self.own]
        squares, products = (retained.double() ** 2).flatten(1).sum(1), (moved.double() * way).flatten(1).sum(1)
        values = torch.zeros(len(self.points.t), dtype=torch.float64)
        values[self.own] = torch.where(is_retained, squares, products)
        return finite(ranks.summed(values), f"The prediction of the UNet of {self.name}")

    @torch.no_grad()
    def predictions(self, unet: nn.Module, condition: Condition) -> torch.Tensor:
        """The predictions at this process's points, [m, 4, h, w] float32."""
        parts = [self.points.x_t[:0].float()]
        for index in filter(len, self.own.split(self.size)):
            x_t, t = (values[index].to(unet.device) for values in (self.points.x_t, self.points.t))
            rows = on_device({k: v[index] for k, v in condition.items()}, unet.device)
            parts.append(predict(unet, x_t, t, rows).cpu())
        return torch.cat(parts)
