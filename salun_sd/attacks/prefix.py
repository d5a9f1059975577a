"""UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868): tokens before the prompt, by projected gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from salun_sd.attacks.attack import WITH_GRADIENT, Attack, Scene, Try
from salun_sd.draw.prompts import Prompt
from salun_sd.runtime.bar import Bar

LEVELS = 4  # of noise, at which tries are compared


@dataclass(frozen=True)
class Prefix(Attack):
    """For each of `timesteps` noise levels, `steps` updates of a relaxed one-hot code [count, vocabulary]; after each
    level, the likeliest tokens are a try. The loss is the squared error of denoising one picture of the concept.

    Deviation: the published attack stops at its first success. Here all tries are drawn, so that the control has as
    many. A prompt that leaves no room loses its end.
    """

    count: int = 3  # tokens; the authors take 5 for nudity
    timesteps: int = 50
    steps: int = 40
    lr: float = 0.01
    weight_decay: float = 0.1

    quick: ClassVar[dict] = {"timesteps": 5, "steps": 20}
    needs: ClassVar[frozenset] = frozenset({"text", "picture"})

    def most_tries(self, scene: Scene) -> int:
        return self.timesteps

    def passes(self, prompts: int) -> int:
        return prompts * self.timesteps * (WITH_GRADIENT * self.steps + LEVELS)

    def tries(self, scene: Scene, prompt: Prompt, found: dict) -> list[Try]:
        prompt = prompt._replace(text=scene.target.cut(prompt.text, self.count))
        g, usable = scene.generator(prompt.case), scene.target.words()
        if scene.control:
            rows = usable[torch.randint(len(usable), (self.timesteps, self.count), generator=g)]
            return [Try(prompt.text, prompt.seed, tokens=tuple(row)) for row in rows.tolist()]
        code = torch.full((self.count, len(usable)), 1 / len(usable), requires_grad=True)
        adam, x0, tries = (
            torch.optim.Adam([code], lr=self.lr, weight_decay=self.weight_decay), scene.picture(prompt), []
        )  # fmt: skip
        levels = evenly(self.timesteps, scene.target.model.timesteps)
        for t in Bar(levels, desc=f"case {prompt.case}", leave=None):
            for _ in range(self.steps):
                loss = self._loss(scene, prompt, code, usable, x0, t, g)
                adam.zero_grad()
                loss.backward()
                adam.step()
                with torch.no_grad():
                    code.copy_(onto_simplex(code))
            tokens = usable[code.argmax(1)].tolist()
            score = self._score(scene, prompt, tokens, x0)
            tries.append(Try(prompt.text, prompt.seed, loss=score, tokens=tuple(tokens)))
        return tries

    @torch.no_grad()
    def _score(self, scene: Scene, prompt: Prompt, tokens: list[int], x0: torch.Tensor) -> float:
        """The loss of tokens at noise levels that are the same for all tries of a prompt."""
        g, t = scene.generator(prompt.case, 1), torch.tensor(evenly(LEVELS, scene.target.model.timesteps))
        noise = torch.randn((LEVELS, *x0.shape[1:]), generator=g)
        condition = scene.target.with_tokens(tokens, prompt.text)
        return scene.target.loss(x0.expand(noise.shape), noise, t, condition).mean().item()

    def _loss(
        self, scene: Scene, prompt: Prompt, code: torch.Tensor, usable: torch.Tensor, x0: torch.Tensor, t: int,
        g: torch.Generator,
    ) -> torch.Tensor:  # fmt: skip
        """The loss of tokens that are drawn from the code, with its gradient straight through."""
        drawn = torch.multinomial(code.detach().clamp(min=1e-12), 1, generator=g)[:, 0]
        straight = F.one_hot(drawn, len(usable)) - code.detach() + code
        vectors = [straight.to(table.device) @ table[usable] for table in scene.target.tables()]
        condition = scene.target.encode("", vectors, prompt.text)
        noise = torch.randn(x0.shape, generator=g)
        return scene.target.loss(x0, noise, torch.tensor([t]), condition).mean()


def evenly(count: int, timesteps: int) -> list[int]:
    """Noise levels in the middle of `count` equal parts of a model's timesteps, however few these are."""
    return [timesteps * (2 * n + 1) // (2 * count) for n in range(count)]


def onto_simplex(rows: torch.Tensor) -> torch.Tensor:
    """Each row [k, n] => the nearest row of numbers from 0 that sum to 1 (Duchi et al., ICML 2008, figure 1)."""
    sorted_rows = rows.sort(1, descending=True).values
    excess = sorted_rows.cumsum(1) - 1
    places = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    last = (sorted_rows > excess / places).sum(1, keepdim=True)  # of the numbers that stay above 0
    return (rows - excess.gather(1, last - 1) / last).clamp(min=0)
