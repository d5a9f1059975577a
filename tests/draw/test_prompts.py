import csv

import pytest

from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.errors import SalunError, UsageError

HEADER = "case_number,prompt,evaluation_seed,evaluation_guidance,class\n"
LAST = "case_number,evaluation_seed,evaluation_guidance,prompt\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# I2P's form: a nameless column of row numbers, byte-order mark, emoji, quotes, a comma and a line break in prompts.
I2P = """\ufeff,prompt,categories,hard,nudity_percentage,lexica_url,sd_seed,sd_guidance_scale,\
sd_image_width,sd_image_height,sd_model
0,"grave 🪦, ""science"" fiction ","violence, self-harm",1,0.0,https://lexica.art/0,4261553411,13,512,384,sd-v1-4
7,"two
lines","shocking, Sexual",0,50.0,,9007199254740993,7,768,512,sd-v1-4
9,plain,sexual,1,,,3,7.5,,,sd-v1-4
"""


def cases(file, *where, limit=None) -> list[int]:
    return [p.case for p in prompts.read(str(file), where, limit)]


@pytest.fixture
def i2p(tmp_path):
    file = tmp_path / "copy.csv"
    file.write_text(I2P, encoding="utf-8")
    return file


def test_the_shipped_sets_read_and_every_prompt_has_a_seed_of_its_own():
    assert prompts.builtin() == ["everyday", "i2p", "imagenette", "nudity", "people", "pocket"]
    for name in set(prompts.builtin()) - {"i2p"}:
        rows = prompts.read(name)
        assert len({p.seed for p in rows}) == len(rows)
    assert [sum(p.label == c for p in prompts.read("pocket")) for c in ("sneaker", "bag")] == [100, 100]
    assert len({p.label for p in prompts.read("imagenette")}) == 10


def test_write_gives_back_what_read_takes(tmp_path):
    rows = [
        prompts.Prompt(0, 'a "quoted", prompt 🪦\nwith a line break', 2**40, 7.5, None),
        prompts.Prompt(7, "<b>מימין לשמאל</b>", 0, 3.0, "bag", ("sexual", "self-harm"), (512, 128)),
    ]
    file = tmp_path / "p.csv"
    file.write_text("\ufeff" + prompts.write(rows), encoding="utf-8")
    assert prompts.read(str(file)) == rows
    assert len(list(csv.reader(file.open(newline="")))) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no column prompt, evaluation_seed, evaluation_guidance; it needs prompt, evaluation_seed or sd_seed, "
         "evaluation_guidance or sd_guidance_scale."),
        (HEADER, "has no prompts: a header alone, or nothing"),
        ("case_number,prompt\n1,a\n", "has no column evaluation_seed, evaluation_guidance"),
        (HEADER.replace("\n", ",prompt\n") + "0,a,1,7,,b\n", "has two columns prompt: leave one of them"),
        (I2P.replace("4261553411", ""), "line 2: evaluation_seed is '', not a whole number"),
        (HEADER + "0,a,1,7,\n1,b,x7,7,\n", "line 3: evaluation_seed is 'x7', not a whole number"),
        (HEADER + "0,a,-1,7,\n", "line 2: evaluation_seed is -1, which is negative"),
        (HEADER + "0,a,1,nan,\n", "line 2: evaluation_guidance is nan"),
        (HEADER + "0,a,1,7,\n1,a,2,7\n", "line 3: it has 4 cells, and the header 5; put a cell with commas into"),
        (LAST + "0,12,7.5,a cat\n1,12,7.5,a cat, sitting on a mat\n", "line 3: it has 5 cells, and the header 4"),
        (LAST + "0,12,7.5\n", "line 2: it has 3 cells, and the header 4"),
        (LAST + '0,12,7.5,a cat\n\n1,12,7.5,"a dog\n2,12,7.5,a bag\n', "from line 3 on, is no CSV"),
        (LAST + '0,12,7.5,"a cat\n1,12,7.5,"a dog"\n', "from line 2 on, is no CSV"),
        ('case_number,"prompt\n1,a\n', "from line 1 on, is no CSV"),
        (HEADER + "0,a,1,7,\n0,b,2,7,\n", "has case_number 0 twice"),
        (I2P.replace("13,512,384", "13,512,"), "line 2 has sd_image_width alone: a size is both"),
        (I2P.replace("13,512,384", "13,wide,384"), "line 2: sd_image_width is 'wide', not a whole number"),
        (b"\xff\xfe\x00", "no CSV file in UTF-8"),
    ],
)  # fmt: skip
def test_wrong_content_is_named_with_its_line(tmp_path, content, said):
    file = tmp_path / "p.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SalunError, match=said):
        prompts.read(str(file))


def test_a_missing_set_lists_the_built_in_ones():
    with pytest.raises(UsageError, match="no prompt set or file nowhere.csv; built in are everyday, i2p, imagenette"):
        prompts.read("nowhere.csv")


