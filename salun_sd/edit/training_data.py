"""Forget and retain images of a run: read, or drawn by the base; encoded once, and kept in the user's cache."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.diffusion import Condition, Examples
from salun_sd.draw.kept import kept_images
from salun_sd.draw.sample import Row
from salun_sd.edit import datasets
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item
from salun_sd.edit.encodings import LoadedBase, encode, half_drawn
from salun_sd.edit.resources import schedule_of
from salun_sd.edit.sources import Sources
from salun_sd.methods import batches
from salun_sd.methods.batches import CONCEPT, TRAJECTORY, Training, spread
from salun_sd.methods.forget_me_not import ForgetMeNot
from salun_sd.runtime.contents import file_bytes
from salun_sd.runtime.device import dtype_name


class Forget(NamedTuple):
    """N encoded images to forget, with the prompts of the concepts."""

    examples: Examples
    concepts: torch.Tensor  # index of the concept that each is of, int64 [N]
    row: dict[str, int]  # text => its row in examples.prompts; texts are the captions, the anchors and ""
    times: torch.Tensor | None = None  # int64 [N], where they have noise already: see Training

    @property
    def empty(self) -> Condition:
        """The prompt ""."""
        return self.examples.rows([self.row[""]])


class Data(NamedTuple):
    """What a run trains on, and the images of the concepts where it computes a mask."""

    training: Training
    shown: Forget | None


def collect(base: LoadedBase, sources: Sources, needs_mask: bool) -> Data:
    """Draw the images that are missing, and encode all."""
    retain = retain_empty = None
    if sources.retains:
        caption = sources.caption or sources.concepts[0].anchor or ""  # where each image has one of its own
        items = retain_items(base, sources.retain, caption, sources.prompts, sources.samples)
        retain, row = encode(base, items, [""])
        retain_empty = row[""] if sources.holds_empty else None
    of_concepts = None
    if needs_mask or sources.shows == CONCEPT:
        items = forget_items(base, sources.concepts, sources.images, sources.samples)
        of_concepts = _encoded(base, sources.concepts, items)
    forget = of_concepts if sources.shows == CONCEPT else _drawn(base, sources)
    training = _training(base.model, sources, forget)._replace(retain=retain, retain_empty=retain_empty)
    return Data(training, of_concepts)


def _encoded(base: LoadedBase, concepts: Sequence[Concept], items: list[list[Item]]) -> Forget:
    """Images to forget, a list for each concept."""
    examples, row = encode(base, [*chain(*items)], _texts(concepts))
    return Forget(examples, _numbers(items), row)


def _drawn(base: LoadedBase, sources: Sources) -> Forget | None:
    """Images to forget that show no concept: `samples` of each concept's anchor, or that many half drawn ones, spread
    evenly over its prompts."""
    concepts, captions = sources.concepts, [spread(c.prompts(), sources.samples) for c in sources.concepts]
    if sources.shows == batches.ANCHOR:
        return _encoded(base, concepts, [anchor_items(base, c, of) for c, of in zip(concepts, captions, strict=True)])
    if sources.shows == TRAJECTORY:
        guidance = sources.method.start_guidance
        examples, row, times = half_drawn(base, [*chain(*captions)], _texts(concepts), sources.seed, guidance)
        return Forget(examples, _numbers(captions), row, times)
    return None


def _texts(concepts: Sequence[Concept]) -> list[str]:
    """What methods ask for beside the concepts' prompts: "" and the anchors."""
    return ["", *(c.anchor for c in concepts if c.anchor)]


def _numbers(lists: list[list]) -> torch.Tensor:
    """For each member of each list the list's place, int64."""
    return torch.tensor([n for n, members in enumerate(lists) for _ in members])


def _training(base: Checkpoint, sources: Sources, forget: Forget | None) -> Training:
    """With nothing to retain yet."""
    schedule, anchors, tokens = schedule_of(base), None, None
    if forget is None:
        return Training(schedule, None, None, torch.empty(0, dtype=torch.int64))
    if all(c.anchor for c in sources.concepts):
        anchors = torch.tensor([forget.row[c.anchor] for c in sources.concepts])[forget.concepts]
    if isinstance(sources.method, ForgetMeNot):
        of_text = sources.tokens(base)
        none = torch.zeros_like(next(iter(of_text.values())))
        tokens = torch.stack([of_text.get(text, none) for text in forget.row])
    empty = forget.row[""] if base.is_guided else None
    return Training(schedule, forget.examples, None, forget.concepts, anchors, empty, forget.times, tokens)


def forget_items(
    base: LoadedBase, concepts: Sequence[Concept], images: Sequence[list[Item] | None], samples: int
) -> list[list[Item]]:  # fmt: skip
    """D_f, a list for each concept: its images with captions, or `samples` images that the base draws, spread evenly
    over the concept's prompts."""
    guidance = base.model.sampling[1]

    def draw(c: Concept) -> list[Item]:
        return drawn_items(base, [(text, guidance) for text in spread(c.prompts(), samples)], "forget images")

    return [
        datasets.captioned(items, c.prompt) if items else draw(c) for c, items in zip(concepts, images, strict=True)
    ]


def anchor_items(base: LoadedBase, concept: Concept, captions: list[str]) -> list[Item]:
    """An image of the concept's anchor for each caption, drawn by the base."""
    images = drawn_items(base, [(concept.anchor, base.model.sampling[1])] * len(captions), "anchor images")
    return [image._replace(caption=text) for image, text in zip(images, captions, strict=True)]


def retain_items(
    base: LoadedBase, images: list[Item] | None, caption: str, prompts: list[tuple[str, float]], samples: int
) -> list[Item]:  # fmt: skip
    """D_r: the images, with their captions or else `caption`; or `samples` images that the base draws, spread evenly
    over the prompts, each a text and its guidance scale."""
    if images:
        return datasets.captioned(images, caption)
    return drawn_items(base, spread(prompts, samples), "retain images")


def drawn_items(base: LoadedBase, texts: list[tuple[str, float]], what: str) -> list[Item]:
    """One image for each (text, guidance scale), drawn by the base once; the n-th of a text starts from seed n."""
    model, seen, rows = base.model, Counter(), []
    for text, guidance in texts:
        rows.append(Row(text, seen[text, guidance], guidance, (model.image_size, model.image_size)))
        seen[text, guidance] += 1
    settings = {"scheduler": model.scheduler, "steps": model.sampling[0], "dtype": dtype_name(base.dtype)}
    with kept_images("drawn", model, base.pipeline, rows, **settings, what=what) as files:
        return [Item(str(f), row.text, None, partial(file_bytes, f)) for f, row in zip(files, rows, strict=True)]
