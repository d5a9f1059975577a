"""UCE (arXiv 2308.14761): what cross-attention reads from the concept becomes what it read from the anchor, in closed
form."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from salun_sd.core.mask import Bits

LEAST = 1e-6  # of `ridge`: with less, prompts of nearly equal embeddings leave nothing but rounding


@dataclass(frozen=True)
class UCE:
    """For each matrix W of the keys and values of cross-attention, W0 in the base, the least of

        erase_scale sum ||W c - W0 c'||^2 + preserve_scale sum ||W p - W0 p||^2 + ridge ||W - W0||^2

    over the concepts c with their anchors c', and over the preserved prompts p (equation 7, and the authors'
    trainscripts/uce_sd_erase.py, 28c81ed, where `ridge` is --lamb). Where all of W may change, that is

        W = (ridge W0 + erase_scale sum W0 c' c^T + preserve_scale sum W0 p p^T)
            (ridge I + erase_scale sum c c^T + preserve_scale sum p p^T)^-1

    c, c' and p are the embeddings of one token, the last of the prompt (`last_tokens`). Each prompt of a concept, with
    its synonyms, is one c. Without an anchor, c' is the empty prompt, whose last token is the one that begins it: the
    authors' default for objects.

    Deviations: only entries in the mask change, and the others keep their values in the sum, so that any mask can be
    taken. Computed in float64. The empty prompt of SDXL base is zeros, as the model draws without a prompt.
    """

    shows, needs_anchor, support = None, False, "cross-attention-kv"
    needs_text, needs_empty = True, False
    published = {"batch_size": 8, "samples": 800}  # of images, where a mask is computed

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    ridge: float = 0.5

    def __post_init__(self):
        if not self.ridge >= LEAST:
            raise ValueError(f"ridge is {self.ridge:g}: give a number from {LEAST:g} on.")

    def solve(
        self, weights: Mapping[str, torch.Tensor], bits: Bits, concepts: torch.Tensor, anchors: torch.Tensor,
        preserved: torch.Tensor,
    ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
        """For each matrix with entries in the mask, its name and their new values, float32 [k].

        weights: parameter name -> [out, in], the base's keys and values, each looked up once. bits: the mask, which may
        have more parameters: these do not change. concepts and anchors [K, in], n-th to n-th, preserved [P, in], P from
        0 on: embeddings.
        """
        for name in weights:
            if (free := bits[name]).any():
                yield name, edited(weights[name], free, concepts, anchors, preserved, **asdict(self))[free].float()


def edited(
    weight: torch.Tensor, free: torch.Tensor, concepts: torch.Tensor, anchors: torch.Tensor, preserved: torch.Tensor, *,
    erase_scale: float, preserve_scale: float, ridge: float,
) -> torch.Tensor:  # fmt: skip
    """W [out, in] float64, the solution of `UCE` for one matrix: weight W0 and free, bool, [out, in]; entries that are
    not free stay. concepts and anchors [K, in], preserved [P, in].

    With E [m, in] all inputs and R [m, out] what is missing in their outputs, each times the root of its scale, a row's
    change d in its free entries S is the ridge regression of R on E_S. It is found among m numbers, not among |S|:
    d = E_S^T (ridge I + E_S E_S^T)^-1 R. Rows with the same free entries share it.
    """
    w, concepts, anchors, preserved = (t.double() for t in (weight, concepts, anchors, preserved))
    inputs = torch.cat([erase_scale**0.5 * concepts, preserve_scale**0.5 * preserved])  # E
    missing = torch.cat([erase_scale**0.5 * (anchors - concepts) @ w.T, w.new_zeros(len(preserved), len(w))])  # R
    if len(inputs) > w.shape[1]:  # E^T E and E^T R are all that the solution depends on
        orthogonal, inputs = torch.linalg.qr(inputs)
        missing = orthogonal.T @ missing
    ridges, solution = ridge * torch.eye(len(inputs), dtype=w.dtype), w.clone()
    patterns, pattern_of = free.unique(dim=0, return_inverse=True)
    for n, pattern in enumerate(patterns):
        rows, x = pattern_of == n, inputs * pattern  # [out], [m, in]
        solution[rows] += torch.linalg.solve(ridges + x @ x.T, missing[:, rows]).T @ x
    return solution


def last_tokens(tokenizer, texts: list[str]) -> torch.Tensor:
    """The place of each prompt's last token before the one that ends it, int64 [P]: of "a photo of a cat" that of
    "cat". Of a prompt that is cut off, the last that is read; of the empty prompt the token that begins it."""
    lengths = [len(tokenizer(t, truncation=True, max_length=tokenizer.model_max_length).input_ids) for t in texts]
    return torch.tensor(lengths, dtype=torch.int64) - 2
