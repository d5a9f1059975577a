"""The whole conditioning free: the strongest white-box attack of its kind, an upper bound on what a text can do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from salun_sd.attacks.attack import WITH_GRADIENT, Attack, Scene, Try
from salun_sd.attacks.given import nameless
from salun_sd.core.diffusion import Condition
from salun_sd.draw.prompts import Prompt
from salun_sd.runtime.bar import Bar


@dataclass(frozen=True)
class Conditioning(Attack):
    """Every embedding that the UNet reads is trained, from those of the concept's prompt, to denoise pictures of the
    concept; for a class-conditional model, the embedding of the concept's class. Where the prompts lost the concept's
    name, so does the start. Not published as an attack: the settings are ours. One search serves all prompts."""

    steps: int = 300
    batch_size: int = 16
    lr: float = 0.02

    quick: ClassVar[dict] = {"steps": 60}
    needs: ClassVar[frozenset] = frozenset({"picture", "embedding"})

    def passes(self, prompts: int) -> int:
        return self.steps * self.batch_size * WITH_GRADIENT

    def prepare(self, scene: Scene) -> dict[str, torch.Tensor]:
        text = nameless(scene.concept, [scene.name]) if scene.nameless else scene.concept
        start, g = scene.target.free(text), scene.generator()
        if scene.control:
            return {key: alike(value, g) for key, value in start.items()}
        found = {key: value.detach().clone().requires_grad_() for key, value in start.items()}
        adam = torch.optim.Adam(found.values(), lr=self.lr)
        fit(scene, adam, lambda: found, scene.pictures(), self.steps, self.batch_size, g)
        return {key: value.detach().cpu() for key, value in found.items()}

    def tries(self, scene: Scene, prompt: Prompt, found: dict[str, torch.Tensor]) -> list[Try]:
        return [Try("a conditioning", prompt.seed, condition=found)]


def fit(
    scene: Scene, optimizer: torch.optim.Optimizer, condition: Callable[[], Condition], pictures: torch.Tensor,
    steps: int, batch_size: int, g: torch.Generator,
) -> None:  # fmt: skip
    """Train what a condition is made of to denoise pictures [N, C, h, w]. `condition` is called in each step."""
    for _ in Bar(range(steps), desc="denoise pictures of the concept", leave=None):
        x0 = pictures[torch.randint(len(pictures), (batch_size,), generator=g)]
        t = torch.randint(scene.target.model.timesteps, (batch_size,), generator=g)
        loss = scene.target.loss(x0, torch.randn(x0.shape, generator=g), t, condition()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def alike(vectors: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Random vectors [..., D], each as long as the given one."""
    noise = torch.randn(vectors.shape, generator=g)
    return noise / noise.norm(dim=-1, keepdim=True) * vectors.cpu().norm(dim=-1, keepdim=True)
