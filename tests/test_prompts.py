import csv

import pytest

from salun_sd import prompts
from salun_sd.errors import SalunError, UsageError

HEADER = "case_number,prompt,evaluation_seed,evaluation_guidance,class\n"


def test_the_shipped_sets_read_and_every_prompt_has_a_seed_of_its_own():
    assert prompts.builtin() == ["everyday", "imagenette", "nudity", "people", "pocket"]
    for name in prompts.builtin():
        rows = prompts.read(name)
        assert len({p.seed for p in rows}) == len(rows)
    assert [sum(p.label == c for p in prompts.read("pocket")) for c in ("sneaker", "bag")] == [100, 100]
    assert len({p.label for p in prompts.read("imagenette")}) == 10


def test_write_gives_back_what_read_takes(tmp_path):
    rows = [
        prompts.Prompt(0, 'a "quoted", prompt 🪦\nwith a line break', 2**40, 7.5, None),
        prompts.Prompt(7, "<b>מימין לשמאל</b>", 0, 3.0, "bag"),
    ]
    file = tmp_path / "p.csv"
    file.write_text("\ufeff" + prompts.write(rows), encoding="utf-8")
    assert prompts.read(str(file)) == rows
    assert len(list(csv.reader(file.open(newline="")))) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no column case_number, prompt"),
        (HEADER, "has no prompts"),
        ("case_number,prompt\n1,a\n", "has no column evaluation_seed, evaluation_guidance"),
        (HEADER + "0,a,1,7,\n1,b,x7,7,\n", "line 3: evaluation_seed is 'x7', not a number"),
        (HEADER + "0,a,-1,7,\n", "line 2: evaluation_seed is -1, which is negative"),
        (HEADER + "0,a,1,nan,\n", "line 2: evaluation_guidance is nan"),
        (HEADER + "0,a\n", "line 2: evaluation_seed is None, not a number"),
        (HEADER + "0,,1,7,\n", "line 2: the prompt is empty"),
        (HEADER + "0,a,1,7,\n0,b,2,7,\n", "has case_number 0 twice"),
        (b"\xff\xfe\x00", "no CSV file in UTF-8"),
    ],
)
def test_wrong_content_is_named_with_its_line(tmp_path, content, said):
    file = tmp_path / "p.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SalunError, match=said):
        prompts.read(str(file))


def test_a_missing_set_lists_the_built_in_ones():
    with pytest.raises(UsageError, match="no prompt set or file nowhere.csv; built in are everyday, imagenette"):
        prompts.read("nowhere.csv")


def test_the_class_a_concept_names():
    classes = ["shirt", "t-shirt", "bag", None]
    assert prompts.class_in("a photo of a T-shirt", classes) == "t-shirt"
    assert prompts.class_in("a photo of a shirt", classes) == "shirt"
    assert prompts.class_in("bags", classes) is None
    assert prompts.class_in("a nude person", []) is None
