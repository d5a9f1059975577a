"""Adversarial prompts of others, such as lists that P4D or Ring-A-Bell found."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from salun_sd.attacks.attack import Attack, Scene, Try
from salun_sd.draw.prompts import Prompt


@dataclass(frozen=True)
class Prompts(Attack):
    """Each adversarial prompt is a case of its own, with one try. Without an attack, its case has the plain prompt and
    the same seed. So pre-ASR and ASR are those of the papers. The control draws the plain prompt with another seed."""

    needs: ClassVar[frozenset] = frozenset({"text", "adversarial"})

    def tries(self, scene: Scene, prompt: Prompt, found: dict) -> list[Try]:
        if scene.control:
            return super().tries(scene, prompt, found)
        return [Try(scene.adversarial[prompt.case], prompt.seed)]


def attacked_with(scene: Scene, rows: Sequence[Prompt]) -> Scene:
    """The scene with a case for each adversarial prompt. Its plain prompt is the scene's with the same case number, or
    else the concept's own prompt."""
    plain = {prompt.case: prompt.text for prompt in scene.prompts}
    prompts = [row._replace(text=plain.get(row.case, scene.concept)) for row in rows]
    return replace(scene, prompts=prompts, adversarial={row.case: row.text for row in rows})
