"""What a forecast says of an attack is what the attack does."""

from dataclasses import replace

import pytest
from helpers.scenes import run

from salun_sd.attacks.attack import WITH_GRADIENT
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.effort import effort

SMALL = {
    "prefix": {"timesteps": 2, "steps": 1}, "tokens": {"steps": 2, "every": 1}, "inversion": {"steps": 2},
    "genetic": {"population": 4, "generations": 1}, "conditioning": {"steps": 2}, "continue": {"begun": (2,)},
    "relearn": {"steps": (1, 2)}, "round-trip": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_it_draws_so_many_images_in_so_many_passes(name, tiny, tmp_path):
    attack, passes = ATTACKS[name](**SMALL[name]), []
    hook = tiny.target.unet.register_forward_hook(lambda unet, inputs, output: passes.append(
        len(output.sample) * (WITH_GRADIENT if output.sample.requires_grad else 1)
    ))  # fmt: skip
    on_one = run(attack, replace(tiny, base=tiny.target), tmp_path, steps=1)
    try:
        on_one.search()
        if name == "continue":  # does not draw from the first step
            assert sum(passes) == attack.passes(2)
            return
        lines = on_one.draw() + on_one.fresh(dict.fromkeys([p.case for p in tiny.prompts], 1))
    finally:
        hook.remove()
    assert (len(lines), sum(passes)) == effort(attack, 2, 1, per_pass=32, guided=True, control=False)
