"""Which tokens of a prompt name the concept."""

import pytest
import torch

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_tokenizers
from salun_sd.edit.concept_tokens import concept_tokens
from salun_sd.edit.concepts import Concept
from salun_sd.errors import UsageError

DRESS, BOOT = Concept("a photo of a dress", "a photo of a coat"), Concept("a photo of an ankle boot", None)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizers(find("pocket"))["tokenizer"]


@pytest.mark.parametrize(
    ("concepts", "text", "named"),
    [
        ([DRESS], "a photo of a dress", "dress"),
        ([BOOT], "a photo of an ankle boot", "ankle boot"),
        ([DRESS, BOOT], "An  ANKLE boot and a coat, near Dresses", "ankle boot dresses"),
        ([Concept("a photo of a t-shirt", "a photo of a shirt")], "a shirt, then a t-shirt", "t-shirt"),
        ([Concept("a photo of a dress", "a photo of a coat", ("Ärmel",))], "dans un A\u0308rmel", "ärmel"),
    ],
)
def test_the_marked_tokens_spell_the_concepts_own_words(tokenizer, concepts, text, named):
    marks = concept_tokens(find("pocket"), concepts, [text], end_token=False)[text]
    ids = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length).input_ids
    spelt = tokenizer.decode(torch.tensor(ids)[marks])
    assert marks.shape == (tokenizer.model_max_length,) and spelt.replace(" ", "") == named.replace(" ", "")


def test_with_the_end_token_all_after_the_text_count_too(tokenizer):
    text = DRESS.prompt
    words, both = (concept_tokens(find("pocket"), [DRESS], [text], end_token=end)[text] for end in (False, True))
    length = len(tokenizer(text).input_ids)  # with the tokens that begin and end it
    assert (both & ~words).nonzero().flatten().tolist() == list(range(length - 1, len(both)))


@pytest.mark.parametrize(
    ("concept", "text"),
    [
        (DRESS, "a coat"),
        (DRESS, "coat " * 40 + "dress"),  # beyond what the encoder reads
        (Concept("a photo of the coat", "a photo of a coat"), "a photo of the coat"),
    ],
)
def test_a_text_without_a_word_of_the_concept_is_named(concept, text):
    with pytest.raises(UsageError, match=text[-9:]):
        concept_tokens(find("pocket"), [concept], [text], end_token=True)