def test_i2p_is_read_as_it_is_in_the_wild(i2p):
    assert prompts.read(str(i2p)) == [
        prompts.Prompt(0, 'grave 🪦, "science" fiction ', 4261553411, 13, None, ("violence", "self-harm"), (512, 384)),
        prompts.Prompt(7, "two\nlines", 9007199254740993, 7, None, ("shocking", "Sexual"), (768, 512)),
        prompts.Prompt(9, "plain", 3, 7.5, None, ("sexual",)),
    ]


@pytest.mark.parametrize(
    ("was", "becomes", "expected"),
    [
        ("\ufeff,prompt", "Unnamed: 0,prompt", [0, 7, 9]),  # pandas read it and wrote it again
        ("\ufeff,prompt", "idx,prompt", [0, 1, 2]),  # a name of its own: who knows what it counts
        ("\n9,", "\n7,", [0, 1, 2]),  # twice the same
        ("\n9,", "\n,", [0, 1, 2]),
        ("\n9,", "\n9.0,", [0, 1, 2]),
        ("hard", "case_number", [1, 0, 5]),  # first of all, where it is there
    ],
)
def test_without_case_numbers_the_unnamed_column_counts_or_else_the_rows(i2p, was, becomes, expected):
    i2p.write_text(I2P.replace(was, becomes).replace("sexual,1,,", "sexual,5,,"), encoding="utf-8")
    assert cases(i2p) == expected


def test_both_copies_of_i2p_are_the_same_prompts(i2p, tmp_path):
    other = tmp_path / "other.csv"
    renamed = I2P.replace("sd_seed", "evaluation_seed").replace("sd_guidance_scale", "evaluation_guidance")
    other.write_text(renamed.removeprefix("\ufeff"), encoding="utf-8")
    assert prompts.read(str(other)) == prompts.read(str(i2p))
    assert cases(other, "evaluation_guidance>10") == cases(i2p, "evaluation_guidance>10") == [0]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["categories~sexual"], [7, 9]),
        (["categories~SELF"], [0]),
        (["categories=sexual"], [9]),
        (["categories != sexual"], [0, 7]),
        (["nudity_percentage>=50"], [7]),
        (["nudity_percentage<50"], [0]),  # the empty cell of 9 is not 0
        (["nudity_percentage!=50"], [0]),
        (["nudity_percentage=5e1"], [7]),
        (["nudity_percentage<=50"], [0, 7]),
        (["sd_guidance_scale>7"], [0, 9]),  # as text, 13 < 7
        (["sd_seed=9007199254740993"], [7]),
        (["sd_seed>9007199254740992"], [7]),  # the same, as floats
        (["case_number>0", "hard=1"], [9]),
        (["prompt~two\nlines"], [7]),
        (['prompt=grave 🪦, "science" fiction'], [0]),  # trailing spaces are not seen
        ([" categories ~ sexual ", "sd_image_width=768"], [7]),
    ],
)
def test_rows_for_which_all_conditions_hold_are_left_with_their_own_cases(i2p, where, expected):
    assert cases(i2p) == [0, 7, 9]
    assert cases(i2p, *where) == expected
    assert cases(i2p, *where, limit=1) == expected[:1]
    assert cases(i2p, *where, limit=9) == expected


def test_an_empty_prompt_is_one_as_in_i2p(tmp_path):
    rows = [prompts.Prompt(2260, "", 4261564198, 7, None, ("illegal activity",), (512, 512))]
    (tmp_path / "p.csv").write_text(prompts.write(rows))
    assert prompts.read(str(tmp_path / "p.csv")) == rows


def test_what_is_typed_stands_in_for_the_rows_own_guidance_and_size(i2p):
    rows = prompts.read(str(i2p))
    assert prompts.overridden(rows, None, None) == rows
    typed = prompts.overridden(rows, 0.0, (512, 512))
    assert {(p.guidance, p.size) for p in typed} == {(0.0, (512, 512))}
    assert [p._replace(guidance=q.guidance, size=q.size) for p, q in zip(typed, rows, strict=True)] == rows
    assert prompts.size_of("512") == (512, 512) and prompts.size_of("512x384") == (512, 384)
    for text in ("", "0", "512x", "x512", "512x0", "512X384", "-512", "512 x 384", "1000000", "512.0"):
        with pytest.raises(UsageError, match=f"--size {text} is no size: give pixels, as in 512"):
            prompts.size_of(text)


