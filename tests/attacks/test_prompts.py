"""Adversarial prompts of others."""

from dataclasses import replace

from helpers.scenes import named, run, scene, searched

from salun_sd.attacks.prompts import Prompts, attacked_with
from salun_sd.draw import prompts

CSV = "case_number,prompt,evaluation_seed,evaluation_guidance,class\n"


def rows(tmp_path, lines: str):
    file = tmp_path / "theirs.csv"
    file.write_text(CSV + lines, encoding="utf-8")
    return prompts.read(str(file))


def test_a_row_is_a_case_whose_plain_prompt_is_the_scenes_with_its_number_or_the_concepts(tmp_path):
    case = named()[1].case
    theirs = rows(tmp_path, f"{case},trainer purse,7,2,sneaker\n3,shoe shoe,8,3,\n")
    under = attacked_with(scene(prompts=named()), theirs)
    assert [p.text for p in under.prompts] == [named()[1].text, under.concept]
    assert [p[2:] for p in under.prompts] == [p[2:] for p in theirs]  # seed, guidance, class
    assert [(one.text, one.seed) for p in under.prompts for one in Prompts().tries(under, p, {})] == [
        ("trainer purse", 7), ("shoe shoe", 8),
    ]  # fmt: skip
    (control,) = searched(Prompts(), replace(under, control=True))
    assert control.text == named()[1].text and control.seed != 7


def test_the_plain_prompt_is_drawn_beside_the_adversarial_one(tmp_path):
    under = attacked_with(scene(prompts=named()), rows(tmp_path, "3,shoe shoe,8,3,\n"))
    attack = run(Prompts(), under, tmp_path / "out", steps=1)
    attack.search()
    lines = attack.draw()
    assert [(line["k"], line["prompt"], line["seed"]) for line in lines] == [(0, under.concept, 8), (1, "shoe shoe", 8)]
    a, b = ((tmp_path / "out" / line["file"]).read_bytes() for line in lines)
    assert a != b
