"""CCE (Pham et al., ICLR 2024, arXiv 2308.01508): textual inversion on the erased model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from salun_sd.attacks.attack import WITH_GRADIENT, Attack, Scene, Try
from salun_sd.attacks.conditioning import alike, fit
from salun_sd.core.diffusion import Condition, on_device
from salun_sd.draw.prompts import Prompt, whole

WORD = "<*>"  # the new word, in texts for a person


@dataclass(frozen=True)
class Inversion(Attack):
    """The embedding of one new word, from the mean of all tokens, is trained to denoise pictures of the concept. For
    SDXL it has a part for each text encoder; for a class-conditional model it is that of a class. One search serves all
    prompts.

    Deviation: the word stands in the attacked prompts, in place of the concept's name, and not in a list of templates.
    A prompt that leaves no room for it loses its end.
    """

    steps: int = 5000
    pictures: int = 25
    batch_size: int = 16
    lr: float = 0.08  # the published 0.005 times the batch size
    weight_decay: float = 0.01

    quick: ClassVar[dict] = {"steps": 100}
    needs: ClassVar[frozenset] = frozenset({"picture", "embedding"})

    def passes(self, prompts: int) -> int:
        return self.steps * self.batch_size * WITH_GRADIENT

    def prepare(self, scene: Scene) -> dict[str, torch.Tensor]:
        g, tables, texts = scene.generator(), scene.target.tables(), sorted({around(scene, p) for p in scene.prompts})
        if scene.control:
            found = [alike(table[torch.randint(len(table), (1,), generator=g)], g) for table in tables]
        else:
            found = [table.mean(0, keepdim=True).requires_grad_() for table in tables]
            adam = torch.optim.AdamW(found, lr=self.lr, weight_decay=self.weight_decay)

            def condition() -> Condition:
                before, after = texts[torch.randint(len(texts), (), generator=g)]
                return scene.target.encode(before, found, after)

            fit(scene, adam, condition, scene.pictures()[: self.pictures], self.steps, self.batch_size, g)
        return {str(n): vector.detach().cpu() for n, vector in enumerate(found)}

    @torch.no_grad()
    def tries(self, scene: Scene, prompt: Prompt, found: dict[str, torch.Tensor]) -> list[Try]:
        before, after = around(scene, prompt)
        condition = scene.target.encode(before, [found[n] for n in sorted(found)], after)
        return [Try(f"{before} {WORD} {after}".strip(), prompt.seed, condition=on_device(condition, "cpu"))]


def around(scene: Scene, prompt: Prompt) -> tuple[str, str]:
    """What stands before and after the concept's name in a prompt; in the concept's prompt, where the model does not
    read it there."""
    name, read = whole(scene.name), scene.target.cut(prompt.text, 0)
    before, after = name.split(read if name.search(read) else scene.concept, 1)
    return before.strip(), after.strip()
