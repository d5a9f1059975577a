"""Forget and retain images of a run: read, or drawn by the base; encoded once, and kept in the user's cache."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.load import load_pipeline, load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.diffusion import Condition, Examples
from salun_sd.draw.encode import encode_image, encode_prompts, pixels, token_ids, warn_of_long
from salun_sd.draw.images import is_blank, read_image
from salun_sd.draw.kept import called, kept_images
from salun_sd.draw.sample import Row
from salun_sd.edit import datasets
from salun_sd.edit.checks import images_of, images_to_retain, prompts_to_retain
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime import cache, ranks
from salun_sd.runtime.contents import file_bytes
from salun_sd.runtime.documents import parse_json
from salun_sd.runtime.files import new_file

logger = logging.getLogger(__name__)


class Sources(NamedTuple):
    """Where the images of a run come from. All of it is checked before anything is drawn or encoded."""

    concepts: tuple[Concept, ...]
    images: list[list[Item] | None]  # of each concept; None: the base draws `samples`
    retain: list[Item] | None  # None: the base draws `samples` from `prompts`
    caption: str | None  # of retain images that have none
    prompts: list[tuple[str, float]]  # text and guidance scale, for retain images
    samples: int

    @classmethod
    def of(
        cls, base: Checkpoint, concepts: tuple[Concept, ...], samples: int, retain: str | None, caption: str | None,
        retain_prompts: str | Sequence[str] | None,
    ) -> "Sources":  # fmt: skip
        """From the options of `erase`. Raises UsageError or SalunError for what is missing or cannot be used."""
        prompts = prompts_to_retain(retain_prompts, concepts, base.sampling[1])
        images = [images_of(c.images, c.prompt) for c in concepts]
        retain_images = images_to_retain(retain, caption, concepts)
        texts = [text for text, _ in prompts] if retain_prompts else []
        check_texts(base, concepts, images, [*texts, *filter(None, [caption])], retain_images)
        return cls(concepts, images, retain_images, caption, prompts, samples)

    def count(self) -> int:
        """Number of forget images."""
        return sum(len(items) if items else self.samples for items in self.images)

    def draws(self) -> bool:
        """Whether the base has to draw any."""
        return not all([*self.images, self.retain])

    def examples(self, count: int) -> list[str]:
        """`count` of the concepts' prompts, then `count` of the retain prompts."""
        return [*spread([c.prompt for c in self.concepts], count), *spread([text for text, _ in self.prompts], count)]

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
    """Raise UsageError where the text encoders cannot tell texts apart that have to differ: a concept, or a caption of
    its images, and its anchor; a concept and a prompt `to_retain`, another concept, or no prompt at all. Logs prompts
    and captions that are longer than they read.
    """
    tokenizers = load_tokenizers(base)
    ids = partial(token_ids, tokenizers)

    def check(text: str, others: Mapping[tuple, str]) -> None:
        if other := others.get(ids(text)):
            raise UsageError(f"{base.name} cannot tell {text!r} from {other}: its text encoder is given the same "
                             "tokens for both. Let them differ at the beginning, not in case or spaces.")  # fmt: skip

    empty = {ids(""): "an empty prompt"}
    taken = {ids(text): f"the prompt to retain {text!r}" for text in to_retain} | empty
    captions = [[item.caption for item in items or () if item.caption] for items in [*images, retain]]
    for concept, of_images in zip(concepts, captions[:-1], strict=True):
        anchor = {} if concept.anchor is None else {ids(concept.anchor): f"the anchor {concept.anchor!r}"}
        for text in concept.prompts():
            check(text, taken | anchor)
            taken[ids(text)] = f"the concept {text!r}"
        for text in dict.fromkeys(of_images):
            check(text, empty | anchor)
    prompts = [text for c in concepts for text in (*c.prompts(), c.anchor) if text]
    warn_of_long(tokenizers, [*prompts, *to_retain, *chain(*captions)], base.name)


class Data(NamedTuple):
    """The encoded images and prompts of a run. N forget images."""

    forget: Examples
    row: dict[str, int]  # text => its row in forget.prompts; texts are the captions, the anchors and ""
    concepts: torch.Tensor  # index of the concept that each forget image shows, int64 [N]
    anchors: torch.Tensor  # row in forget.prompts of that concept's anchor, int64 [N]
    retain: Examples

    @property
    def empty(self) -> Condition:
        """The prompt ""."""
        return self.forget.rows([self.row[""]])


class LoadedBase:
    """A checkpoint that draws and encodes its training images. Parts are loaded when they are needed.

    size: side of the training images in pixels.
    """

    def __init__(self, model: Checkpoint, size: int):
        self.model, self.size = model, size
        self._pipeline = None

    def pipeline(self):
        """The whole pipeline, to draw with."""
        if self._pipeline is None:
            self._pipeline = load_pipeline(self.model)
        return self._pipeline

    def encoders(self):
        """The VAE, the tokenizers and the text encoders; with the UNet only where it is loaded already."""
        return self._pipeline or load_pipeline(self.model, unet=False)


