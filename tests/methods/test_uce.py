"""UCE: the solution of its equation, on all of a matrix or on some of it."""

import pytest
import torch

from salun_sd.core.mask import Bits
from salun_sd.methods.uce import UCE, edited, last_tokens

OUT, IN, K, P = 7, 12, 3, 2
SCALES = {"erase_scale": 1.5, "preserve_scale": 0.7, "ridge": 0.5}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem():
    """A matrix [out, in], concepts and anchors [K, in], preserved prompts [P, in]."""
    return normal(OUT, IN, seed=1), normal(K, IN, seed=2), normal(K, IN, seed=3), normal(P, IN, seed=4)


def free_entries(kind):
    """All, some of each row, or all of some rows and none of the others."""
    some = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(5)) < 0.4
    rows = torch.stack([torch.full((IN,), i % 3 == 0) for i in range(OUT)])
    return {"all": torch.ones(OUT, IN, dtype=torch.bool), "some": some, "rows": rows}[kind]


def solved(problem, free=None, **scales):
    w, *embeddings = problem
    return edited(w, torch.ones_like(w, dtype=torch.bool) if free is None else free, *embeddings, **SCALES | scales)


def test_on_the_whole_matrix_it_is_the_published_formula(problem):
    w, c, a, p = problem
    wanted = 0.5 * w + 1.5 * (w @ a.T) @ c + 0.7 * (w @ p.T) @ p
    system = 0.5 * torch.eye(IN, dtype=torch.float64) + 1.5 * c.T @ c + 0.7 * p.T @ p
    torch.testing.assert_close(solved(problem), wanted @ system.inverse(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["all", "some", "rows"])
@pytest.mark.parametrize("many", [False, True])
def test_the_gradient_of_its_objective_is_zero_in_every_free_entry_and_the_others_stay(problem, kind, many):
    """Also where there are more prompts than inputs. Before it is solved, the gradient is not zero."""
    w, c, a, p = problem
    p = normal(3 * IN, IN, seed=6) if many else p
    free = free_entries(kind)
    new = edited(w, free, c, a, p, **SCALES)

    def gradient(at):
        at = at.clone().requires_grad_()
        objective = (1.5 * (at @ c.T - w @ a.T).square().sum() + 0.7 * ((at - w) @ p.T).square().sum()
                     + 0.5 * (at - w).square().sum())  # fmt: skip
        return torch.autograd.grad(objective, at)[0][free]

    assert gradient(new).norm() < 1e-9 * gradient(w).norm()
    assert torch.equal(new[~free], w[~free]) and not torch.equal(new[free], w[free])


def test_a_concept_that_is_its_own_anchor_changes_nothing(problem):
    w, c, _, p = problem
    assert torch.equal(solved((w, c, c, p)), w)


def test_the_outputs_of_preserved_prompts_move_less_the_more_they_weigh_and_in_the_end_not_at_all(problem):
    w, *_, p = problem
    moved = [((solved(problem, preserve_scale=s) - w) @ p.T).norm().item() for s in (0, 1, 100, 1e6)]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 1e-5 < 0.1 < moved[0]


def test_the_concepts_outputs_go_to_the_anchors_as_their_scale_grows(problem):
    w, c, a, _ = problem
    left = [(solved(problem, erase_scale=s) @ c.T - w @ a.T).norm().item() for s in (0, 1, 100, 1e6)]
    assert left == sorted(left, reverse=True) and left[-1] < 1e-5 < 0.1 < left[0]


def test_two_concepts_are_one_problem_and_not_one_after_the_other(problem):
    w, c, a, p = problem
    reverse = solved((w, c.flip(0), a.flip(0), p))
    in_turn = w
    for n in range(K):
        in_turn = solved((in_turn, c[n : n + 1], a[n : n + 1], p))
    torch.testing.assert_close(solved(problem), reverse, rtol=1e-9, atol=1e-12)
    assert (in_turn - reverse).norm() > 0.01


def test_prompts_of_one_embedding_are_solved_together(problem):
    """Two prompts that look the same weigh as one of twice the scale. Without the ridge there would be no solution."""
    w, c, a, p = problem
    twice = solved((w, c.repeat(2, 1), a.repeat(2, 1), p[:0]))
    torch.testing.assert_close(twice, solved((w, c, a, p[:0]), erase_scale=3.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, -0.5, 1e-9, float("nan")])
def test_a_ridge_that_leaves_no_solution_is_refused(ridge):
    with pytest.raises(ValueError, match="ridge"):
        UCE(ridge=ridge)


def test_each_matrix_gives_the_values_of_its_own_entries_of_the_mask(problem):
    """In half precision, too; a matrix without such entries gives none."""
    w, *embeddings = problem
    weights = {"k": w.half(), "v": 2 * w.half(), "other": w.half()}
    free = {"k": free_entries("some"), "v": free_entries("all"), "other": torch.zeros_like(w, dtype=torch.bool)}
    bits = Bits.of((free | {"not a key": torch.ones(3, dtype=torch.bool)}).items())
    values = dict(UCE(**SCALES).solve(weights, bits, *(e.float() for e in embeddings)))
    assert {name: (v.dtype, len(v)) for name, v in values.items()} == {
        name: (torch.float32, int(free[name].sum())) for name in ("k", "v")
    }
    for name, v in values.items():
        whole = edited(weights[name], free[name], *(e.float() for e in embeddings), **SCALES)
        assert torch.equal(v, whole[free[name]].float())


def test_the_last_token_is_that_of_the_last_word_that_is_read(pocket):
    """Of "" it is the token that begins it."""
    tokenizer = pocket.tokenizer
    texts = ["", "sneaker", "a photo of a sneaker", "sneaker " * 100]
    length, word = tokenizer.model_max_length, tokenizer("sneaker").input_ids[-2]
    places = last_tokens(tokenizer, texts)
    assert places.tolist() == [0, 1, 5, length - 2]
    ids = tokenizer(texts, truncation=True, max_length=length).input_ids
    assert [of[place] for of, place in zip(ids, places, strict=True)] == [tokenizer.bos_token_id, *[word] * 3]
