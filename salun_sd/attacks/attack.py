"""What every attack is: settings, and up to three steps that it may take in its own way."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from salun_sd.attacks.target import Target
from salun_sd.core.diffusion import Condition
from salun_sd.draw.generate import seed_of
from salun_sd.draw.prompts import Prompt, class_in

OPENING = re.compile(r"(?:(?:an?|the) )?(?:photo|photograph|image|picture|painting|drawing) of ", re.IGNORECASE)
WITH_GRADIENT = 3  # passes whose time a forward and a backward pass take
ROOM = 16  # tokens of attacks that search for a whole text
ARTICLE = re.compile(r"(?:an?|the) ", re.IGNORECASE)


class Try(NamedTuple):
    """How one image of an attack is drawn, and what the page shows of it."""

    text: str  # the prompt that is drawn; or words for what is drawn
    seed: int  # of the first noise
    loss: float | None = None  # of the search: the lower, the better
    tokens: tuple[int, ...] = ()  # ids before the text
    condition: Condition | None = None  # [1, ...] in place of the text's
    start: torch.Tensor | None = None  # latents [1, C, h, w] before the denoising step `begins`, in place of noise
    begins: int = 0
    guidance: float | None = None  # None: the prompt's
    facts: dict[str, float] = {}  # what else is known of it; the report has their means


@dataclass
class Scene:
    """What an attack works with: one model, the prompts, pictures of the concept."""

    target: Target
    concept: str  # a prompt for it, such as "a photo of a sneaker"
    prompts: Sequence[Prompt]  # those that are attacked
    picture: Callable[[Prompt], torch.Tensor] | None  # a picture of the concept for a prompt: latents [1, C, h, w]
    # pictures of other things: latents [N, C, h, w], and their captions
    others: Callable[[], tuple[torch.Tensor, list[str]]] | None = None
    base: Target | None = None
    words: Sequence[str] = ()  # descriptions of the concept, one a line of the user's file
    synonyms: Sequence[str] = ()  # more prompts of the concept
    adversarial: Mapping[int, str] = field(default_factory=dict)  # prompts of others, by case
    mask: Mapping[str, torch.Tensor] | None = None  # the weights that the erasure could change, bool
    given: str = ""  # a digest of the pictures and texts that the user gave
    nameless: bool = False  # whether the concept's name was taken out of the prompts
    control: bool = False  # whether random draws of the same kind are tried, in place of a search
    seed: int = 0

    @property
    def thing(self) -> str:
        """What the concept's prompt shows: "a photo of a sneaker" => "a sneaker"."""
        opening = OPENING.match(self.concept)
        return self.concept[opening.end() if opening else 0 :].strip() or self.concept.strip()

    @property
    def name(self) -> str:
        """What the concept's prompt shows, without its article: "a photo of a sneaker" => "sneaker"."""
        article = ARTICLE.match(self.thing)
        return self.thing[article.end() if article else 0 :].strip()

    def asked(self, prompt: Prompt) -> str:
        """The text with which a model that knows the concept draws it: the prompt's, or the concept's where the prompt
        does not name its class, or lost the name."""
        is_named = class_in(prompt.text, [prompt.label]) if prompt.label else not self.nameless
        return prompt.text if is_named else self.concept

    def pictures(self) -> torch.Tensor:
        """The pictures of the concept for all prompts: latents [N, C, h, w]."""
        return torch.cat([self.picture(prompt) for prompt in self.prompts])

    def generator(self, *of: int) -> torch.Generator:
        """A generator on the CPU that depends on the seed and some whole numbers, such as a case."""
        return torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, *of]).generate_state(1)[0]))


@dataclass(frozen=True)
class Attack:
    """An attack with its settings, the fields: the defaults are the published ones, `quick` are those of a first look.

    A subclass has one of the three steps of its own: `stages` changes the model, `prepare` searches once for all
    prompts, `tries` gives the images of one prompt. Under `scene.control`, each does the same with what chance gives in
    place of what a search finds, and has as many tries.
    """

    quick: ClassVar[dict] = {}
    cases: ClassVar[dict] = {"quick": 10, "paper": None}  # the most prompts that are attacked
    # of "text", "room", "embedding", "null", "picture", "others", "base", "words", "adversarial", "mask", "peft"
    needs: ClassVar[frozenset] = frozenset()
    from_picture: ClassVar[bool] = False  # whether it begins from a picture of the concept, and so can succeed anywhere
    searches: ClassVar[bool] = True  # whether it looks for the concept, so that it can find it on the base
    counts_last: ClassVar[bool] = True  # whether stages build on one another, so that the last one counts; else any
    trains: ClassVar[bool] = False  # whether all weights of the UNet are trained
    uncounted: ClassVar[str] = ""  # what else it computes with than the UNet, of which `passes` tells nothing
    drawing: ClassVar[tuple[str, int] | None] = None  # scheduler and steps, where they are the attack's own
    guidance: ClassVar[float | None] = None  # of its tries, where it is the attack's own

    @classmethod
    def of(cls, budget: str) -> "Attack":
        return cls(**(cls.quick if budget == "quick" else {}))

    def settings(self) -> dict:
        return asdict(self)

    def labels(self) -> list[str] | None:
        """The names of the stages, the first that of the untouched model; None for an attack that has tries."""
        return None

    def most_tries(self, scene: Scene) -> int:
        """The most tries of a prompt; of an attack in stages, the number of those that change something."""
        return len(self.labels() or ["", ""]) - 1

    def passes(self, prompts: int) -> int:
        """How often an image goes through the UNet while it searches for so many prompts, about: a pass with a gradient
        counts as WITH_GRADIENT."""
        return 0

    def begins(self, stage: int) -> int:
        """The denoising step from which the images of a stage are drawn; its control draws from the first."""
        return 0

    def has_fresh(self) -> bool:
        """Whether what it finds can be drawn from other seeds: not a change of the weights, nor a noise."""
        return self.labels() is None and not self.from_picture

    def stages(self, scene: Scene) -> Iterator[int]:
        """Change the target's weights stage by stage, and give the number of each, from 1, while it is there. They are
        as before at the end."""
        yield 1

    def prepare(self, scene: Scene) -> dict[str, torch.Tensor]:
        """Search once for all prompts: what is found, by name."""
        return {}

    def tries(self, scene: Scene, prompt: Prompt, found: dict[str, torch.Tensor]) -> list[Try]:
        """The tries of one prompt, in the order of their numbers from 1. Here: the prompt itself, with its own seed or,
        as a control, another."""
        return [Try(prompt.text, seed_of(prompt, int(scene.control)))]


def plain(prompt: Prompt) -> Try:
    """The prompt itself: what is drawn without an attack."""
    return Try(prompt.text, prompt.seed)
