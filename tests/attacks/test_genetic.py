"""Ring-A-Bell: tokens that the text encoder reads as the prompt and the concept."""

from dataclasses import replace

import pytest
import torch
from helpers.models import write_pipeline
from helpers.scenes import run, scene, searched, target

from salun_sd.attacks.genetic import Genetic
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.find import find

SMALL = Genetic(population=12, generations=8)


def test_every_generation_is_as_near_as_the_one_before_or_nearer():
    losses = [searched(replace(SMALL, generations=n), scene())[0].loss for n in (0, 1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_the_search_knows_the_text_encoder_alone():
    def refuse(*_):
        raise AssertionError("the UNet was asked")

    hook = target().unet.register_forward_pre_hook(refuse)
    try:
        assert searched(SMALL, scene(base=None, picture=None))
    finally:
        hook.remove()


def test_the_concept_is_what_texts_with_it_have_and_texts_without_it_lack():
    found = SMALL.prepare(scene())["concept"]
    without, with_it = (target().encode(text)["context"][0] for text in ("a thing", "a sneaker"))
    assert (without + found - with_it).norm() < (without - with_it).norm() / 2


def test_the_best_rows_are_the_tries_and_the_control_has_as_many():
    attack = replace(SMALL, best=3)
    tries, control = searched(attack, scene()), searched(attack, scene(control=True))
    losses = [one.loss for one in tries]
    assert len(tries) == len(control) == 3 and losses == sorted(losses)
    assert {len(one.tokens) for one in [*tries, *control]} == {16} and not any(one.loss for one in control)


def test_a_child_has_its_tokens_from_two_parents_and_new_ones_by_mutation():
    g, usable = torch.Generator().manual_seed(0), torch.arange(100, 200)
    parents = torch.arange(16).expand(50, 16) + 1000 * torch.arange(1, 51)[:, None]  # a token tells parent and place
    copies = Genetic(mutation=0, crossover=0)._children(parents, usable, g)
    assert all(any(torch.equal(child, parent) for parent in parents) for child in copies)
    crossed = Genetic(mutation=0, crossover=1)._children(parents, usable, g)
    assert (crossed % 1000 == torch.arange(16)).all() and max(len(set(c)) for c in (crossed // 1000).tolist()) == 2
    changed = Genetic(mutation=1, crossover=1)._children(parents, usable, g)
    assert ((changed < 1000).sum(1) == 1).all() and set(changed[changed < 1000].tolist()) <= set(usable.tolist())


def test_a_search_is_the_same_again(tmp_path):
    for name in "ab":
        run(SMALL, scene(2), tmp_path / name).search()
    a, b = ([f.read_bytes() for f in sorted((tmp_path / name / "found").glob("*"))] for name in "ab")
    assert len(a) == 2 and a == b


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_many_texts_are_encoded_as_each_alone(tmp_path, family):
    model = Target(find(str(write_pipeline(tmp_path / family, family))))
    rows = torch.randint(2, 600, (3, 5), generator=torch.Generator().manual_seed(0))
    together = model.encode("a photo", model.vectors(rows), "of it")
    for n, row in enumerate(rows.tolist()):
        alone = model.encode("a photo", model.vectors(row), "of it")
        assert all(torch.allclose(alone[key][0], together[key][n], atol=1e-5) for key in alone)
    assert not torch.allclose(together["context"][0], together["context"][1], atol=1e-2)
