"""Which examples each step of an erasure sees: images, timesteps and noise, a function of the seed alone."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import torch

from salun_sd.core.diffusion import Condition, Examples, Schedule, add_noise, on_device, target

# What the images to forget of a method show; all have the concept's prompt.
CONCEPT = "concept"  # the concept
ANCHOR = "anchor"  # the anchor
TRAJECTORY = "trajectory"  # the concept, half drawn: points x_t on the path by which the base draws it

# Share of the images to retain whose prompt is "", where the training says so. Guidance uses the prediction for that
# prompt in every image, and multiplies its error; no other prompt holds it.
EMPTY_SHARE = 1 / 4


class Training(NamedTuple):
    """What an erasure trains on: N images to forget, and images to retain; each may be missing."""

    schedule: Schedule
    forget: Examples | None  # with the prompt of the concept c that each is trained to forget
    retain: Examples | None  # with their own prompts
    concepts: torch.Tensor  # which concept each image to forget is of, int64 [N]
    anchors: torch.Tensor | None = None  # the row in forget.prompts of each one's anchor c', int64 [N]
    empty: int | None = None  # the row in forget.prompts of "", if the model has a prediction for it
    times: torch.Tensor | None = None  # int64 [N]: forget.latents are x_t of these timesteps, with noise already
    tokens: torch.Tensor | None = None  # bool [P, L]: which tokens of forget.prompts name the concept
    retain_empty: int | None = None  # the row in retain.prompts of "", which takes the place of some; None: of none


class Batch(NamedTuple):
    """The examples of one step: B to forget, then B to retain."""

    forget: torch.Tensor | None  # int64 [B], places in Training.forget
    retain: torch.Tensor | None  # int64 [B], places in Training.retain
    t: torch.Tensor  # int64 [2B]
    noise: torch.Tensor  # [2B, C, h, w]
    is_empty: torch.Tensor | None = None  # bool [B]: which images to retain have the prompt "" in place of their own


class Rows(NamedTuple):
    """n examples of one kind, to forget or to retain, on the device of the model."""

    x_t: torch.Tensor  # [n, C, h, w]
    t: torch.Tensor  # [n]
    condition: Condition  # each one's own prompt, n rows
    target: torch.Tensor | None  # what the model was trained to predict, [n, C, h, w]; None where x_t was given
    anchor: Condition | None = None  # the anchor's prompt, n rows
    empty: Condition | None = None  # the prompt "", n rows
    tokens: torch.Tensor | None = None  # bool [n, L]


def spread(choices: Sequence, count: int) -> list:
    """`count` choices in their order; their numbers differ by one at most."""
    return [choices[i * len(choices) // count] for i in range(count)]


def shuffled(n: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches [size] over n examples: one shuffled pass after another; no example is dropped."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(n, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


def balanced(concepts: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches [size] over examples of several concepts, concepts [N] int64. Concepts give one example in
    turn, so their numbers in a batch differ by one at most. Each goes through its own examples in shuffled passes."""
    members = [(concepts == c).nonzero().squeeze(1) for c in concepts.unique()]
    turns = cycle([(m, shuffled(len(m), 1, generator)) for m in members])
    while True:
        yield torch.cat([m[next(one)] for m, one in (next(turns) for _ in range(size))])


def batches(training: Training, steps: int, size: int, seed: int) -> Iterator[Batch]:
    """The batches of all steps, `size` images of each kind; those to forget are balanced over the concepts."""
    generator = torch.Generator().manual_seed(seed)
    forget = training.forget and balanced(training.concepts, size, generator)
    retain = training.retain and shuffled(len(training.retain), size, generator)
    shape = (training.forget or training.retain).latents.shape[1:]
    with_empty = training.retain is not None and training.retain_empty is not None
    for _ in range(steps):
        f, r = forget and next(forget), retain and next(retain)
        t = torch.randint(len(training.schedule.alphas_cumprod), (2 * size,), generator=generator)
        noise = torch.randn((2 * size, *shape), generator=generator)
        yield Batch(f, r, t, noise, torch.rand(size, generator=generator) < EMPTY_SHARE if with_empty else None)


def forget_rows(training: Training, batch: Batch, part: torch.Tensor, device: torch.device) -> Rows | None:
    """The images to forget at the places `part` of a batch, int64 [n]. All prompts of an image see the same x_t: the
    authors' code encodes and noises it for each."""
    if training.forget is None:
        return None
    examples, index = training.forget, batch.forget[part]
    rows = _rows(training.schedule, examples, index, examples.which[index], batch.t[part], batch.noise[part], device)
    if training.times is not None:
        rows = rows._replace(x_t=examples.latents[index].to(device), t=training.times[index].to(device), target=None)

    def prompts(which: torch.Tensor) -> Condition:
        return on_device(examples.condition(index, which), device)

    if training.anchors is not None:
        rows = rows._replace(anchor=prompts(training.anchors[index]))
    if training.empty is not None:
        rows = rows._replace(empty=prompts(torch.full_like(index, training.empty)))
    if training.tokens is not None:
        rows = rows._replace(tokens=training.tokens[examples.which[index]].to(device))
    return rows


def retain_rows(training: Training, batch: Batch, part: torch.Tensor, device: torch.device) -> Rows | None:
    """The images to retain at the places `part` of a batch, int64 [n]."""
    if training.retain is None:
        return None
    examples, index, numbers = training.retain, batch.retain[part], len(batch.t) // 2 + part
    which = examples.which[index]
    if batch.is_empty is not None:
        which = torch.where(batch.is_empty[part], training.retain_empty, which)
    return _rows(training.schedule, examples, index, which, batch.t[numbers], batch.noise[numbers], device)


def _rows(
    schedule: Schedule, examples: Examples, index: torch.Tensor, which: torch.Tensor, t: torch.Tensor,
    noise: torch.Tensor, device: torch.device,
) -> Rows:  # fmt: skip
    x0, t, noise = examples.latents[index].to(device), t.to(device), noise.to(device)
    condition = on_device(examples.condition(index, which), device)
    return Rows(add_noise(schedule, x0, noise, t), t, condition, target(schedule, x0, noise, t))
