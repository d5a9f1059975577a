"""Forget-Me-Not (arXiv 2303.17591): less attention to the tokens of the concept."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from salun_sd.errors import TrainingError
from salun_sd.methods.batches import CONCEPT, Rows
from salun_sd.methods.loop import Method

logger = logging.getLogger(__name__)

NONE = 1e-4  # root mean square of probabilities; a prompt of 77 tokens that are all alike gives each 0.013


class Watched:
    """An attention processor of diffusers that keeps the attention on some tokens, and attends as another one does."""

    def __init__(self, attend: Callable, tokens: torch.Tensor):
        """tokens: bool [n, L], those of the first n examples."""
        self.attend, self.tokens = attend, tokens
        self.squares: torch.Tensor | None = None  # sum of the squared probabilities, [n] float32; None: self-attention
        self.queries = 0  # heads * pixels

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args,
        **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        if encoder_hidden_states is not None:
            p = self._probabilities(attn, hidden_states, encoder_hidden_states)
            squares = (p.square().sum(dim=(1, 2)) * self.tokens).sum(1)
            if self.squares is None:  # a checkpointed layer computes this again in the backward pass
                self.squares = squares
        return self.attend(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    def _probabilities(self, attn: nn.Module, pixels: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """softmax(Q K^T / sqrt(d)) of the first n examples, [n, heads, pixels, L] float32."""
        n = len(self.tokens)
        query, key = attn.to_q(pixels[:n]).float(), attn.to_k(context[:n]).float()
        p = attn.get_attention_scores(attn.head_to_batch_dim(query), attn.head_to_batch_dim(key))
        self.queries = attn.heads * query.shape[1]
        return p.unflatten(0, (n, attn.heads))


@dataclass(frozen=True)
class ForgetMeNot(Method):
    """loss = the root of the mean of p^2 over all cross-attention layers, their heads, all pixels and the tokens of the
    concept (arXiv 2303.17591, algorithm 1: the sum; github.com/SHI-Labs/Forget-Me-Not, a4a81e8: src/train_attn.py).
    p = softmax(Q K^T / sqrt(d)) is how much a pixel attends to a token.

    A mean is the sum divided by a number that no weight changes: so a layer counts as in the paper, by its heads and
    pixels. The root, which the authors' code takes of the sum, does not turn the gradient of an image. It makes it
    larger: many gradients of the mean are as small as Adam's epsilon, 1e-8. end_token: whether the end of the prompt is
    a token of the concept, too, as in the authors' configs/attn.yaml (use_pooler). Where a tokenizer fills prompts up
    with that token, as in SD 1.x, each of them counts.

    Deviations: no textual inversion, which the authors put first, 500 steps at 1e-3 for four new tokens; the concept
    has the tokens of its own words. They clip the norm of the gradient to 1: --clip-norm 1. Adam in place of AdamW,
    whose weight decay is 0.01. Images that the base draws of the concept in place of ten photographs, cropped at
    random.
    """

    shows, needs_anchor, support, needs_text = CONCEPT, False, "none", True
    published = {"lr": 2e-6, "steps": 35, "batch_size": 1, "samples": 10, "retain_weight": 0.0}

    end_token: Literal["counts", "left-out"] = "counts"

    @contextmanager
    def watching(self, unet: nn.Module, rows: Rows) -> Iterator[None]:
        """Let `losses` see the attention of a forward pass whose first rows these are. It has to last through the
        backward pass, in which a checkpointed layer runs again."""
        before = unet.attn_processors
        unet.set_attn_processor({name: Watched(attend, rows.tokens) for name, attend in before.items()})
        try:
            yield
        finally:
            unet.set_attn_processor(before)

    def losses(
        self, unet: nn.Module, prediction: torch.Tensor, rows: Rows, of_base: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        """Of a forward pass in `watching`."""
        layers = [layer for layer in unet.attn_processors.values() if layer.squares is not None]
        queries = sum(layer.queries for layer in layers)
        return (sum(layer.squares for layer in layers) / (queries * rows.tokens.sum(1))).sqrt()

    def check_first(self, loss: float, name: str) -> None:
        """Log the attention before training, from the mean loss of the first step. Raises TrainingError where there
        is none to lower."""
        if loss < NONE:
            raise TrainingError(f"{name} pays no attention to the concept's words, {loss:.1e} on average: there is "
                                "nothing to lower. Use another --method, or other words in --concept.")  # fmt: skip
        logger.info(f"Attention on the concept's words before training: {loss:.3f}, root mean square.")
