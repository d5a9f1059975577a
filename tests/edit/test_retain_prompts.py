"""What retain images are drawn from where nothing is given: anchors, neighbours of the concepts, everyday prompts."""

import logging
import re

import pytest
import torch

from salun_sd.checkpoint.find import find
from salun_sd.draw import prompts
from salun_sd.edit.concepts import Concept
from salun_sd.edit.retain_prompts import (
    MOST,
    NEIGHBOURS,
    has_one_of,
    neighbours,
    prompts_to_retain,
    shares,
    telling_words,
)
from salun_sd.edit.sources import sources_in_words
from salun_sd.errors import UsageError
from salun_sd.methods.salun import SalUn
from salun_sd.runtime.ranges import WHOLE

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TEXTS = [p.text for p in prompts.read("retain")]
DRESS, BAG = Concept("a photo of a dress", "a photo of a coat"), Concept("a photo of a bag", "a photo of a shirt")
IRREGULAR = set("men women people children mice geese feet teeth leaves knives wolves shelves scarves loaves".split())


def texts_of(*concepts, samples: int) -> list[str]:
    return [text for text, _ in prompts_to_retain(find("pocket"), concepts, None, samples)]


# The shipped set


def test_the_set_is_short_distinct_prompts_that_no_judging_set_has():
    assert len(TEXTS) >= 300 and len({text.casefold() for text in TEXTS}) == len(TEXTS)
    assert all(3 <= len(text.split()) <= 12 for text in TEXTS)
    judging = {p.text.casefold() for name in ("everyday", "people", "imagenette", "nudity") for p in prompts.read(name)}
    assert judging and not judging & {text.casefold() for text in TEXTS}
    assert {f"a photo of {'an' if name[0] == 'a' else 'a'} {name}" for name in CLASSES} < set(TEXTS)


def test_the_set_has_no_plural_that_is_not_known_as_a_form_of_its_word():
    assert not [text for text in TEXTS if IRREGULAR & set(re.findall(r"\w+", text.casefold()))]


# Which prompts ask for the concept


@pytest.mark.parametrize(("prompt", "synonyms", "anchor", "words"), [
    ("a photo of a nude person", (), "a photo of a person wearing clothes", {"nude"}),
    ("a photo of a dress", (), "a photo of a coat", {"dress"}),
    ("an image of a church", ("Kirche im Dorf",), "an image of a French horn", {"church", "kirche", "im", "dorf"}),
    ("a photo of a T-shirt", (), "a photo of a shirt", {"t-shirt"}),
    ("a dog and a cat", (), "a cat and a dog", set()),
])  # fmt: skip
def test_the_telling_words_are_the_concepts_own(prompt, synonyms, anchor, words):
    assert telling_words(Concept(prompt, anchor, synonyms)) == words


@pytest.mark.parametrize(("word", "there", "elsewhere"), [
    ("dress", ["two Dresses", "a dress."], ["an address book", "a dressing-table", "a cloth"]),
    ("trousers", ["a trouser"], ["a house"]),
    ("nude", ["nudes", "nudity"], ["a noodle soup"]),
    ("puppy", ["three puppies"], ["a pupil in class"]),
    ("shirt", ["a striped shirt", "shirts"], ["a t-shirt", "a short tie"]),
    ("café", ["a cafe\u0301"], ["a cab"]),
])  # fmt: skip
def test_a_word_is_known_in_its_forms(word, there, elsewhere):
    assert all(has_one_of(text, {"zebra", word}) for text in there)
    assert not any(has_one_of(text, {"zebra", word}) for text in elsewhere)


# What is drawn


