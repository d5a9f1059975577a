"""Where the images of a run come from: checked before anything is drawn or encoded; in words, for the record."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from salun_sd.checkpoint.load import load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.draw import rehearsal
from salun_sd.draw.encode import reader, warn_of_long
from salun_sd.edit import datasets, trajectories
from salun_sd.edit.checks import images_of, images_to_retain
from salun_sd.edit.concept_tokens import concept_tokens
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item
from salun_sd.edit.recipes import Recipe
from salun_sd.edit.retain_prompts import ANCHOR, prompts_to_retain, shares_in_words
from salun_sd.errors import UsageError
from salun_sd.methods import batches
from salun_sd.methods.batches import CONCEPT, TRAJECTORY, spread
from salun_sd.methods.forget_me_not import ForgetMeNot
from salun_sd.methods.loop import Method
from salun_sd.methods.uce import UCE


class Sources(NamedTuple):
    """Where the images of a run come from. All of it is checked before anything is drawn or encoded."""

    concepts: tuple[Concept, ...]
    method: Method | UCE
    images: list[list[Item] | None]  # of each concept; None: the base draws `samples`
    retains: bool  # whether images are retained; uce takes prompts alone
    retain: list[Item] | None  # None: the base draws `samples` from `prompts`
    caption: str | None  # of retain images that have none
    prompts: list[tuple[str, float]]  # text and guidance scale, of retain images that the base draws, and for uce
    samples: int
    seed: int  # of what is drawn by chance
    holds_empty: bool  # whether the prompt "" is retained, too

    @classmethod
    def of(
        cls, base: Checkpoint, concepts: tuple[Concept, ...], recipe: Recipe, retain: str | None, caption: str | None,
        seed: int,
    ) -> "Sources":  # fmt: skip
        """From the options of `erase`. Raises UsageError or SalunError for what is missing or cannot be used."""
        bare = next((c.prompt for c in concepts if c.anchor is None), None)
        if bare and any(c.anchor for c in concepts) and not recipe.is_closed:
            raise UsageError(f"Concept {bare!r} has no anchor, and another has one: give one for each, or for none.")
        samples, retain_prompts, prompts = recipe.values["samples"], recipe.values["retain_prompts"], []
        if (recipe.retain and not retain) or (recipe.is_closed and retain_prompts):
            prompts = prompts_to_retain(base, concepts, retain_prompts, samples)
        images = [images_of(c.images, c.prompt) for c in concepts]
        retain_images = images_to_retain(retain, caption, concepts)
        texts = [text for text, _ in prompts] if retain_prompts and retain_prompts != ANCHOR else []
        check_texts(base, concepts, images, [*texts, *filter(None, [caption])], retain_images)
        holds_empty = base.is_guided and recipe.retain is not None and recipe.retain.target == "base"
        sources = cls(
            concepts, recipe.method, images, recipe.retain is not None, retain_images, caption, prompts, samples, seed,
            holds_empty,
        )  # fmt: skip
        if isinstance(recipe.method, ForgetMeNot):
            sources.tokens(base)  # raises where there are none
        if sources.shows == TRAJECTORY:
            rehearsal.check(base, trajectories.SCHEDULER, min(trajectories.STEPS, base.timesteps))
        return sources

    @property
    def shows(self) -> str | None:
        """What the images to forget show, as `batches` has it."""
        return self.method.shows

    def count(self) -> int:
        """Number of forget images; where a method has none, of retain images."""
        if self.shows is None:
            return len(self.retain) if self.retain else self.samples
        if self.shows != CONCEPT:
            return self.samples * len(self.concepts)
        return sum(len(items) if items else self.samples for items in self.images)

    def draws(self, needs_mask: bool) -> bool:
        """Whether the base has to draw any."""
        if self.shows in (batches.ANCHOR, TRAJECTORY) or (self.retains and not self.retain):
            return True
        return (needs_mask or self.shows == CONCEPT) and not all(self.images)

    def tokens(self, base: Checkpoint) -> dict[str, torch.Tensor]:
        """The tokens that name a concept, for each caption of an image to forget. Raises UsageError as
        `concept_tokens` does."""
        texts = [text for c in self.concepts for text in c.prompts()]
        for c, items in zip(self.concepts, self.images, strict=True):
            texts += [item.caption for item in (datasets.captioned(items, c.prompt) if items else ())]
        return concept_tokens(base, self.concepts, texts, end_token=self.method.end_token == "counts")

    def examples(self, count: int) -> list[str]:
        """`count` of the concepts' prompts, then `count` of the retain prompts; of the anchors where there are none."""
        kept = [text for text, _ in self.prompts] or [c.anchor for c in self.concepts if c.anchor]
        return [*spread([c.prompt for c in self.concepts], count), *(spread(kept, count) if kept else ())]

    def digests(self) -> dict:
        """SHA-256 of each source of images, None for what the base draws; and of the retain prompts."""
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {
            "forget": [items and datasets.digest(items) for items in self.images],
            "retain": self.retain and datasets.digest(self.retain),
            "retain_prompts": None if self.retain else prompts,
        }


