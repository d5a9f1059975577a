"""One attack on one model: it goes on where it was stopped, and draws what it found with other seeds."""

import pytest
from helpers.scenes import NAME, run, scene
from PIL import Image

from salun_sd.attacks.genetic import Genetic
from salun_sd.draw.generate import PROVENANCE
from salun_sd.errors import UsageError

SMALL = Genetic(population=6, generations=2)


def found(attack) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (attack.out / "found").iterdir()}


def test_a_search_that_lost_a_file_or_has_a_damaged_one_is_done_again_to_the_same_bytes(tmp_path, caplog):
    attack = run(SMALL, scene(2), tmp_path)
    attack.search()
    before = found(attack)
    first, second = sorted(attack.out.glob("found/*"))
    first.write_bytes(first.read_bytes()[:-9])
    second.unlink()
    run(SMALL, scene(2), tmp_path).search()
    assert found(attack) == before and first.name in caplog.text


def test_fresh_images_are_of_the_chosen_try_and_of_seeds_that_no_try_has(tmp_path):
    attack = run(SMALL, scene(2), tmp_path, steps=2)
    attack.search()
    tries, fresh = attack.draw(), attack.fresh({prompt.case: 1 for prompt in attack.scene.prompts})
    assert {line["seed"] for line in fresh}.isdisjoint(line["seed"] for line in tries)
    of_tries = {line["case"]: line["prompt"] for line in tries if line["k"] == 1}
    assert [line["prompt"] for line in fresh] == [of_tries[line["case"]] for line in fresh]
    with Image.open(attack.out / "fresh" / fresh[0]["file"]) as image:
        assert str(fresh[0]["seed"]) in image.info[PROVENANCE]


def test_a_folder_of_another_search_is_refused(tmp_path):
    run(SMALL, scene(), tmp_path).search()
    for other in (run(Genetic(population=8, generations=2), scene(), tmp_path), run(SMALL, scene(seed=1), tmp_path)):
        with pytest.raises(UsageError, match=str(tmp_path)):
            other.search()


def test_no_prompt_of_the_scene_names_the_concept():
    assert all(NAME not in prompt.text for prompt in scene(3).prompts)
