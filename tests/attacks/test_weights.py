"""Attacks on the weights: each stage is another model, and in the end the model is what it was, to the last bit."""

from dataclasses import replace

import pytest
import torch

from salun_sd.attacks.catalog import ATTACKS
from salun_sd.attacks.run import Run
from salun_sd.draw.generate import seed_of

SMALL = {
    "relearn": {"steps": (1, 3), "lr": 1e-3, "batch_size": 1},
    "relearn-lora": {"steps": (1, 3), "lr": 1e-2, "batch_size": 1},
    "benign": {"steps": (1, 3), "lr": 1e-3, "batch_size": 1},
    "round-trip": {"formats": ("bfloat16", "int8")},
    "positions": {"iterations": 2},
}


@pytest.fixture(params=SMALL)
def attack(request):
    if request.param == "relearn-lora":
        pytest.importorskip("peft")
    return ATTACKS[request.param](**SMALL[request.param])


def weights(unet) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


def are_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(attack, scene, out) -> Run:
    return Run("attack", attack, scene, out, scheduler="DDIMScheduler", steps=1)


def test_each_stage_has_other_weights_and_the_end_has_the_first_ones(attack, tiny):
    unet = tiny.target.unet
    before, seen = weights(unet), [weights(unet)]
    for stage in attack.stages(tiny):
        assert stage == len(seen)
        seen.append(weights(unet))
        assert not are_equal(seen[-1], seen[-2])
    assert len(seen) == len(attack.labels()) and are_equal(weights(unet), before)
    assert not any(p.requires_grad for p in unet.parameters())


def test_what_ends_a_stage_puts_the_weights_back(attack, tiny, tmp_path):
    before, one = weights(tiny.target.unet), run(attack, tiny, tmp_path)
    one.search()
    blocker = tmp_path / "images" / f"{tiny.prompts[0].case}_1.png"
    (blocker / "full").mkdir(parents=True)
    with pytest.raises(OSError):
        one.draw()
    assert are_equal(weights(tiny.target.unet), before)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["relearn", "relearn-lora"], indirect=True)
def test_a_run_draws_each_stage_and_goes_on_to_the_same_bytes(attack, tiny, tmp_path):
    one = run(attack, tiny, tmp_path)
    one.search()
    lines = one.draw()
    assert [line["k"] for line in lines] == [0, 1, 2] * 2 and one.fresh({p.case: 1 for p in tiny.prompts}) == []
    content = [(tmp_path / line["file"]).read_bytes() for line in lines]
    assert len(set(content)) == len(content)
    for line in lines[2:5]:
        (tmp_path / line["file"]).unlink()
    assert run(attack, tiny, tmp_path).draw() == lines
    assert [(tmp_path / line["file"]).read_bytes() for line in lines] == content


def test_the_control_has_a_try_for_each_stage_and_the_search_changes_nothing(attack, tiny):
    control = replace(tiny, control=True)
    prompt, before = tiny.prompts[0], weights(tiny.target.unet)
    tries, others = attack.tries(tiny, prompt, {}), attack.tries(control, prompt, {})
    assert len(tries) == len(others) == len(attack.labels()) - 1 == len([*attack.stages(control)])
    assert {one.seed for one in tries} == {prompt.seed}
    if attack.control_changes:
        assert {one.seed for one in others} == {prompt.seed}
        return
    assert [one.seed for one in others] == [seed_of(prompt, n) for n in range(1, len(others) + 1)]
    assert all(are_equal(weights(tiny.target.unet), before) for _ in attack.stages(control))
