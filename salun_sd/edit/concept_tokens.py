"""Which tokens of a prompt name the concept."""

import unicodedata
from collections.abc import Iterable, Sequence

import torch

from salun_sd.checkpoint.load import load_tokenizers
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.edit.concepts import Concept
from salun_sd.edit.retain_prompts import COMMON, WORD, has_one_of, telling_words
from salun_sd.errors import UsageError


def concept_tokens(
    base: Checkpoint, concepts: Sequence[Concept], texts: Iterable[str], *, end_token: bool
) -> dict[str, torch.Tensor]:  # fmt: skip
    """For each text, a prompt of a concept or a caption of its images, bool [L]: whether a token is of a word that
    tells the concept from its anchor, or from other photos where it has none. With `end_token`, so is the token that
    ends the text, and each of that kind that fills it up.

    L is the number of tokens that the text encoders read. Raises UsageError for a text without such a word.
    """
    tokenizers = load_tokenizers(base).values()
    words = set().union(*map(telling_words, concepts))
    marked = {}
    for text in dict.fromkeys(texts):
        marks = [_of_words(tokenizer, text, words) for tokenizer in tokenizers]
        named = torch.stack([of_words for of_words, _ in marks]).any(0)  # SDXL's two contexts lie side by side
        if not named.any():
            raise UsageError(f"{text!r} has none of the concept's own words ({', '.join(sorted(words)) or 'none'}) "
                             f"among the {len(named)} tokens that {base.name} reads, so no attention can be lowered: "
                             "give other images or words, or another --method.")  # fmt: skip
        marked[text] = torch.stack([named, *(ends for _, ends in marks if end_token)]).any(0)
    return marked


def _of_words(tokenizer, text: str, words: set[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [L] each: the tokens of a text that lie in one of the words, and those that end it."""
    text = unicodedata.normalize("NFC", text)
    spans = [m.span() for m in WORD.finditer(text) if m[0].casefold() not in COMMON and has_one_of(m[0], words)]
    tokens = tokenizer(
        text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_offsets_mapping=True
    )
    inside = [any(a < end and start < b for start, end in spans) for a, b in tokens.offset_mapping]
    return torch.tensor(inside), torch.tensor(tokens.input_ids) == tokenizer.eos_token_id
