"""What an erasure trains and with which numbers."""

from dataclasses import fields

import pytest

from salun_sd.edit.recipes import recipe_of
from salun_sd.errors import UsageError
from salun_sd.methods.catalog import METHODS
from salun_sd.methods.names import SUMMARIES


def test_every_method_has_a_line_in_the_help():
    assert list(METHODS) == list(SUMMARIES)


@pytest.mark.parametrize("name", METHODS)
def test_the_papers_recipe_is_what_was_published(name):
    recipe = recipe_of(name, "paper", None, {})
    assert recipe.values | METHODS[name].published == recipe.values
    assert recipe.method == METHODS[name]()
    if recipe.retain:
        assert recipe.retain.target == "noise"
        assert recipe.values["retain_prompts"] == ("anchor" if recipe.method.needs_anchor else None)
        assert recipe.values["probe_every"] == 0


def test_what_is_typed_comes_before_the_recipe_and_the_recipe_before_ours():
    ours, paper = recipe_of("salun", None, None, {}), recipe_of("salun", "paper", None, {})
    typed = recipe_of("salun", "paper", None, {"retain_weight": 3.0, "retain_target": "base", "lr": None})
    assert (ours.retain.target, paper.retain.target, typed.retain) == ("base", "noise", (3.0, "base"))
    assert typed.values["lr"] == paper.values["lr"] == 1e-5
    assert ours.retain.weight != paper.retain.weight == 0.5


def test_a_methods_own_settings_are_texts_or_a_table():
    texts = recipe_of("esd", None, ["scale=3", "start_guidance=2.5"], {})
    table = recipe_of("esd", None, {"scale": 3, "start_guidance": 2.5}, {})
    assert texts == table and texts.record()["setting"] == {"scale": 3.0, "start_guidance": 2.5}
    assert recipe_of("ablation", None, ["target=noise"], {"anchor_from": "base"}).method.anchor_from == "base"


WRONG = {
    "an unknown method": (("sulan", None, None, {}), "--method sulan " + " ".join(METHODS)),
    "an unknown recipe": (("salun", "mine", None, {}), "--recipe mine paper"),
    "an unknown setting": (("esd", None, ["eta=1"], {}), "eta esd scale start_guidance"),
    "a setting of a method that has none": (("ascent", None, ["scale=1"], {}), "scale ascent"),
    "a word in place of a number": (("esd", None, ["scale=much"], {}), "scale esd much"),
    "a number in place of a word": (("ablation", None, ["target=1"], {}), "target ablation anchor noise"),
    "an unknown word": (("ablation", None, ["target=nothing"], {}), "target nothing anchor noise"),
    "a number out of range": (("uce", None, ["ridge=-1"], {}), "ridge uce"),
    "a number that this method does not take": (("uce", None, ["ridge=0"], {}), "ridge uce"),
    "no value": (("esd", None, ["scale"], {}), "scale NAME=VALUE"),
    "a setting twice": (("esd", None, ["scale=1", "scale=2"], {}), "scale twice"),
    "anchor_from of a method without": (("ascent", None, None, {"anchor_from": "base"}), "--anchor-from ascent"),
    "steps without a loop": (("uce", None, None, {"steps": 3}), "--steps uce"),
    "a retain weight without a loop": (("uce", None, None, {"retain_weight": 0.5}), "--retain-weight uce"),
    "a size where no mask is computed": (("uce", None, None, {"size": 64}), "--size uce"),
    "a setting twice, once as an option": (
        ("salun", None, ["anchor_from=base"], {"anchor_from": "base"}),
        "--anchor-from --setting",
    ),
    "a stop that nothing measures": (("salun", "paper", None, {"until": 0.9}), "--until --probe-every"),
    "a stop where no concept moves": (("finetune", None, None, {"until": 0.9}), "--until finetune"),
    "a join of one gradient": (("erasediff", None, None, {"retain_weight": 0.0}), "erasediff --retain-weight"),
    "no images at all": (("finetune", None, None, {"retain_weight": 0.0}), "finetune --retain-weight"),
    "no images at all, as published": (("finetune", "paper", None, {"retain_weight": 0}), "finetune --retain-weight"),
    "nothing to learn": (("finetune", None, None, {"retain_target": "base"}), "finetune --retain-target base"),
    "a batch where no mask is computed": (("uce", None, None, {"batch_size": 4}), "--batch-size uce"),
    "retain prompts at weight 0": (("esd", None, None, {"retain_prompts": "x"}), "--retain-prompts --retain-weight"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_what_a_method_has_no_use_for_is_refused_by_name(arguments, words):
    with pytest.raises(UsageError) as caught:
        recipe_of(*arguments)
    assert all(word in str(caught.value) for word in words.split())


@pytest.mark.parametrize("given", [
    {"forget": "photos", "density": 0.3}, {"forget": "photos", "mask": "salient:0.3"},
    {"retain_prompts": "pocket", "retain_weight": 0.5}, {"parts": 1, "save_every": 10, "sample_every": 0},
])  # fmt: skip
def test_what_is_of_use_after_all_is_taken(given):
    recipe_of("esd", None, None, given)
    recipe_of("uce", None, None, {"batch_size": 4, "density": 0.5, "parts": 1, "save_every": 10, "sample_every": 0})


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_every_method_can_be_written_and_read_again(name):
    record = recipe_of(name, None, None, {}).record()
    assert record["method"] == name and record["setting"].keys() == {f.name for f in fields(METHODS[name])}
    assert recipe_of(name, None, record["setting"], {}).record() == record
