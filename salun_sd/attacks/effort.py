"""How much attacks draw and compute: known before they begin."""

from collections.abc import Iterable
from typing import NamedTuple

from salun_sd.attacks.attack import Attack
from salun_sd.attacks.run import FRESH_IMAGES
from salun_sd.runtime import ranks


class Effort(NamedTuple):
    """The images that are drawn, and how often an image goes through the UNet for them and in searches."""

    images: int = 0
    passes: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.images + other.images, self.passes + other.passes)


def drawing(batches: Iterable[int], steps: int, per_pass: int, guided: bool) -> Effort:
    """Batches of so many images, each drawn in full passes."""
    batches = list(batches)
    padded = sum(-(-count // per_pass) * per_pass for count in batches)
    return Effort(sum(batches), padded * steps * (2 if guided else 1))


def effort(attack: Attack, prompts: int, steps: int, per_pass: int, guided: bool, control: bool) -> Effort:
    """An attack on one model, or its control, which searches for nothing."""
    tries = attack.most_tries()
    batches = [prompts] * (1 + tries) if attack.labels() else [prompts, prompts * tries]
    if attack.has_fresh() and not control:
        batches.append(prompts * FRESH_IMAGES)
    processes = ranks.count()  # they share the prompts; what serves all prompts is done by each, or by one: others wait
    search = 0 if control else processes * attack.passes(-(-prompts // processes))
    steps = attack.drawing[1] if attack.drawing else steps
    return drawing(batches, steps, per_pass, guided) + Effort(0, search)