def check_texts(
    base: Checkpoint, concepts: Sequence[Concept], images: Sequence[list[Item] | None], to_retain: Sequence[str] = (),
    retain: list[Item] | None = None,
) -> None:  # fmt: skip
    """Raise UsageError where the base cannot tell texts apart that have to differ: a concept and any anchor; a
    caption of its images and its own anchor; a concept and a prompt `to_retain`, another concept, or no prompt at all;
    and where a text names no class of a class-conditional base. Logs prompts and captions that are longer than text
    encoders read.
    """
    ids = reader(base)

    def check(text: str, others: Mapping[tuple, str]) -> None:
        if not (other := others.get(ids(text))):
            return
        if base.classes:
            raise UsageError(f"{text!r} and {other} are one class of {base.name}: give another.")
        raise UsageError(f"{base.name} cannot tell {text!r} from {other}: its text encoder is given the same tokens "
                         "for both. Let them differ at the beginning, not in case or spaces.")  # fmt: skip

    empty = {ids(""): "an empty prompt"}
    taken = {ids(text): f"the prompt to retain {text!r}" for text in to_retain} | empty
    captions = [[item.caption for item in items or () if item.caption] for items in [*images, retain]]
    own = [{} if c.anchor is None else {ids(c.anchor): f"the anchor {c.anchor!r}"} for c in concepts]
    anchors = dict(chain.from_iterable(map(dict.items, own)))
    for concept, anchor, of_images in zip(concepts, own, captions[:-1], strict=True):
        for text in concept.prompts():
            check(text, taken | anchors)
            taken[ids(text)] = f"the concept {text!r}"
        for text in dict.fromkeys(of_images):
            check(text, empty | anchor)
    prompts = [text for c in concepts for text in (*c.prompts(), c.anchor) if text]
    for text in dict.fromkeys(captions[-1] if base.classes else ()):
        ids(text)
    warn_of_long(load_tokenizers(base), [*prompts, *to_retain, *chain(*captions)], base.name)


def sources_in_words(settings: Mapping, method: Method | UCE, by_class: bool = False) -> dict[str, str]:
    """Where the images of a run with these settings come from, for the record. by_class: of a base that draws
    classes."""
    samples, concepts = settings["samples"], settings["concepts"]

    def drawn(concept: Mapping) -> str:
        if method.shows == batches.ANCHOR:
            return f"drawn by the base, {samples} for {concept['anchor']!r} with the prompt {concept['prompt']!r}"
        if method.shows == TRAJECTORY:
            return f"half-drawn images of the base, {samples} for {concept['prompt']!r}"
        return concept["images"] or f"drawn by the base, {samples} for {concept['prompt']!r}"

    forget = "; ".join(map(drawn, concepts)) if method.shows else "none"
    if not settings.get("retain_weight"):
        return {"forget": forget, "retain": "none"}
    retain = settings["retain"] or f"drawn by the base from {_prompts_in_words(settings, by_class)}"
    return {"forget": forget, "retain": retain}


def _prompts_in_words(settings: Mapping, by_class: bool) -> str:
    prompts = settings["retain_prompts"]
    if not prompts and by_class:
        return "the other classes"
    if not prompts:
        return shares_in_words(settings["samples"], any(c["anchor"] for c in settings["concepts"]))
    if prompts == ANCHOR:
        return "the anchors"
    return prompts if isinstance(prompts, str) else ", ".join(map(repr, prompts))
