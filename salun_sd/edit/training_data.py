"""Forget and retain images of a run: read or drawn by the base, encoded once, kept in the user's cache."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.diffusion import Condition, Examples
from salun_sd.draw.encode import encode_image, encode_prompts, pixels
from salun_sd.draw.images import read_image
from salun_sd.draw.kept import drawn
from salun_sd.draw.sample import Row
from salun_sd.edit import datasets as sources
from salun_sd.edit.checks import images_of, kept_prompts, to_keep
from salun_sd.edit.concepts import Concept
from salun_sd.edit.datasets import Item, file_bytes
from salun_sd.errors import SalunError
from salun_sd.runtime import cache, ranks
from salun_sd.runtime.files import new_file


class Wanted(NamedTuple):
    """What a run will learn from: images and prompts that were checked, before anything is drawn or encoded."""

    concepts: tuple[Concept, ...]
    images: list[list[Item] | None]  # of each concept; None: the base draws `samples`
    retain: list[Item] | None  # images to keep; None: the base draws `samples` from `prompts`
    caption: str | None  # of images to keep that have none
    prompts: list[tuple[str, float]]  # text and guidance scale of what must stay
    samples: int

    @classmethod
    def of(
        cls, base: Checkpoint, concepts: tuple[Concept, ...], samples: int, retain: str | None, caption: str | None,
        retain_prompts: str | Sequence[str] | None,
    ) -> "Wanted":  # fmt: skip
        """From the options of `erase`. Raises UsageError or SalunError for what is not there or cannot be used."""
        prompts = kept_prompts(retain_prompts, concepts, base.sampling[1])
        images = [images_of(c.images, c.prompt) for c in concepts]
        return cls(concepts, images, to_keep(retain, caption, retain_prompts, concepts), caption, prompts, samples)

    def count(self) -> int:
        """Images to forget."""
        return sum(len(own) if own else self.samples for own in self.images)

    def draws(self) -> bool:
        """Whether the base has to draw any."""
        return not all([*self.images, self.retain])

    def examples(self, count: int) -> list[str]:
        """So many of the concepts' prompts, then so many of those to retain."""
        return [*spread([c.prompt for c in self.concepts], count), *spread([text for text, _ in self.prompts], count)]

    def digests(self) -> dict:
        """SHA-256 of each source of images, None for what the base draws; and of the prompts to retain."""
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {
            "forget": [own and sources.digest(own) for own in self.images],
            "retain": self.retain and sources.digest(self.retain),
            "retain_prompts": None if self.retain else prompts,
        }


class Data(NamedTuple):
    """What a run learns from, encoded."""

    forget: Examples
    row: dict[str, int]  # of a text in forget.prompts: of the captions, the anchors and ""
    concepts: torch.Tensor  # which each image to forget shows, int64 [N]
    anchors: torch.Tensor  # the row of what stands in its place, int64 [N]
    retain: Examples

    @property
    def empty(self) -> Condition:
        """The prompt ""."""
        return self.forget.rows([self.row[""]])


class Base:
    """A checkpoint that draws and encodes what it will be trained on, loaded as far as it is needed."""

    def __init__(self, model: Checkpoint, resolution: int):
        self.model, self.resolution = model, resolution
        self._pipeline = None

    def pipeline(self):
        """The whole of it, to draw with."""
        if self._pipeline is None:
            self._pipeline = load_pipeline(self.model)
        return self._pipeline

    def encoders(self):
        """The VAE, the tokenizers and the text encoders, with the UNet only if it is there already."""
        return self._pipeline or load_pipeline(self.model, unet=False)


def collect(base: Base, wanted: Wanted) -> Data:
    """Images drawn where there are none, and all of them encoded."""
    concepts = wanted.concepts
    groups = forget_items(base, concepts, wanted.images, wanted.samples)
    to_retain = retain_items(base, wanted.retain, wanted.caption or concepts[0].anchor, wanted.prompts, wanted.samples)
    retain, _ = encode(base, to_retain, [])
    forget, row = encode(base, [item for own in groups for item in own], ["", *(c.anchor for c in concepts)])
    which = [n for n, own in enumerate(groups) for _ in own]
    return Data(forget, row, torch.tensor(which), torch.tensor([row[concepts[n].anchor] for n in which]), retain)


def prompts_said(retain_prompts: str | Sequence[str] | None) -> str:
    """What the retain images were drawn from, for the record."""
    if retain_prompts is None:
        return "the anchors"
    return retain_prompts if isinstance(retain_prompts, str) else ", ".join(map(repr, retain_prompts))


