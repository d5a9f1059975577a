"""Images and prompts to what a model computes with: latents, and text embeddings or numbers of classes."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps

from salun_sd.checkpoint.load import ClassPipeline, load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.diffusion import Condition
from salun_sd.draw import vae
from salun_sd.runtime.finite import finite

logger = logging.getLogger(__name__)

TOGETHER = 8  # prompts that go through the text encoders at once: one of them costs as much, little beside an image
SHOWN = 80  # most characters of a prompt in a warning
GREY = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # luma of red, green and blue (ITU-R BT.601)


def pixels(image: Image.Image, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB image => [3, size, size] float32 in [-1, 1], and its time ids [6] float32.

    The short side is resized (bicubic) and the centre is cropped, as in the authors' code. SDXL takes the time ids as
    an input (arXiv 2307.01952, section 2.2): the image's own height and width, top and left of the crop in the resized
    image, and twice `size`.
    """
    ids = image.height, image.width, *(_overhang(image, side, size) for side in "hw"), size, size
    return fitted(image, (size, size)), torch.tensor(ids).float()


def fitted(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """RGB image => [3, height, width] float32 in [-1, 1], of a width and a height: resized (bicubic) until both are
    reached, and the centre cropped."""
    cropped = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float().div(127.5).sub(1)


def _overhang(image: Image.Image, side: str, size: int) -> int:
    """Pixels that the centre crop removes at the top (h) or the left (w), once the short side has `size` pixels."""
    length = image.height if side == "h" else image.width
    return round((length * size / min(image.size) - size) / 2)


def encode_image(pipeline, values: torch.Tensor) -> torch.Tensor:
    """[3, H, W] => latent [4, h, w] float32 on the CPU, times the scaling factor; without a VAE the pixels, [3, H, W],
    or grey ones, [1, H, W], where the model draws those.

    It is the posterior's mode, so that an image has one latent; the authors' code samples at each use. Raises NotFinite
    where the VAE gives no such values.
    """
    if pipeline.vae is None:
        return values if pipeline.channels == len(values) else (GREY * values).sum(0, keepdim=True)
    return vae.encode(pipeline, values[None])[0].cpu()


@torch.no_grad()
def encode_prompts(pipeline, texts: list[str]) -> Condition:
    """Prompts => "context" [P, L, D] and, for SDXL, the pooled "text_embeds" [P, E]; both float32 on the CPU. Names of
    classes => "class", int64 [P].

    Each prompt is encoded as the pipeline encodes it to draw, in batches of one shape, filled up with "": so its
    embedding does not depend on the others, as matrix kernels round by the shape of the whole batch. "" is encoded
    as a missing prompt: zeros for SDXL base (force_zeros_for_empty_prompt). Raises NotFinite where a text encoder gives
    no such values.
    """
    if isinstance(pipeline, ClassPipeline):
        return {"class": torch.tensor([pipeline.classes.number(text) for text in texts])}
    batches = []
    for first in range(0, len(texts), TOGETHER):
        some = texts[first : first + TOGETHER]
        batch = embedded(pipeline, [*some, *[""] * (TOGETHER - len(some))])
        batches.append({k: v[: len(some)].cpu() for k, v in batch.items()})
    encoded = {k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}
    for values in encoded.values():
        finite(values, f"The output of the text encoder of {pipeline.name_or_path}")
        if pipeline.config.get("force_zeros_for_empty_prompt"):
            values[[text == "" for text in texts]] = 0
    return encoded


def embedded(pipeline, text: str | list[str]) -> Condition:
    """A prompt, or B of them => "context" [B, L, D] and, for SDXL, "text_embeds" [B, E], on the pipeline's device, as
    the pipeline encodes it to draw. Gradients flow through it."""
    device = pipeline.text_encoder.device
    context, _, *pooled = pipeline.encode_prompt(
        text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"context": context} | ({"text_embeds": pooled[0]} if pooled else {})


def reader(model: Checkpoint) -> Callable[[str], tuple]:
    """A function of a prompt that gives what the model reads of it: two prompts for which it gives the same are one to
    the model. For a class-conditional model it raises UsageError where a prompt names no class."""
    if model.classes:
        return lambda text: (model.classes.number(text),)
    return partial(token_ids, load_tokenizers(model))


def token_ids(tokenizers: Mapping, text: str) -> tuple[tuple[int, ...], ...]:
    """What each text encoder is given of a prompt, one id for each of its places."""
    settings = {"padding": "max_length", "truncation": True}  # as the pipelines have it
    return tuple(tuple(t(text, max_length=t.model_max_length, **settings).input_ids) for t in tokenizers.values())


def warn_of_long(tokenizers: Mapping, texts: Iterable[str], name: str) -> None:
    """Log how many of the prompts have more tokens than the text encoders of the model `name` read, and the first. A
    class-conditional model has no tokenizers, and nothing is too long for it."""
    if not tokenizers:
        return
    texts, places = list(dict.fromkeys(texts)), min(t.model_max_length for t in tokenizers.values())
    long = [
        text for text in texts
        if any(len(t(text, verbose=False).input_ids) > t.model_max_length for t in tokenizers.values())
    ]  # fmt: skip
    if long:
        first = repr(long[0][:SHOWN]) + ("..." if len(long[0]) > SHOWN else "")
        logger.warning(f"{len(long)} of {len(texts)} prompts have more than the {places} tokens that {name} reads, so "
                       f"their ends count for nothing; the first is {first}.")  # fmt: skip
