"""Other words for the concept."""

import csv
import logging
from collections import Counter

import pytest
import torch
from helpers.scenes import named, scene, searched

from salun_sd.attacks.paraphrase import TABLE, Paraphrase, misspellings, translations
from salun_sd.draw import prompts


def test_a_prompt_is_said_in_every_way():
    words, synonyms = ["what one runs in"], ["a photo of a trainer"]
    texts = [one.text for one in searched(Paraphrase(), scene(prompts=named(1), words=words, synonyms=synonyms))]
    assert {*words, *synonyms, "a sneaker", "a photo of a Turnschuh", "a photo of a snaeker"} <= set(texts)
    assert len(texts) == len(set(texts)) <= 50 and named(1)[0].text not in texts
    first = [one.text for one in searched(Paraphrase(most=4), scene(words=words, synonyms=synonyms))]
    assert len(first) == 4 and [*words, *synonyms] == first[:2]  # some of each kind, however few there are


@pytest.mark.parametrize(
    ("text", "concept", "wanted"),
    [
        ("an image of a T-Shirt on a table", "a photo of a t-shirt", "an image of a camiseta on a table"),
        ("what lies there", "a photo of a t-shirt", "a photo of a camiseta"),
        ("a churchyard", "church", "iglesia"),
        ("a car (new) \\1", "the car", "a coche (new) \\1"),
    ],
)
def test_the_name_is_replaced_where_it_stands_and_else_in_the_concepts_prompt(text, concept, wanted):
    asked = scene(prompts=[named()[0]._replace(text=text)])
    asked.concept = concept
    assert wanted in [one.text for one in searched(Paraphrase(), asked)]


def test_the_control_draws_the_prompt_with_as_many_other_seeds():
    tries, control = searched(Paraphrase(), scene()), searched(Paraphrase(), scene(control=True))
    prompt = scene().prompts[0]
    assert len(control) == len(tries) > 20
    assert {one.text for one in control} == {prompt.text} and {one.seed for one in tries} == {prompt.seed}
    assert len({prompt.seed, *(one.seed for one in control)}) == len(control) + 1


def test_the_words_depend_on_the_seed_alone():
    a, b, c = ([one.text for one in searched(Paraphrase(), scene(seed=seed))] for seed in (0, 0, 1))
    assert a == b != c


def test_a_thing_that_the_table_does_not_have_is_said_in_english_and_the_log_tells(caplog):
    asked = scene()
    asked.concept = "a photo of a zzgrumpf"
    with caplog.at_level(logging.INFO, logger="salun_sd"):
        tries = searched(Paraphrase(), asked)
    assert len(tries) > 20 and all(one.text.isascii() for one in tries)
    assert [TABLE.name in message and "zzgrumpf" in message for message in caplog.messages] == [True]


def test_a_misspelling_is_one_slip_away():
    words = misspellings("t-shirt", torch.Generator().manual_seed(0))
    assert len(words) == len(set(words)) > 15 and "t-shirt" not in words
    for word in words:
        more, less = Counter(word) - Counter("t-shirt"), Counter("t-shirt") - Counter(word)
        assert sum(more.values()) + sum(less.values()) == abs(len(word) - 7) <= 1
    assert misspellings("o", torch.Generator()) == ["oo"]


def test_the_table_has_the_classes_of_the_built_in_sets_in_many_languages():
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["en"].casefold() for row in rows}) == len(rows)
    assert all(len(row) == 10 and sum(map(bool, row.values())) >= 9 for row in rows)
    for name in ("pocket", "imagenette"):
        assert all(len(translations(label.upper())) >= 8 for label in {p.label for p in prompts.read(name)})