def test_the_shares_are_equal_to_one_image_and_complete_however_many_there_are():
    for samples in [*range(1, 40), WHOLE]:
        counts = shares(samples).values()
        assert len(counts) == 3 and sum(counts) == samples and max(counts) - min(counts) <= 1
    texts = texts_of(DRESS, samples=WHOLE)
    assert len(texts) == MOST and texts[MOST // 3 - 1] == DRESS.anchor not in texts[MOST // 3 :] and MOST % 3 == 0


@pytest.mark.parametrize(("name", "other"), [("dress", "coat"), ("shirt", "t-shirt"), ("ankle boot", "bag")])
def test_a_third_each_is_the_anchor_neighbours_and_everyday_prompts_and_none_asks_for_the_concept(name, other):
    concept = Concept(f"a photo of a {name}", f"a photo of a {other}")
    texts = texts_of(concept, samples=99)
    assert texts[:33] == [concept.anchor] * 33 and len(texts) == 99 and texts == texts_of(concept, samples=99)
    assert len(set(texts[33:66])) == NEIGHBOURS < len(set(texts[66:])) and set(texts[33:]) < set(TEXTS)
    classes = {prompts.class_in(text, CLASSES) for text in texts[33:]}
    assert classes - {None} == set(CLASSES) - {name} and concept.anchor not in texts[33:]


def test_neighbours_are_the_nearest_by_the_pooled_output_of_the_text_encoder(pocket):
    concepts = [DRESS._replace(synonyms=("a gown",)), BAG]
    texts = [text for text in TEXTS if not has_one_of(text, {"dress", "bag"})]

    def pooled(text: str) -> torch.Tensor:
        ids = pocket.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pocket.text_encoder(ids).pooler_output[0]

    for concept, near in zip(concepts, neighbours(find("pocket"), concepts, texts), strict=True):
        asked = torch.stack([pooled(text) for text in concept.prompts()])
        cosine = {text: torch.cosine_similarity(pooled(text), asked).max().item() for text in texts}
        assert [cosine[text] for text in near] == pytest.approx(sorted(cosine.values())[::-1][:NEIGHBOURS], abs=1e-5)
        assert len(set(near)) == NEIGHBOURS < len(texts)


def test_concepts_have_equal_shares_of_anchors_and_neighbours(caplog):
    caplog.set_level(logging.INFO, "salun_sd")
    texts, third = texts_of(DRESS, BAG, samples=30), 10
    assert texts[:third] == [DRESS.anchor] * 5 + [BAG.anchor] * 5
    [said] = [line for line in caplog.messages if "(10)" in line]
    near, other = neighbours(find("pocket"), [DRESS, BAG], sorted({*texts_of(DRESS, BAG, samples=900)} - {*texts[:10]}))
    assert repr(near[0]) in said and repr(other[0]) in said
    assert set(texts[10:15]) <= set(near) and set(texts[15:20]) <= set(other)
    assert not any(has_one_of(text, {"dress", "bag"}) for text in texts)


def test_prompts_that_the_tokenizer_must_spell_are_taken_where_no_others_are_left():
    spelled = "a fox in fresh snow"
    known = {*texts_of(DRESS, samples=900)}
    assert spelled not in known and "a photo of a bag" in known
    left = {*texts_of(Concept("a photo of a dress", "a pencil", tuple(known)), samples=900)}
    assert spelled in left and not left & known
    with pytest.raises(UsageError, match="--retain-prompts"):
        texts_of(Concept("a photo of a dress", "a pencil", tuple(TEXTS)), samples=9)


def test_the_word_for_the_anchors_alone_names_no_set():
    assert "anchor" not in prompts.builtin()
    assert prompts_to_retain(find("pocket"), [DRESS, BAG], "anchor", 9) == [(DRESS.anchor, 3.0), (BAG.anchor, 3.0)]
    assert {guidance for _, guidance in prompts_to_retain(find("pocket"), [DRESS], None, 9)} == {3.0}


def test_the_record_says_how_many_images_each_share_has():
    settings = {"samples": 8, "concepts": [DRESS.record()], "retain_weight": 0.5, "retain": None}

    def said(retain_prompts: str | None) -> str:
        return sources_in_words(settings | {"retain_prompts": retain_prompts}, SalUn)["retain"]

    assert re.findall(r"\d+", said(None)) == ["3", "3", "2"]
    assert "anchors" in said("anchor") and "people" in said("people") and not re.search(r"\d", said("anchor"))
