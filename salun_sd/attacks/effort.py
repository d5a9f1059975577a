"""How much attacks draw and compute: known before they begin."""

from collections.abc import Iterable
from typing import NamedTuple

from salun_sd.attacks.run import Run
from salun_sd.runtime import ranks


class Effort(NamedTuple):
    """The images that are still to be drawn, how often an image goes through the UNet for them and in searches, and the
    images in all, with those that are drawn."""

    images: int = 0
    passes: int = 0
    of: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(*map(sum, zip(self, other, strict=True)))


def drawing(batches: Iterable[int], steps: int, per_pass: int, guided: bool, of: int) -> Effort:
    """Batches of so many images, each drawn in full passes."""
    batches = list(batches)
    padded = sum(-(-count // per_pass) * per_pass for count in batches)
    return Effort(sum(batches), padded * steps * (2 if guided else 1), of)


def effort(run: Run, per_pass: int, guided: bool) -> Effort:
    """What an attack on one model, or its control, which searches for nothing, has still to do."""
    left, attack = run.left(), run.attack
    search = attack.passes(left.prompts) - (0 if left.for_all else attack.passes(0))
    processes = ranks.count()  # they share the prompts; what serves all prompts is done by each, or by one: others wait
    return drawing(left.batches, run.steps, per_pass, guided, left.images) + Effort(
        passes=0 if run.scene.control else processes * search
    )
