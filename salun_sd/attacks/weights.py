"""Attacks that change a model's weights, stage by stage."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from salun_sd.attacks.attack import Attack, Scene, Try
from salun_sd.draw.generate import seed_of
from salun_sd.draw.prompts import Prompt


@dataclass(frozen=True)
class Weights(Attack):
    """The UNet's weights change stage by stage, and each stage draws every prompt with its own seed. The control is the
    untouched model with another seed for each stage; or, with `control_changes`, another change."""

    control_changes: ClassVar[bool] = False

    def names(self) -> list[str]:
        """The names of the stages, without that of the untouched model."""
        raise NotImplementedError

    def change(self, scene: Scene) -> Iterator[None]:
        """Give the UNet the weights of one stage after the other. Each begins from those of the last one; from the
        first ones where the stages do not build on one another."""
        raise NotImplementedError

    def labels(self) -> list[str]:
        return ["untouched", *self.names()]

    def stages(self, scene: Scene) -> Iterator[int]:
        if scene.control and not self.control_changes:
            yield from range(1, len(self.labels()))
            return
        with put_back(scene.target.unet) as restore, closing(self.change(scene)) as changes:
            for stage, _ in enumerate(changes, 1):
                yield stage
                if not self.counts_last:
                    restore()

    def tries(self, scene: Scene, prompt: Prompt, found: dict[str, torch.Tensor]) -> list[Try]:
        """One for each stage."""
        other = scene.control and not self.control_changes
        return [Try(prompt.text, seed_of(prompt, stage * other)) for stage in range(1, len(self.labels()))]


@contextmanager
def put_back(module: nn.Module) -> Iterator[Callable[[], None]]:
    """In the end, the module has the weights of the beginning again, to the last bit; and whenever the function is
    called that this gives. They are kept on the CPU."""
    before = {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()}

    @torch.no_grad()
    def restore() -> None:
        for name, p in module.named_parameters():
            p.copy_(before[name])

    try:
        yield restore
    finally:
        restore()
