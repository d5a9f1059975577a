import numpy as np
import pytest
import torch
from helpers.pictures import classifier, pictures

from salun_sd.classifier.data import Part
from salun_sd.classifier.measure import Answers, answers, attack, gap, metrics, summary
from salun_sd.runtime.finite import NotFinite

RNG = np.random.default_rng(0)


def test_answers_are_those_of_the_model_and_do_not_depend_on_the_batch():
    own, part = classifier(), Part(pictures().train, torch.arange(30, 70))
    result, small = answers(own, part), answers(own, part, size=7)
    with torch.no_grad():
        shares = own.net.eval()(pixel_values=part.images.pixels[30:70].float() / 127.5 - 1).logits.softmax(1)
    assert np.allclose(result.confidence, shares.gather(1, part.labels[:, None])[:, 0], atol=1e-6)
    assert np.allclose(result.entropy, -(shares * shares.log()).sum(1), atol=1e-5)
    assert (result.correct == (shares.argmax(1) == part.labels).float().numpy()).all()
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(result, small, strict=True))


def test_pixels_are_normalised_where_the_image_processor_does_so():
    own, pixels = classifier(), torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(own(pixels), own.net(2 * pixels - 1).logits, atol=1e-5)
        own.processor.do_normalize = False
        assert torch.equal(own.copy()(pixels), own.net(pixels).logits)


def test_a_model_that_answers_with_nan_is_an_error():
    own = classifier()
    next(own.net.parameters()).data[0] = torch.nan
    with pytest.raises(NotFinite):
        answers(own, Part(pictures().train, torch.arange(4)))


def test_the_attack_tells_members_from_others_and_takes_forgotten_images_for_either():
    members, others = RNG.uniform(0.9, 1, 300), RNG.uniform(0, 0.4, 300)
    assert attack(members, others, RNG.uniform(0.9, 1, 50), 0) == 0
    assert attack(members, others, RNG.uniform(0, 0.4, 50), 0) == 100
    assert attack(members, others, np.concatenate([members[:30], others[:10]]), 0) == 25
    assert attack(np.ones(5), np.ones(5), np.ones(5), 0) == 0


def test_metrics_are_in_percent_and_the_gap_is_their_mean_distance():
    def of(correct, total):
        right = np.arange(total) < correct
        return Answers(np.where(right, 0.9, 0.1), np.where(right, 0.1, 0.9), right.astype(np.float32))

    values = metrics(of(3, 10), of(38, 40), of(15, 20), seed=0)
    assert (values["ua"], values["ra"], values["ta"]) == pytest.approx((70, 95, 75))
    exact = {"ua": 60, "ra": 100, "ta": 77, "mia": values["mia"] + 4}
    assert gap(values, exact) == pytest.approx((10 + 5 + 2 + 4) / 4)


def test_a_summary_over_seeds_has_students_interval():
    three = summary([1.0, 2.0, 3.0])
    assert (three["mean"], three["sd"]) == (2, 1)
    assert three["ci95"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5], abs=1e-5)
    assert summary([5.0]) == {"mean": 5, "sd": None, "ci95": None, "values": [5.0]}
