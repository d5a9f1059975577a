"""P4D: tokens whose prediction is the base's for the concept."""

import pytest
import torch
from helpers.scenes import named, run, scene, searched, target

from salun_sd.attacks.tokens import FREE, Tokens, nearest, normal
from salun_sd.core import diffusion

FEW = {"steps": 8, "every": 4}


def distance(tokens: tuple[int, ...]) -> float:
    """From the base's prediction for the concept, at noise levels that no search saw."""
    t, x_t = torch.arange(50, 1000, 100), torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, base = (
            target().predict(x_t, t, c) for c in (target().with_tokens(tokens, ""), target().encode("a sneaker"))
        )
    return diffusion.mse(ours, base).mean().item()


@pytest.mark.parametrize("kind", ["N", "K"])
def test_the_search_comes_nearer_to_the_base_than_random_tokens(kind):
    attack = Tokens(kind, **FEW)
    tries, control = searched(attack, scene()), searched(attack, scene(control=True))
    assert len(tries) == len(control) == 2
    assert min(distance(one.tokens) for one in tries) < min(distance(one.tokens) for one in control)
    assert all(one.loss > 0 for one in tries) and not any(one.loss for one in control)


def test_a_search_is_the_same_again_and_another_with_another_seed(tmp_path):
    attack, content = Tokens(steps=2, every=1), {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(attack, scene(2, seed=seed), tmp_path / name).search()
        content[name] = [file.read_bytes() for file in sorted((tmp_path / name / "found").glob("*"))]
    assert len(content["a"]) == 2 and content["a"] == content["b"] != content["c"]


def test_a_free_token_follows_every_third_of_the_prompt():
    prompt, ids = named()[0], target().ids(named()[0].text)
    row = Tokens("K").row(target(), prompt)
    assert [n for n in row if n != FREE] == ids
    places = [n for n, token in enumerate(row) if token == FREE]
    assert places == [*range(3, len(row) - 1, 4), len(row) - 1]
    (one,) = searched(Tokens("K", steps=1, every=1), scene(prompts=[prompt]))
    assert all(a == b for a, b in zip(one.tokens, row, strict=True) if b != FREE) and FREE not in one.tokens


def test_the_base_is_asked_for_the_prompt_or_for_the_concept_where_the_prompt_lacks_its_class():
    prompt = named(2)[1]
    asked = [scene().asked(p) for p in (prompt, scene(2).prompts[1], prompt._replace(text="x", label=None))]
    assert asked == [prompt.text, scene().concept, "x"]


def test_the_nearest_token_has_the_smallest_angle_and_is_never_a_special_one():
    usable, tables = target().words(), normal(target(), target().words())
    (vectors,) = target().vectors([5, 77])
    assert usable[nearest([vectors * 100], tables)].tolist() == [5, 77]
    (special,) = target().vectors(target().tokenizer.all_special_ids)
    assert set(usable[nearest([special], tables)].tolist()).isdisjoint(target().tokenizer.all_special_ids)


def test_a_prompt_that_leaves_no_room_loses_its_end():
    long = named()[0]._replace(text="a photo of a sneaker on a table in a house")
    row = Tokens("K", spacing=1).row(target(), long)
    assert len(row) == target().places < 2 * len(target().ids(long.text)) and row.count(FREE) == len(row) // 2
    assert [n for n in row if n != FREE] == target().ids(long.text)[: len(row) // 2]
    target().with_tokens([0 if n == FREE else n for n in row], "")  # raises where it does not fit
