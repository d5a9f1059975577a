"""What the probe measures, and which images it keeps from the training."""

from copy import deepcopy

import pytest
import torch

from salun_sd.core.diffusion import Examples, predict
from salun_sd.methods.batches import Training
from salun_sd.methods.probe import RETAIN, Probe, points_of, split
from salun_sd.runtime.finite import NotFinite


def examples(which, contexts=None) -> Examples:
    latents = torch.randn(len(which), 4, 8, 8, generator=torch.Generator().manual_seed(len(which)))
    return Examples(latents, contexts or {}, torch.as_tensor(which))


@pytest.fixture
def training(schedule, forget):
    """Two concepts, both towards row 2, with no images to retain yet."""
    return Training(schedule, forget, None, torch.arange(10) // 7, torch.full((10,), 2), empty=0)


@pytest.fixture
def held(contexts):
    """Retain images of the rows 0 and 2, so that none has the concept's prompt."""
    return examples([0, 2, 2], contexts)


def worn(unet, amount=0.02):
    """The model after some training."""
    other = deepcopy(unet)
    with torch.no_grad():
        for n, p in enumerate(other.parameters()):
            p += amount * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    return other


def test_untouched_nothing_moved_and_later_it_is_the_formula(fresh_unet, training, held):
    points = points_of(training, held, seed=3)
    probe = Probe(fresh_unet, points, size=5)
    assert probe(fresh_unet) == ({0: 0.0, 1: 0.0}, 0.0)
    moved, drift = probe(worn(fresh_unet))
    with torch.no_grad():
        after, before, anchor_after, anchor_before = (
            predict(unet, points.x_t, points.t, prompts)
            for prompts in (points.prompt, points.goal) for unet in (worn(fresh_unet), fresh_unet)
        )  # fmt: skip
    for c in (0, 1):
        of = points.concept == c
        left = (after - anchor_after)[of].square().sum() / (before - anchor_before)[of].square().sum()
        assert moved[c] == pytest.approx(1 - left.item(), rel=1e-3, abs=1e-4)
    of = points.concept == RETAIN
    assert drift == pytest.approx(((after - before)[of].square().sum() / before[of].square().sum()).item(), rel=1e-3)
    assert drift > 0 and len({*moved.values(), 0.0, drift}) == 4


def test_a_goal_that_is_kept_is_the_anchors_prediction_before_training(fresh_unet, training, held):
    points, after = points_of(training, held, seed=3), worn(fresh_unet)
    probe = Probe(fresh_unet, points, size=5, keeps_goals=True)
    assert probe(fresh_unet) == ({0: 0.0, 1: 0.0}, 0.0)
    moved, drift = probe(after)
    with torch.no_grad():
        now, before = (predict(unet, points.x_t, points.t, points.prompt) for unet in (after, fresh_unet))
        goal = predict(fresh_unet, points.x_t, points.t, points.goal)
    for c in (0, 1):
        of = points.concept == c
        left = (now - goal)[of].square().sum() / (before - goal)[of].square().sum()
        assert moved[c] == pytest.approx(1 - left.item(), rel=1e-3, abs=1e-4)
    theirs = Probe(fresh_unet, points, size=5)(after)
    assert drift == theirs.drift and all(moved[c] != pytest.approx(theirs.moved[c], rel=0.01) for c in (0, 1))


def test_a_model_that_takes_the_concept_for_its_anchor_moved_all_the_way(fresh_unet, training, held, contexts):
    probe = Probe(fresh_unet, points_of(training, held, seed=3), size=8)
    _, concept, anchor = contexts["context"]

    def swap(module, args, kwargs):
        rows = kwargs["encoder_hidden_states"]
        is_concept = (rows == concept).all(dim=(1, 2), keepdim=True)
        return args, kwargs | {"encoder_hidden_states": torch.where(is_concept, anchor, rows)}

    with fresh_unet.register_forward_pre_hook(swap, with_kwargs=True):
        moved, drift = probe(fresh_unet)
    assert list(moved.values()) == pytest.approx([1, 1]) and drift == pytest.approx(0, abs=1e-9)


def test_without_an_anchor_the_goal_is_no_prompt_at_all(training, held, contexts):
    points = points_of(training._replace(anchors=None), held, 0)
    of_concepts = points.concept != RETAIN
    assert torch.equal(points.goal["context"][of_concepts], contexts["context"][:1].expand(8, -1, -1))
    assert torch.equal(points.goal["context"][~of_concepts], points.prompt["context"][~of_concepts])
    without = training._replace(anchors=None, empty=None)  # nor a prediction for none
    assert set(points_of(without, held, 0).concept.tolist()) == {RETAIN} and points_of(without, None, 0) is None


def test_a_concept_that_the_base_takes_for_its_anchor_has_no_measure(fresh_unet, training):
    measure = Probe(fresh_unet, points_of(training._replace(anchors=torch.ones(10).long()), None, 0), 8)(fresh_unet)
    assert measure == ({0: None, 1: None}, None) and not measure.reached(0.1)


def test_points_are_few_spread_over_the_timesteps_and_a_function_of_the_seed(training, held, schedule, contexts):
    points = points_of(training, held, seed=1)
    assert points.concept.tolist() == [0] * 4 + [1] * 4 + [RETAIN] * 8
    assert points.t.tolist() == [125, 375, 625, 875] * 2 + list(range(62, 1000, 125))
    again, other = points_of(training, held, seed=1), points_of(training, held, seed=2)
    assert torch.equal(points.x_t, again.x_t) and not (points.x_t == other.x_t).any()
    many = Training(schedule, examples([1] * 40, contexts), None, torch.arange(40) // 2, torch.full((40,), 2))
    assert len(points_of(many, None, 0).t) == 20  # each of twenty concepts has one
    assert points_of(training._replace(forget=None), None, 0) is None


def test_images_that_are_noisy_already_keep_their_timestep(training):
    times = torch.arange(10) * 7
    points = points_of(training._replace(times=times), None, 0)
    places = [int((training.forget.latents == x).all(dim=(1, 2, 3)).nonzero()) for x in points.x_t]
    assert points.t.tolist() == times[places].tolist()


def test_a_prediction_that_is_not_finite_is_no_measure(fresh_unet, training):
    points = points_of(training, None, 0)
    probe, broken = Probe(fresh_unet, points, 8), worn(fresh_unet, float("nan"))
    with pytest.raises(NotFinite):
        probe(broken)
    with pytest.raises(NotFinite, match="here/base"):
        Probe(broken, points, 8, "here/base")


WHICH = {
    "many prompts": list(range(40)) * 3,
    "one with many images": [7] * 90 + list(range(30)),
    "few prompts": [0, 1] * 30,
    "few images": [0, 1, 2] * 3,
    "none to spare": [0, 1] * 3,
}


@pytest.mark.parametrize("which", WHICH.values(), ids=WHICH)
def test_what_is_held_out_is_in_no_batch_and_is_little(which):
    retain = examples(which)
    trained, held = split(retain)
    rows = {tuple(x.flatten().tolist()) for x in trained.latents}
    assert len(rows) == len(trained) and len(trained) + len(held or ()) == len(retain)
    assert not rows & {tuple(x.flatten().tolist()) for x in (held.latents if held else ())}
    assert (held is None) == (len(retain) < 8) and len(held or ()) <= len(retain) / 8
    if len(set(which)) > 16:
        assert not set(trained.which.tolist()) & set(held.which.tolist())  # whole prompts


def test_a_prompt_that_many_images_show_is_trained_on_and_the_rows_order_does_not_matter():
    which = torch.tensor(WHICH["one with many images"])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    one, other = split(examples(which))[1], split(examples(order[which]))[1]
    assert 7 not in one.which and torch.equal(one.latents, other.latents)
