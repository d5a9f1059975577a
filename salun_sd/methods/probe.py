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
from salun_sd.methods.batches import Training, spread
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
        rare = sorted(counts, key=counts.__getitem__)[: len(counts) // 2]
        is_held = torch.isin(retain.which, torch.tensor(spread(rare, min(OF_RETAIN, len(counts) // ONE_IN))))
    else:
        is_held = torch.arange(len(retain)) >= len(retain) - min(OF_RETAIN, len(retain) // ONE_IN)
    trained, held = (_some(retain, chosen.nonzero().squeeze(1)) for chosen in (~is_held, is_held))
    return trained, held if len(held) else None


def _some(examples: Examples, index: torch.Tensor) -> Examples:
    images = {k: v[index] for k, v in examples.images.items()}
    return Examples(examples.latents[index], examples.prompts, examples.which[index], images)


class Points(NamedTuple):
    """n points, each with its prompt and with the prompt whose prediction is wanted for it."""

    x_t: torch.Tensor  # [n, C, h, w]
    t: torch.Tensor  # int64 [n]
    prompt: Condition  # the concept c, or a retain prompt r; n rows
    goal: Condition  # the anchor c', or "" where there is none, or the same r; n rows
    concept: torch.Tensor  # int64 [n], the number of the concept, or RETAIN

    @property
    def passes(self) -> int:
        """Forward passes of one example that a measure takes at most: two at each point of a concept, else one."""
        return len(self.t) + int((self.concept != RETAIN).sum())


def points_of(training: Training, held: Examples | None, seed: int) -> Points | None:
    """Points of each concept, on its images, and of the retain images that are held out; None where there are neither.
    A concept's goal is its anchor, or else ""; where the model has neither, there are no points of concepts.

    Their timesteps are spread evenly over those of the schedule; their noise depends on (seed, concept, place) alone.
    """
    groups, forget, goals = [], training.forget, training.anchors
    if goals is None and training.empty is not None:
        goals = torch.full_like(training.concepts, training.empty)
    if forget is not None and goals is not None:
        concepts = training.concepts.unique()
        count = max(1, min(OF_CONCEPT, OF_CONCEPTS // len(concepts)))
        for c in concepts.tolist():
            index = torch.tensor(spread((training.concepts == c).nonzero().squeeze(1).tolist(), count))
            groups.append(_points(training.schedule, forget, index, goals[index], c, seed, training.times))
    if held is not None:
        index = torch.tensor(spread(range(len(held)), OF_RETAIN))
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
    """What a probe finds. With e the model's predictions and e_base those before training, sums over the points:

    moved, of each concept: 1 - sum |e(c) - goal|^2 / sum |e_base(c) - e_base(c')|^2. 0: untouched; 1: it is the goal,
    e_base(c') where the training aims at that. Else the goal is e(c'), the model's own prediction for the anchor: it
    moves along, and a concept that is gone can be far from e_base(c'). None where the base predicts the same for both
    prompts.
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

    def __init__(
        self, unet: nn.Module, points: Points, size: int, name: str = "the model", *, keeps_goals: bool = False
    ):  # fmt: skip
        """unet: before training. keeps_goals: the goals are what it predicts for the anchors then. Raises NotFinite,
        which calls it `name`, where it is damaged."""
        self.points, self.size, self.name = points, size, name
        self.own = torch.arange(len(points.t))[ranks.rank() :: ranks.count()]
        self.is_concept = points.concept[self.own] != RETAIN
        self.base = self.predictions(unet, points.prompt, self.own)
        self.goals = self.predictions(unet, points.goal, self.own[self.is_concept]) if keeps_goals else None
        self.scale = self._distances(unet, torch.zeros_like(self.base))

    def __call__(self, unet: nn.Module) -> Measure:
        """Raises NotFinite where a prediction is not finite."""
        distances, concepts = self._distances(unet, self.base), self.points.concept

        def left(concept: int) -> float | None:
            distance, scale = (float(of_points[concepts == concept].sum()) for of_points in (distances, self.scale))
            return distance / scale if scale else None

        of_concepts = {c: left(c) for c in concepts.unique().tolist() if c != RETAIN}
        return Measure({c: None if share is None else 1 - share for c, share in of_concepts.items()}, left(RETAIN))

    def _distances(self, unet: nn.Module, of_retained: torch.Tensor) -> torch.Tensor:
        """The squared distance of each point's prediction from its goal or, for a retain prompt, from a given one,
        [m, C, h, w] for this process's points: [n] float64. All processes raise where one has a value that is not
        finite."""
        wanted = of_retained.clone()
        wanted[self.is_concept] = (
            self.predictions(unet, self.points.goal, self.own[self.is_concept]) if self.goals is None else self.goals
        )
        apart = self.predictions(unet, self.points.prompt, self.own) - wanted
        distances = torch.zeros(len(self.points.t), dtype=torch.float64)
        distances[self.own] = apart.double().square().flatten(1).sum(1)
        return finite(ranks.summed(distances), f"The prediction of the UNet of {self.name}")

    @torch.no_grad()
    def predictions(self, unet: nn.Module, prompts: Condition, places: torch.Tensor) -> torch.Tensor:
        """The predictions at some points, int64 [m], with their rows of prompts: [m, C, h, w] float32."""
        parts = [self.points.x_t[:0].float()]
        for index in filter(len, places.split(self.size)):
            x_t, t = (values[index].to(unet.device) for values in (self.points.x_t, self.points.t))
            rows = on_device({k: v[index] for k, v in prompts.items()}, unet.device)
            parts.append(predict(unet, x_t, t, rows).cpu())
        return torch.cat(parts)