def test_the_built_in_sets_are_filtered_too():
    rows = prompts.read("pocket", ["class=sneaker"])
    assert rows == [p for p in prompts.read("pocket") if p.label == "sneaker"]
    assert prompts.read("pocket", ["class=sneaker"], 3) == rows[:3]


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("nudity>=50", UsageError, "copy.csv has no column nudity: it has prompt, categories, hard, nudity_percentage, "
         "lexica_url, sd_seed, sd_guidance_scale, sd_image_width, sd_image_height, sd_model, case_number, "
         "evaluation_seed, evaluation_guidance."),
        ("hard=2", UsageError, "copy.csv has no prompt with hard=2: give another --where."),
        ("sd_model>1", SalunError, "copy.csv, line 2: sd_model is 'sd-v1-4', not a number; --where compares it by "
         "=, != or ~ only."),
        ("hard>few", UsageError, "--where 'hard>few': few is not a number, and > compares numbers; give =, != or ~."),
        ("hard>nan", UsageError, "--where 'hard>nan': nan is not a number, and > compares numbers; give =, != or ~."),
        *((text, UsageError, f"--where {text!r} is no condition: give a column, one of ~ = != >= <= > < and a value, "
           "as in 'categories~sexual' or 'nudity_percentage>=50'.") for text in ("hard", "hard=", "=1", " ~ ", "a!1")),
    ],
)  # fmt: skip
def test_a_condition_that_cannot_be_met_is_said(i2p, where, error, said):
    with pytest.raises(SalunError) as e:
        prompts.read(str(i2p), [where])
    assert type(e.value) is error and str(e.value).removeprefix(f"{i2p.parent}/") == said


def test_a_text_file_has_a_prompt_a_line_and_a_new_line_changes_no_others_seed(tmp_path):
    file = tmp_path / "p.TXT"
    file.write_bytes('\ufeffa cat, "sitting"\r\n\r\n  \r\na dog \r\na cat, "sitting"'.encode())
    before = prompts.read(str(file))
    assert [(p.case, p.text, p.guidance) for p in before] == [
        (0, 'a cat, "sitting"', 7.5), (1, "a dog", 7.5), (2, 'a cat, "sitting"', 7.5)
    ]  # fmt: skip
    # the first 8 digits of sha256sum of 0 a cat, "sitting"; of 0 a dog; of 1 a cat, "sitting"
    assert [p.seed for p in before] == [0xB49C1A9D, 0x632EF989, 0x69759C8B]
    file.write_text('a bird\na cat, "sitting"\na dog\nanother\na cat, "sitting"\n')
    after = {p.case: p.seed for p in prompts.read(str(file))}
    assert [after[1], after[2], after[4]] == [p.seed for p in before] and len(set(after.values())) == 5
    assert cases(file, "prompt~cat") == [1, 4]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no prompts: blank lines alone, or nothing."),
        (b" \n\n", "has no prompts"),
        (b"\xff", "no text in UTF-8"),
    ],
)
def test_a_text_file_without_prompts_is_said(tmp_path, content, said):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(SalunError, match=said):
        prompts.read(str(file))


def test_i2p_comes_from_the_hubs_own_cache_and_its_absence_is_one_sentence(i2p, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UsageError) as e:
        prompts.read("i2p")
    assert str(e.value).startswith("The hub did not give I2P, i2p_benchmark.csv of the data set AIML-TUDA/i2p (")
    assert str(e.value).endswith("or give a copy from disk: --prompts i2p_benchmark.csv") and "\n" not in str(e.value)
    repo = tmp_path / "hub" / "datasets--AIML-TUDA--i2p"
    for file, text in ((f"snapshots/{COMMIT}/i2p_benchmark.csv", I2P), ("refs/main", COMMIT)):
        (repo / file).parent.mkdir(parents=True)
        (repo / file).write_text(text, encoding="utf-8")
    assert prompts.read("i2p", ["categories~sexual"], 1) == prompts.read(str(i2p))[1:2]


def test_evaluate_says_what_its_filters_cannot_do(i2p, tmp_path, capsys):
    audit = ["evaluate", "--images", str(tmp_path), "--prompts", str(i2p), "--out", str(tmp_path / "out")]
    for more, code, said in [
        (["--where", "hard=1", "--where", "x=1"], 2, "has no column x"),
        (["--where", "hard=1", "--where", "sd_model>1"], 1, "sd_model is 'sd-v1-4', not a number"),
        (["--where", "hard=1", "--where", "categories~shock"], 2, "no prompt with hard=1 and categories~shock"),
        (["--limit", "0"], 2, "--limit"),
        (["--where", "hard=1", "--limit", "1"], 2, "holds no images of these prompts"),
    ]:
        with pytest.raises(SystemExit) as e:
            cli.run([*audit, *more])
        assert e.value.code == code and said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_class_a_concept_names():
    classes = ["shirt", "t-shirt", "bag", None]
    assert prompts.class_in("a photo of a T-shirt", classes) == "t-shirt"
    assert prompts.class_in("a photo of a shirt", classes) == "shirt"
    assert prompts.class_in("bags", classes) is None
    assert prompts.class_in("a nude person", []) is None
