"""UnlearnDiffAtk: tokens before the prompt, by projected gradient."""

from dataclasses import replace

import torch
from helpers.scenes import named, scene, searched, target

from salun_sd.attacks.prefix import Prefix, evenly, onto_simplex

SMALL = Prefix(timesteps=2, steps=2)


def test_a_row_becomes_the_nearest_one_of_the_simplex():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 2
    projected = onto_simplex(rows)
    assert torch.allclose(projected.sum(1), torch.ones(5)) and (projected >= 0).all()
    others = torch.rand(1000, 7, generator=torch.Generator().manual_seed(1))
    others /= others.sum(1, keepdim=True)
    assert (torch.cdist(rows, others).amin(1) >= (rows - projected).norm(dim=1) - 1e-6).all()
    assert torch.allclose(onto_simplex(projected), projected, atol=1e-6)


def test_a_try_for_each_level_of_usable_tokens_and_the_control_has_as_many():
    found, by_chance = searched(SMALL, scene()), searched(SMALL, scene(control=True))
    assert len(found) == len(by_chance) == SMALL.timesteps
    assert {len(one.tokens) for one in (*found, *by_chance)} == {SMALL.count}
    assert not set(target().tokenizer.all_special_ids) & {token for one in found for token in one.tokens}
    assert [one.loss is None for one in (*found, *by_chance)] == [False, False, True, True]
    assert searched(SMALL, scene()) == found != searched(SMALL, scene(seed=1))


def test_a_model_of_few_timesteps_has_as_many_levels():
    assert evenly(5, 1000) == [100, 300, 500, 700, 900] and evenly(4, 2) == [0, 0, 1, 1]


def test_a_prompt_that_leaves_no_room_loses_its_end():
    words = "a photo of a thing on a black background "
    [prompt] = [named(1)[0]._replace(text=words * 5)]
    [first, _] = searched(replace(SMALL, count=4), scene(prompts=[prompt]))
    assert words.strip().startswith(first.text[:20]) and len(first.text) < len(prompt.text)
    assert len(target().ids(first.text)) <= target().tokenizer.model_max_length - 2 - 4
    target().with_tokens(first.tokens, first.text)  # raises where it does not fit
