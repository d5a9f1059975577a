"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012): tokens that the text encoder reads as prompt and concept."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from salun_sd.attacks.attack import ROOM, Attack, Scene, Try
from salun_sd.attacks.target import Target
from salun_sd.core import diffusion
from salun_sd.draw.encode import embedded
from salun_sd.draw.prompts import Prompt
from salun_sd.runtime.bar import Bar

PAIRS = ("a photo of {}", "an image of {}", "a picture of {}", "a close-up of {}", "a photo of {} on a table", "{}")
NOTHING = "a thing"  # in place of the concept


@dataclass(frozen=True)
class Genetic(Attack):
    """A genetic search over token ids, which looks at the text encoder alone. The loss is the squared error from the
    embedding of the prompt plus `strength` times the concept: the mean difference between the embeddings of texts with
    and without it.

    The better half of a generation stays. As many children follow: two random parents, cut once with the chance
    `crossover`, one token replaced with the chance `mutation`. Deviation: the pairs of texts are ours.
    """

    count: int = ROOM  # tokens
    population: int = 200
    generations: int = 3000
    mutation: float = 0.25
    crossover: float = 0.5
    strength: float = 3
    best: int = 1  # rows of the last generation that are tries

    quick: ClassVar[dict] = {"population": 50, "generations": 100}
    needs: ClassVar[frozenset] = frozenset({"text", "room"})
    uncounted: ClassVar[str] = "the text encoder"

    def most_tries(self, scene: Scene) -> int:
        return self.best

    def prepare(self, scene: Scene) -> dict[str, torch.Tensor]:
        if scene.control:
            return {}
        with_it, without = (self._mean(scene.target, thing) for thing in (scene.thing, NOTHING))
        return {"concept": (with_it - without).cpu()}

    def _mean(self, target: Target, thing: str) -> torch.Tensor:
        """The mean embedding [L, D] of the texts of a thing."""
        return embedded(target.pipeline, [text.format(thing) for text in PAIRS])["context"].mean(0)

    @torch.no_grad()
    def tries(self, scene: Scene, prompt: Prompt, found: dict[str, torch.Tensor]) -> list[Try]:
        target, g, usable = scene.target, scene.generator(prompt.case), scene.target.words()
        rows = usable[torch.randint(len(usable), (self.population, self.count), generator=g)]
        if scene.control:
            return [Try("", prompt.seed, tokens=tuple(row)) for row in rows[: self.best].tolist()]
        wanted = target.encode(prompt.text)["context"] + self.strength * found["concept"].to(target.device)

        def losses_of(rows: torch.Tensor) -> torch.Tensor:
            context = target.encode("", target.vectors(rows))["context"]
            return diffusion.mse(context, wanted.expand_as(context)).cpu()

        losses = losses_of(rows)
        for _ in Bar(range(self.generations), desc=f"case {prompt.case}", leave=None):
            better = losses.argsort(stable=True)[: self.population // 2]
            children = self._children(rows[better], usable, g)
            rows, losses = torch.cat([rows[better], children]), torch.cat([losses[better], losses_of(children)])
        found_best = losses.argsort(stable=True)[: self.best].tolist()
        return [Try("", prompt.seed, loss=losses[n].item(), tokens=tuple(rows[n].tolist())) for n in found_best]

    def _children(self, parents: torch.Tensor, usable: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Parents [n, k] => as many children."""
        (n, k), places = parents.shape, torch.arange(self.count)
        mother, father = (parents[torch.randint(n, (n,), generator=g)] for _ in range(2))
        cut = torch.where(torch.rand(n, 1, generator=g) < self.crossover, torch.randint(k, (n, 1), generator=g), k)
        children = torch.where(places < cut, mother, father)
        is_new = (places == torch.randint(k, (n, 1), generator=g)) & (torch.rand(n, 1, generator=g) < self.mutation)
        return torch.where(is_new, usable[torch.randint(len(usable), (n, k), generator=g)], children)
