"""What a forecast says of an attack is what the attack does."""

import sys
from dataclasses import replace

import pytest
from helpers.scenes import run

from salun_sd.attacks import kept
from salun_sd.attacks.attack import WITH_GRADIENT
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.effort import effort
from salun_sd.attacks.target import Target
from salun_sd.draw import generate

SMALL = {
    "prefix": {"timesteps": 2, "steps": 1}, "tokens": {"steps": 2, "every": 1}, "inversion": {"steps": 2},
    "genetic": {"population": 4, "generations": 1}, "conditioning": {"steps": 2}, "continue": {"begun": (1, 3)},
    "latent": {}, "relearn": {"steps": (1, 2)}, "round-trip": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_it_draws_so_many_images_in_so_many_passes(name, tiny, tmp_path, monkeypatch):
    if ATTACKS[name].drawing:  # in steps of its own: fewer
        monkeypatch.setattr(sys.modules[ATTACKS[name].__module__], "STEPS", 4)
        monkeypatch.setattr(ATTACKS[name], "drawing", ("DDIMScheduler", 4))
    attack, passes = ATTACKS[name](**SMALL[name]), []
    hook = tiny.target.unet.register_forward_hook(lambda unet, inputs, output: passes.append(
        len(output.sample) * (WITH_GRADIENT if output.sample.requires_grad else 1)
    ))  # fmt: skip
    on_one = run(attack, replace(tiny, base=tiny.target), tmp_path, steps=1)
    expected = effort(on_one, per_pass=32, guided=True)
    try:
        on_one.search()
        lines = on_one.draw() + on_one.fresh(dict.fromkeys([p.case for p in tiny.prompts], 1))
    finally:
        hook.remove()
    assert (len(lines), sum(passes), len(lines)) == expected
    assert effort(on_one, per_pass=32, guided=True) == (0, 0, len(lines))


def test_what_is_on_the_disk_is_not_left(tiny, tmp_path):
    attack = ATTACKS["prefix"](**SMALL["prefix"])
    on_one = run(attack, tiny, tmp_path, steps=1)
    whole = on_one.left()
    assert whole == (True, 2, [2, 4, 6], 12)
    on_one.search()
    assert on_one.left() == (False, 0, [2, 4, 6], 12)
    [first, second] = tiny.prompts
    kept.file_of(tmp_path, first.case).write_bytes(b"cut short")  # is searched for again
    assert on_one.left() == (False, 1, [2, 4, 6], 12)
    on_one.search()
    on_one.draw()
    (tmp_path / generate.file_of(second, 1)).unlink()
    assert on_one.left() == (False, 0, [0, 1, 6], 12)


def test_a_fine_tuning_that_was_stopped_is_left_whole_and_other_tries_as_many_as_were_found(tiny, tmp_path):
    tuned = run(attack := ATTACKS["relearn"](**SMALL["relearn"]), tiny, tmp_path / "tuned", steps=1)
    tuned.search()
    tuned.draw()
    assert effort(tuned, per_pass=1, guided=False) == (0, 0, 6)
    (tmp_path / "tuned" / generate.file_of(tiny.prompts[0], 2)).unlink()
    assert effort(tuned, per_pass=1, guided=False) == (1, 1 + attack.passes(2), 6)
    words = run(ATTACKS["paraphrase"](most=500), tiny, tmp_path / "words", steps=1)
    expected = words.left().images
    words.search()
    assert words.left().images < expected == 2 * (1 + 500 + 3)
    longer = run(ATTACKS["paraphrase"](most=1), replace(tiny, words=["a", "b", "c"]), tmp_path / "longer", steps=1)
    assert longer.left().batches == [2, 2 * 3, 2 * 3]


def test_an_attack_on_what_is_there_loads_no_model(tiny, tmp_path):
    attack, again = ATTACKS["round-trip"](), replace(tiny, target=Target(tiny.target.model))
    for scene in (tiny, again):
        on_one = run(attack, scene, tmp_path, steps=1)
        on_one.search()
        on_one.draw()
    assert "pipeline" not in vars(again.target)