def collect(base: LoadedBase, sources: Sources) -> Data:
    """Draw the images that are missing, and encode all."""
    concepts, caption = sources.concepts, sources.caption or sources.concepts[0].anchor
    items = forget_items(base, concepts, sources.images, sources.samples)
    to_retain = retain_items(base, sources.retain, caption, sources.prompts, sources.samples)
    retain, _ = encode(base, to_retain, [])
    texts = ["", *(c.anchor for c in concepts)]
    forget, row = encode(base, [item for of_concept in items for item in of_concept], texts)
    shown = [n for n, of_concept in enumerate(items) for _ in of_concept]
    return Data(forget, row, torch.tensor(shown), torch.tensor([row[concepts[n].anchor] for n in shown]), retain)


def sources_in_words(settings: Mapping) -> dict[str, str]:
    """Where the images of a run with these settings come from, for the record."""
    samples, prompts = settings["samples"], settings["retain_prompts"]
    forget = [c["images"] or f"drawn by the base, {samples} for {c['prompt']!r}" for c in settings["concepts"]]
    if prompts is None:
        prompts = "the anchors"
    elif not isinstance(prompts, str):
        prompts = ", ".join(map(repr, prompts))
    return {"forget": "; ".join(forget), "retain": settings["retain"] or f"drawn by the base from {prompts}"}


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
    settings = {"scheduler": model.scheduler, "steps": model.sampling[0], "what": what}
    with kept_images("drawn", model, base.pipeline, rows, **settings) as files:
        return [Item(str(f), row.text, None, partial(file_bytes, f)) for f, row in zip(files, rows, strict=True)]


def spread(choices, count: int) -> list:
    """`count` choices in their order; their numbers differ by one at most."""
    return [choices[i * len(choices) // count] for i in range(count)]


def encode(base: LoadedBase, items: list[Item], texts: Iterable[str]) -> tuple[Examples, dict[str, int]]:
    """Images with captions => latents and embeddings; and text => its row in `prompts`, for captions and `texts`.

    Both are kept in one safetensors file in the cache folder. Images and prompts that this checkpoint encoded before at
    this size are not encoded again. The file is mapped into memory, not read.
    """
    needed = list(dict.fromkeys([*texts, *(item.caption for item in items)]))
    key = f"{base.model.identity} {base.size} {datasets.digest(items)}"
    about = f"{len(items)} images at {base.size} pixels, by {called(base.model)}"
    with cache.held("encoded", hashlib.sha256(key.encode()).hexdigest()[:16], about) as folder:
        file = folder / "encoded.safetensors"
        known, encoded = _read(file)
        missing = [text for text in needed if text not in known]
        if missing and ranks.is_main():
            pipeline = base.encoders()
            if not encoded:
                encoded = _encode_images(pipeline, items, base.size)
            for k, rows in encode_prompts(pipeline, missing).items():
                encoded[f"prompt/{k}"] = torch.cat([encoded[f"prompt/{k}"], rows]) if known else rows
            with new_file(file) as partial:
                header = {"texts": json.dumps(known + missing)}
                tensors.write(partial, {k: tensors.in_memory(v) for k, v in encoded.items()}, header, sealed=True)
        ranks.wait()
        if missing:
            known, encoded = _read(file)
    prompts: Condition = {k.removeprefix("prompt/"): v for k, v in encoded.items() if k.startswith("prompt/")}
    per_image = {"time_ids": encoded["time_ids"]} if "text_embeds" in prompts else {}
    row = {text: i for i, text in enumerate(known)}
    prompt_rows = torch.tensor([row[item.caption] for item in items])
    return Examples(encoded["latents"], prompts, prompt_rows, per_image), row


def _read(file: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The texts whose embeddings a cache file holds, and its tensors, mapped into memory; empty where there is none, or
    where it is damaged, with a log line."""
    try:
        metadata = tensors.read_sealed(file)[1]
        texts = parse_json(metadata["texts"], str(file), [str]) if "digest" in metadata else []
        return (texts, load_file(file)) if texts else ([], {})
    except FileNotFoundError:
        return [], {}
    except (SalunError, KeyError):
        logger.warning(f"{file} is damaged: its images and prompts are encoded again.")
        return [], {}


def _encode_images(pipeline, items: list[Item], size: int) -> dict[str, torch.Tensor]:
    latents, ids, blank = [], [], []
    for item in tqdm(items, desc="encode", unit="image"):
        image = read_image(item.read(), item.name)
        values, time_ids = pixels(image, size)
        latents.append(encode_image(pipeline, values))
        ids.append(time_ids)
        if is_blank(image):
            blank.append(item.name)
    if blank:
        logger.warning(f"{len(blank)} of {len(items)} training images are one colour and show nothing: {some(blank)}.")
    return {"latents": torch.stack(latents), "time_ids": torch.stack(ids)}
