"""How much attacks draw and compute: known before they begin."""

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


def drawing(images: int, steps: int, per_pass: int, guided: bool, of: int = 0) -> Effort:
    """Images of one batch, drawn in full passes."""
    padded = -(-images // per_pass) * per_pass
    return Effort(images, padded * steps * (2 if guided else 1), of)


def effort(run: Run, per_pass: int, guided: bool) -> Effort:
    """What an attack on one model, or its control, which searches for nothing, has still to do."""
    left, attack, is_control = run.left(), run.attack, run.scene.control
    search = attack.passes(left.prompts) - (0 if left.for_all else attack.passes(0))
    processes = ranks.count()  # they share the prompts; what serves all prompts is done by each, or by one: others wait
    plain, *tries = left.batches
    of_tries = guided if attack.guidance is None else attack.guidance > 1
    drawn = [drawing(plain, run.steps, per_pass, guided)] + [
        drawing(count, run.steps - (0 if is_control else attack.begins(stage)), per_pass, of_tries)
        for stage, count in enumerate(tries, 1)
    ]
    return sum(drawn, Effort(passes=0 if is_control else processes * search, of=left.images))
