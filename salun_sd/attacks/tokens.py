"""P4D (Chin et al., ICML 2024, arXiv 2309.06135): free tokens, towards what the base predicts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from salun_sd.attacks.attack import ROOM, WITH_GRADIENT, Attack, Scene, Try
from salun_sd.attacks.target import Target
from salun_sd.core import diffusion
from salun_sd.draw.prompts import Prompt
from salun_sd.runtime.bar import Bar

FREE = -1  # in a row of ids: a token that is searched for


@dataclass(frozen=True)
class Tokens(Attack):
    """A continuous copy of the free tokens' embeddings moves by the gradient at the nearest tokens. The loss is the
    squared error from the base's prediction for the prompt, at a picture of the concept with random noise.

    Deviations: all tries are drawn and judged, where the authors keep the one that is nearest to the base's image by
    CLIP. A prompt that lacks its own class aims at the concept's prompt. A prompt that leaves no room loses its end.
    """

    kind: str = "N"  # "N": free tokens alone; "K": the prompt, with one after every `spacing` of its tokens
    count: int = ROOM  # of "N"
    spacing: int = 3  # of "K"
    steps: int = 3000
    every: int = 50  # steps for a try
    lr: float = 0.1
    weight_decay: float = 0.1

    quick: ClassVar[dict] = {"steps": 40, "every": 8}
    needs: ClassVar[frozenset] = frozenset({"text", "room", "picture", "base"})

    def most_tries(self, scene: Scene) -> int:
        return self.steps // self.every

    def passes(self, prompts: int) -> int:
        return prompts * self.steps * (WITH_GRADIENT + 1)  # the base's, without a gradient

    def row(self, target: Target, prompt: Prompt) -> list[int]:
        """The ids of a try, FREE where a token is searched for: as many as the model reads."""
        if self.kind == "N":
            return [FREE] * self.count
        ids = target.ids(prompt.text)
        groups = [(*ids[n : n + self.spacing], FREE) for n in range(0, len(ids) or 1, self.spacing)]
        return [n for group in groups for n in group][: target.places]

    def tries(self, scene: Scene, prompt: Prompt, found: dict) -> list[Try]:
        target, g, usable = scene.target, scene.generator(prompt.case), scene.target.words()
        ids = torch.tensor(self.row(target, prompt))
        is_free, count = ids == FREE, self.steps // self.every
        random = usable[torch.randint(len(usable), (count if scene.control else 1, int(is_free.sum())), generator=g)]
        if scene.control:
            return [Try("", prompt.seed, tokens=tuple(ids.masked_scatter(is_free, row).tolist())) for row in random]
        copies = [vectors.clone().requires_grad_() for vectors in target.vectors(random[0])]
        adam, tables = torch.optim.AdamW(copies, self.lr, weight_decay=self.weight_decay), normal(target, usable)
        aim, x0, losses, tries = scene.base.encode(scene.asked(prompt)), scene.picture(prompt), [], []
        for n in Bar(range(1, self.steps + 1), desc=f"case {prompt.case}", leave=None):
            ids[is_free] = usable[nearest(copies, tables)]
            points = [vectors.requires_grad_() for vectors in target.vectors(ids)]
            loss = self._loss(scene, points, aim, x0, g)
            loss.backward()
            for copy, point in zip(copies, points, strict=True):
                copy.grad = point.grad[is_free]
            adam.step()
            losses.append(loss.item())
            if n % self.every == 0:
                mean = sum(losses[-self.every :]) / self.every
                tries.append(Try("", prompt.seed, loss=mean, tokens=tuple(ids.tolist())))
        return tries

    def _loss(
        self, scene: Scene, points: list[torch.Tensor], aim: diffusion.Condition, x0: torch.Tensor, g: torch.Generator
    ) -> torch.Tensor:
        """How far the model's prediction is from the base's, at one noise level."""
        t, noise = torch.randint(scene.target.model.timesteps, (1,), generator=g), torch.randn(x0.shape, generator=g)
        t, noise, x0 = (value.to(scene.target.device) for value in (t, noise, x0))
        x_t = diffusion.add_noise(scene.target.schedule, x0, noise, t)
        with torch.no_grad():
            wanted = scene.base.predict(x_t, t, aim)
        return diffusion.mse(scene.target.predict(x_t, t, scene.target.encode("", points)), wanted).mean()


def normal(target: Target, usable: torch.Tensor) -> list[torch.Tensor]:
    """The embeddings of the usable tokens [N, D], each of length 1, for each text encoder."""
    return [F.normalize(table[usable]) for table in target.tables()]


def nearest(copies: list[torch.Tensor], tables: list[torch.Tensor]) -> torch.Tensor:
    """For each row of the copies [k, D], the row of the tables [N, D] at the smallest angle: [k] on the CPU. SDXL's two
    text encoders read the same token, so their cosines are added."""
    cosines = sum(F.normalize(copy.detach()) @ table.T for copy, table in zip(copies, tables, strict=True))
    return cosines.argmax(1).cpu()
