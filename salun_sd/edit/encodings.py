"""Images and prompts of a run as tensors: encoded or half drawn once, and kept in the user's cache."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from salun_sd.checkpoint import tensors
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.diffusion import Condition, Examples
from salun_sd.draw.encode import encode_image, encode_prompts, pixels
from salun_sd.draw.images import is_blank, read_image
from salun_sd.draw.kept import called
from salun_sd.edit import datasets, trajectories
from salun_sd.edit.datasets import Item
from salun_sd.errors import SalunError, some
from salun_sd.runtime import cache, ranks
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.device import dtype_mark, dtype_name
from salun_sd.runtime.documents import parse_json
from salun_sd.runtime.files import new_file

logger = logging.getLogger(__name__)


class LoadedBase:
    """A checkpoint that draws and encodes its training images. Parts are loaded when they are needed.

    size: side of the training images in pixels. dtype: to draw and encode in.
    """

    def __init__(self, model: Checkpoint, size: int, dtype: torch.dtype = torch.float32):
        self.model, self.size, self.dtype = model, size, dtype
        self._pipeline = None

    def pipeline(self):
        """The whole pipeline, to draw with."""
        if self._pipeline is None:
            self._pipeline = load_pipeline(self.model, dtype=self.dtype)
        return self._pipeline

    def encoders(self):
        """The VAE, the tokenizers and the text encoders; with the UNet only where it is loaded already."""
        return self._pipeline or load_pipeline(self.model, unet=False, dtype=self.dtype)


def encode(base: LoadedBase, items: list[Item], texts: Iterable[str]) -> tuple[Examples, dict[str, int]]:
    """Images with captions => latents and embeddings; and text => its row in `prompts`, for captions and `texts`."""
    captions, make = [item.caption for item in items], partial(_encode_images, items=items, size=base.size)
    examples, row, _ = _kept(base, datasets.digest(items), "images", captions, texts, base.encoders, make)
    return examples, row


def half_drawn(
    base: LoadedBase, captions: list[str], texts: Iterable[str], seed: int, guidance: float
) -> tuple[Examples, dict[str, int], torch.Tensor]:  # fmt: skip
    """As `encode` gives them, points x_t on the paths by which the base draws `captions`, one for each; and their
    timesteps, int64 [N]. See `trajectories.half_drawn`."""
    make = partial(trajectories.half_drawn, texts=captions, size=base.size, seed=seed, guidance=guidance)
    settings = json.dumps([captions, seed, guidance])
    examples, row, values = _kept(base, settings, "half drawn images", captions, texts, base.pipeline, make)
    return examples, row, values["times"]


def _kept(
    base: LoadedBase, settings: str, what: str, captions: list[str], texts: Iterable[str], load: Callable,
    make: Callable[..., dict[str, torch.Tensor]],
) -> tuple[Examples, dict[str, int], dict[str, torch.Tensor]]:  # fmt: skip
    """What `make` gives for the pipeline that `load` loads, "latents" and others, with a row for each image: as
    examples with their captions, text => its row in `prompts`, for captions and `texts`, and as it is.

    It is kept in one safetensors file in the cache folder. What this checkpoint made before at this size, with the same
    settings, is not made again, and no text is encoded twice. The file is mapped into memory, not read.
    """
    needed = list(dict.fromkeys([*texts, *captions]))
    dtype = dtype_name(base.dtype)
    key = f"{base.model.identity} {base.size}{dtype_mark(dtype)} {settings}"
    about = f"{len(captions)} {what} at {base.size} pixels, by {called(base.model)} in {dtype}"
    with cache.held("encoded", hashlib.sha256(key.encode()).hexdigest()[:16], about) as folder:
        file = folder / "encoded.safetensors"
        known, encoded = _read(file)
        missing = [text for text in needed if text not in known]
        if missing and ranks.is_main():
            pipeline = base.encoders() if encoded else load()
            encoded = encoded or make(pipeline)
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
    return Examples(encoded["latents"], prompts, torch.tensor([row[c] for c in captions]), per_image), row, encoded


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
    for item in Bar(items, desc="encode", unit="image"):
        image = read_image(item.read(), item.name)
        values, time_ids = pixels(image, size)
        latents.append(encode_image(pipeline, values))
        ids.append(time_ids)
        if is_blank(image):
            blank.append(item.name)
    if blank:
        logger.warning(f"{len(blank)} of {len(items)} training images are one colour and show nothing: {some(blank)}.")
    return {"latents": torch.stack(latents), "time_ids": torch.stack(ids)}
