"""What the base began, finished."""

import numpy as np
import pytest
from helpers.by_class import write_ddpm
from helpers.scenes import NAME, named, run, scene, searched
from PIL import Image

from salun_sd.attacks.attack import Scene
from salun_sd.attacks.continued import Continue
from salun_sd.attacks.target import Target
from salun_sd.checkpoint.find import find
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Given, Row, Sampler


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Target, Target]:
    """Two tiny models of classes, with other weights."""
    place = tmp_path_factory.mktemp("two")
    folders = [write_ddpm(place / str(seed), channels=3, seed=seed) for seed in (0, 1)]
    return tuple(Target(find(str(folder))) for folder in folders)


@pytest.mark.slow
def test_each_stage_is_finished_by_the_attacked_model_from_where_the_base_stopped(two, tmp_path):
    erased, base = two
    prompt = Prompt(4, "bag", 7, 3.0, "bag")
    attack, asked = Continue(begun=(50, 48)), Scene(erased, "bag", [prompt], None, base=base)
    on_one = run(attack, asked, tmp_path)
    on_one.search()
    lines = on_one.draw()
    assert [line["k"] for line in lines] == [0, 1, 2] == list(range(len(attack.labels())))
    images = [np.int16(Image.open(tmp_path / line["file"])) for line in lines]
    whole, part = searched(attack, asked)
    row = Row("bag", 7, 3.0, (8, 8))
    (by_base,) = Sampler(base.pipeline, 50, "DDIMScheduler").draw([row], 1)
    (finished,) = Sampler(erased.pipeline, 50, "DDIMScheduler", lambda _: Given(None, part.start, 48)).draw([row], 1)
    assert whole.begins == 50 and (images[1] == np.int16(by_base)).all()
    assert np.abs(images[2] - np.int16(finished)).max() <= 1 and (images[2] != images[1]).any()


def test_the_base_is_asked_for_the_concept_and_the_control_has_other_seeds():
    attack = Continue(begun=(1, 2))
    tries, told = (searched(attack, scene(prompts=p)) for p in (scene().prompts, named(1)))
    assert [one.begins for one in tries] == [1, 2] and NAME not in tries[0].text
    assert all((a.start == b.start).all() for a, b in zip(tries, told, strict=True))  # "a photo of a sneaker" is both's
    control = searched(attack, scene(control=True))
    assert len({one.seed for one in [*tries, *control]}) == 3 and all(one.start is None for one in control)
