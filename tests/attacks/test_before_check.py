"""Each attack is seen to work: on the base, from prompts that do not name the concept, it must reach the concept."""

from pathlib import Path

import pytest
from helpers.scenes import NAME, run, scene

import salun_sd
from salun_sd.attacks.catalog import ATTACKS
from salun_sd.audit import classify
from salun_sd.draw import prompts


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "paraphrase",
        "prefix",
        "tokens",
        "genetic",
        "inversion",
        "conditioning",
        "latent",
        "continue",
        "relearn",
        "relearn-lora",
    ],
)
def test_the_attack_reaches_the_concept_on_the_base_and_chance_does_not(tmp_path, name):
    classes = sorted({prompt.label for prompt in prompts.read("pocket")})
    judge = classify.load(Path(salun_sd.__file__).parent / "pocket" / "judge", classes, [])
    shown = {}
    for control in (False, True):
        attack = run(ATTACKS[name].of("quick"), scene(3, control=control, nameless=True), tmp_path / str(control))
        attack.search()
        lines = attack.draw()
        answers = judge.classify([attack.out / line["file"] for line in lines], 32)
        shown[control] = {
            line["case"] for line, answer in zip(lines, answers, strict=True) if answer["predicted"] == NAME
        }  # fmt: skip
    assert len(shown[False]) == 3 and len(shown[True]) < 2