def forget_items(
    base: Base, concepts: Sequence[Concept], images: Sequence[list[Item] | None], samples: int
) -> list[list[Item]]:  # fmt: skip
    """D_f, a list for each concept: its images with captions, or as many as `samples`, drawn by the base, spread evenly
    over the concept's prompts."""
    guidance = base.model.sampling[1]

    def made(c: Concept) -> list[Item]:
        return drawn_items(base, [(text, guidance) for text in spread(c.prompts(), samples)], "forget images")

    return [sources.captioned(own, c.prompt) if own else made(c) for c, own in zip(concepts, images, strict=True)]


def retain_items(
    base: Base, images: list[Item] | None, caption: str, kept: list[tuple[str, float]], samples: int
) -> list[Item]:  # fmt: skip
    """D_r: images with their captions, or else `caption`; or images that the base draws, spread evenly over the kept
    prompts and their guidance scales."""
    if images:
        return sources.captioned(images, caption)
    return drawn_items(base, spread(kept, samples), "retain images")


def drawn_items(base: Base, texts: list[tuple[str, float]], what: str) -> list[Item]:
    """One image for each (text, guidance scale), drawn by the base once; the n-th of a text starts from seed n."""
    model, seen, rows = base.model, Counter(), []
    for text, guidance in texts:
        rows.append(Row(text, seen[text, guidance], guidance, (model.image_size, model.image_size)))
        seen[text, guidance] += 1
    how = {"scheduler": model.scheduler, "steps": model.sampling[0], "what": what}
    with drawn("drawn", model, base.pipeline, rows, **how) as files:
        return [Item(str(f), row.text, None, partial(file_bytes, f)) for f, row in zip(files, rows, strict=True)]


def spread(choices, count: int) -> list:
    """Each choice as often as the others, to one, in their order."""
    return [choices[i * len(choices) // count] for i in range(count)]


def encode(base: Base, items: list[Item], texts: Iterable[str]) -> tuple[Examples, dict[str, int]]:
    """Images with captions => latents and embeddings, and the row of `prompts` that each text has: the captions, and
    `texts` beside them.

    Kept in one safetensors file under the cache folder, which is mapped into memory, not read: what was encoded before
    for these images at this size by this checkpoint is not encoded again.
    """
    wanted = list(dict.fromkeys([*texts, *(item.caption for item in items)]))
    key = f"{base.model.identity} {base.resolution} {sources.digest(items)}"
    about = f"{len(items)} images at {base.resolution} pixels, by {Path(base.model.name).name}"
    with cache.held("encoded", hashlib.sha256(key.encode()).hexdigest()[:16], about) as folder:
        file = folder / "encoded.safetensors"
        known, found = _read(file)
        missing = [text for text in wanted if text not in known]
        if missing and ranks.is_main():
            pipeline = base.encoders()
            if not found:
                found = _encode_images(pipeline.vae, items, base.resolution)
            for k, rows in encode_prompts(pipeline, missing).items():
                found[f"prompt/{k}"] = torch.cat([found[f"prompt/{k}"], rows]) if known else rows
            with new_file(file) as partial:
                header = {"texts": json.dumps(known + missing)}
                tensors.write(partial, {k: tensors.given(v) for k, v in found.items()}, header)
        ranks.wait()
        known, found = _read(file)
    prompts: Condition = {k.removeprefix("prompt/"): v for k, v in found.items() if k.startswith("prompt/")}
    images = {"time_ids": found["time_ids"]} if "text_embeds" in prompts else {}
    row = {text: i for i, text in enumerate(known)}
    which = torch.tensor([row[item.caption] for item in items])
    return Examples(found["latents"], prompts, which, images), row


def _read(file: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The texts whose embeddings a cache file has, and its tensors, mapped into memory."""
    try:
        return json.loads(tensors.read(file)[1]["texts"]), load_file(file)
    except (FileNotFoundError, SalunError, KeyError):  # not there, or damaged since: encode anew
        return [], {}


def _encode_images(vae, items: list[Item], size: int) -> dict[str, torch.Tensor]:
    latents, ids = [], []
    for item in tqdm(items, desc="encode", unit="image"):
        values, time_ids = pixels(read_image(item.read(), item.name), size)
        latents.append(encode_image(vae, values))
        ids.append(time_ids)
    return {"latents": torch.stack(latents), "time_ids": torch.stack(ids)}
