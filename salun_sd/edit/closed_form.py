"""UCE on a checkpoint: prompts to embeddings, and the base's own keys and values to new ones."""

from collections.abc import Sequence

import torch

from salun_sd.checkpoint.model import Checkpoint
from salun_sd.checkpoint.tensors import PlainTensors
from salun_sd.draw.encode import encode_prompts
from salun_sd.edit.concepts import Concept
from salun_sd.edit.encodings import LoadedBase
from salun_sd.edit.maskfile import Mask
from salun_sd.edit.supports import KEYS_AND_VALUES, parameters_of
from salun_sd.errors import UsageError
from salun_sd.methods.uce import UCE, last_tokens
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.finite import finite


def matrices(base: Checkpoint) -> list[str]:
    """The parameters that UCE may change: the matrices of cross-attention's keys and values. Raises UsageError for a
    UNet that has none."""
    names = parameters_of(base.skeleton("unet"), KEYS_AND_VALUES)
    if not (found := [name for name in base.unet if name in names and len(base.unet[name].shape) == 2]):
        raise UsageError(f"The UNet of {base.name} has no cross-attention, and uce changes nothing else: give another "
                         "--method.")  # fmt: skip
    return found


def check(base: Checkpoint, mask: Mask | None) -> None:
    """Raise UsageError where a mask, None if it is not known yet, or the UNet leaves UCE nothing to change."""
    names = matrices(base)
    if mask and not any(mask.bits[name].any() for name in names):
        raise UsageError("--mask has no weight of the keys and values of cross-attention, and uce changes nothing "
                         f"else: give --mask {KEYS_AND_VALUES}.")  # fmt: skip


def solve(
    loaded: LoadedBase, method: UCE, mask: Mask, concepts: Sequence[Concept], preserved: Sequence[str]
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The new values, float32 [k], of each matrix with k entries in the mask. Every process computes the same.

    preserved: prompts whose keys and values are held; one that is there several times counts once. Raises UsageError as
    `check` does, NotFinite for a damaged weight.
    """
    base, preserved = loaded.model, list(dict.fromkeys(preserved))
    check(base, mask)
    pairs = [(text, c.anchor or "") for c in concepts for text in c.prompts()]
    texts = [*(text for text, _ in pairs), *(anchor for _, anchor in pairs), *preserved]
    of_concepts, of_anchors, of_preserved = embeddings(loaded.encoders(), texts).split(
        [len(pairs), len(pairs), len(preserved)]
    )
    weights = PlainTensors({name: base.unet[name] for name in matrices(base)})
    solved = method.solve(weights, mask.bits, of_concepts, of_anchors, of_preserved)
    return {
        name: finite(values, f"{name} in the UNet of {base.name}")
        for name, values in Bar(solved, desc="uce", total=len(weights), unit="matrix")
    }


def embeddings(pipeline, texts: Sequence[str]) -> torch.Tensor:
    """The embedding of each prompt's last token, as cross-attention is given it, [P, D] float32 on the CPU. A prompt
    that is there several times is encoded once."""
    distinct = list(dict.fromkeys(texts))
    contexts = encode_prompts(pipeline, distinct)["context"]  # [P, L, D]
    rows = contexts[torch.arange(len(distinct)), last_tokens(pipeline.tokenizer, distinct)]
    return rows[[distinct.index(text) for text in texts]]
