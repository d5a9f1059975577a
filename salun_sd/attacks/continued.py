"""Finish a drawing that the base began (When Are Concepts Erased From Diffusion Models?, arXiv 2505.17013)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from salun_sd.attacks.attack import Attack, Scene, Try
from salun_sd.draw.generate import row_of, seed_of
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Sampler

SCHEDULER, STEPS = "DDIMScheduler", 50  # DDIM goes on from any step: it needs no earlier predictions


@dataclass(frozen=True)
class Continue(Attack):
    """The base takes the first steps with the prompt, or with the concept's where the prompt does not name its class.
    The attacked model takes the others with the prompt. A stage is a number of steps by the base; its control is a
    drawing by the attacked model alone, from another seed.

    Deviation: 20 steps by the base were not published. With a prompt that does not name the concept, even the pocket
    checkpoint itself finishes what it began with the concept's prompt as the concept only then: 8 of 8 images for two
    classes, after 10 steps 1 and 0.
    """

    begun: tuple[int, ...] = (1, 2, 5, 10, 20)  # steps by the base

    quick: ClassVar[dict] = {"begun": (10, 20)}
    needs: ClassVar[frozenset] = frozenset({"base"})
    from_picture: ClassVar[bool] = True
    drawing: ClassVar[tuple[str, int]] = (SCHEDULER, STEPS)

    def labels(self) -> list[str]:
        return [f"{count} of {STEPS} steps by the base" for count in (0, *self.begun)]

    def stages(self, scene: Scene) -> Iterator[int]:
        yield from range(1, len(self.begun) + 1)  # the weights stay as they are

    def passes(self, prompts: int) -> int:
        return prompts * 2 * sum(self.begun)  # guided

    def begins(self, stage: int) -> int:
        return self.begun[stage - 1]

    def tries(self, scene: Scene, prompt: Prompt, found: dict[str, torch.Tensor]) -> list[Try]:
        if scene.control:
            return [Try(prompt.text, seed_of(prompt, n)) for n in range(1, len(self.begun) + 1)]
        row = row_of(prompt, 0, (scene.base.model.image_size,) * 2)._replace(text=scene.asked(prompt))
        sampler = Sampler(scene.base.pipeline, STEPS, SCHEDULER)
        starts = {count: sampler.latents([row], 1, ends=count).cpu() for count in self.begun}
        return [Try(prompt.text, prompt.seed, start=start, begins=count) for count, start in starts.items()]
