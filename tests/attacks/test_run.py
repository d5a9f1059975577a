"""One attack on one model: it goes on where it was stopped, and draws what it found with other seeds."""

import pytest
from helpers.scenes import NAME, run, scene
from PIL import Image

from salun_sd.attacks import kept
from salun_sd.attacks.attack import Attack, Try
from salun_sd.attacks.genetic import Genetic
from salun_sd.draw.generate import PROVENANCE
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.files import new_file

SMALL = Genetic(population=6, generations=2)


class Two(Attack):
    """Two prompts, whatever is asked for."""

    def tries(self, scene, prompt, found):
        return [Try("a bag", prompt.seed), Try("a coat", prompt.seed)]


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


def test_tries_that_lack_something_are_searched_for_again_and_settings_say_what_to_do(tmp_path, caplog):
    attack = run(SMALL, scene(1), tmp_path)
    attack.search()
    before, (file,) = found(attack), attack.out.glob("found/*")
    for metadata in ({}, {"tries": '[{"text": "a bag"}]'}, {"tries": '[{"seed": "1"}]'}):
        kept.save_tensors(file, {}, metadata)
        assert run(SMALL, scene(1), tmp_path).left().prompts == 1
        run(SMALL, scene(1), tmp_path).search()
        assert found(attack) == before and file.name in caplog.text
    settings = attack.out / "settings.json"
    settings.write_text(settings.read_text()[:-9])
    with pytest.raises(SalunError, match=f"settings.json is damaged.* Remove {attack.out}, or give another --out"):
        run(SMALL, scene(1), tmp_path).search()


def test_fresh_images_are_of_the_chosen_try_and_of_seeds_that_no_try_has(tmp_path):
    attack = run(SMALL, scene(2), tmp_path, steps=2)
    attack.search()
    tries, fresh = attack.draw(), attack.fresh({prompt.case: 1 for prompt in attack.scene.prompts})
    assert {line["seed"] for line in fresh}.isdisjoint(line["seed"] for line in tries)
    of_tries = {line["case"]: line["prompt"] for line in tries if line["k"] == 1}
    assert [line["prompt"] for line in fresh] == [of_tries[line["case"]] for line in fresh]
    with Image.open(attack.out / "fresh" / fresh[0]["file"]) as image:
        assert str(fresh[0]["seed"]) in image.info[PROVENANCE]


def test_a_try_that_another_judge_chose_is_drawn_with_the_fresh_seeds_in_place_of_the_first(tmp_path):
    attack = run(Two(), scene(1), tmp_path, steps=1)
    attack.search()
    [case] = (prompt.case for prompt in attack.scene.prompts)
    for k in (1, 2, 1):
        for line in attack.fresh({case: k}):
            with Image.open(attack.out / "fresh" / line["file"]) as image:
                assert image.info[PROVENANCE].endswith(attack.tries(case)[k - 1].text)


def test_what_killed_searches_left_is_removed_and_what_others_write_is_not(tmp_path):
    attack = run(SMALL, scene(1), tmp_path)
    (case,) = (prompt.case for prompt in attack.scene.prompts)
    left = [f"found/.{case}.safetensors.0123456789abcdef.partial", ".found.safetensors.0123456789abcdef.partial"]
    (tmp_path / "found").mkdir()
    for name in (*left, *(f"{name}-lock" for name in left)):
        (tmp_path / name).touch()
    with new_file(tmp_path / "found" / "9.safetensors") as partial:
        partial.touch()
        attack.search()
        assert [file for file in tmp_path.rglob(".*partial*") if "/.9." not in str(file)] == [] and partial.exists()


def test_a_folder_of_another_search_is_refused(tmp_path):
    run(SMALL, scene(), tmp_path).search()
    for other in (run(Genetic(population=8, generations=2), scene(), tmp_path), run(SMALL, scene(seed=1), tmp_path)):
        with pytest.raises(UsageError, match=str(tmp_path)):
            other.search()


def test_no_prompt_of_the_scene_names_the_concept():
    assert all(NAME not in prompt.text for prompt in scene(3).prompts)
