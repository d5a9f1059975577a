import csv
import os

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
    assert prompts.builtin() == ["classes", "everyday", "i2p", "imagenette", "nudity", "people", "pocket", "retain"]
    for name in set(prompts.builtin()) - {"classes", "i2p"}:
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
    file.write_text("\ufeff" + prompts.as_csv(rows), encoding="utf-8")
    assert prompts.read(str(file)) == rows
    assert len(list(csv.reader(file.open(newline="")))) == 3


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no column prompt"),
        ("case_number;Texts;seed\n1;a;2\n", "no column prompt.* case_number, Texts, seed"),
        (HEADER, "no prompts"),
        (HEADER.replace("\n", ",prompt\n") + "0,a,1,7,,b\n", "two columns prompt"),
        (I2P.replace("4261553411", ""), "line 2.*evaluation_seed.*''.*whole"),
        (HEADER + "0,a,1,7,\n1,b,x7,7,\n", "line 3.*evaluation_seed.*'x7'.*whole"),
        (HEADER + "0,a,-1,7,\n", "line 2.*evaluation_seed.*-1.*negative"),
        (HEADER + "0,a,1,nan,\n", "line 2.*evaluation_guidance.*nan"),
        (HEADER + "0,a,1,1e7,\n", "line 2.*evaluation_guidance.*1e7.*large"),
        (HEADER + "0,a,1,7,\n1,a,2,7\n", "line 3.*4 cells.* 5"),
        (LAST + "0,12,7.5,a cat\n1,12,7.5,a cat, sitting on a mat\n", "line 3.*5 cells.* 4.*quotes"),
        (LAST + "0,12,7.5\n", "line 2.*3 cells.* 4"),
        (LAST + '0,12,7.5,a cat\n\n1,12,7.5,"a dog\n2,12,7.5,a bag\n', "line 4 "),
        (LAST + '0,12,7.5,"a cat\n1,12,7.5,"a dog"\n', "line 2 "),
        ('case_number,"prompt\n1,a\n', 'case_number,"prompt'),
        (HEADER + "0,a,1,7,\n0,b,2,7,\n", "case_number 0 twice"),
        (I2P.replace("13,512,384", "13,512,"), "line 2.* sd_image_width.*sd_image_height"),
        (I2P.replace("13,512,384", "13,wide,384"), "line 2.*sd_image_width.*'wide'.*whole"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)  # fmt: skip
def test_wrong_content_is_named_with_its_line(tmp_path, content, named):
    file = tmp_path / "p.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SalunError, match=f"p.csv.*{named}|{named}.*p.csv"):
        prompts.read(str(file))


@pytest.mark.parametrize(
    ("content", "guidance"),
    [
        ("prompt\na cat\na dog\n", 7.5),
        (",prompt,evaluation_guidance\n0,a cat,3\n1,a dog,3\n", 3),
        ("prompt;Evaluation Guidance\na cat;7,25\na dog;7,25\n", 7.25),  # Excel, where numbers have a comma
    ],
)
def test_a_prompt_alone_will_do_and_has_the_seed_that_it_has_in_a_text_file(tmp_path, caplog, content, guidance):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    (tmp_path / "p.csv").write_text(content)
    with caplog.at_level("INFO", logger="salun_sd"):
        rows = prompts.read(str(tmp_path / "p.csv"))
    assert rows == [p._replace(guidance=guidance) for p in prompts.read(str(tmp_path / "p.txt"))]
    assert "p.csv" in caplog.text and "evaluation_seed" in caplog.text
    assert ("sd_guidance_scale" in caplog.text) == (guidance == 7.5)


def test_numbers_are_read_as_tables_write_them_and_a_rounded_seed_is_refused(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("Case Number;Prompt;SD_SEED;Evaluation-Guidance;Class\n3.0;a;4261553411.0; 7,5; bag \n")
    assert prompts.read(str(file)) == [prompts.Prompt(3, "a", 4261553411, 7.5, "bag")]
    assert cases(file, "Class=bag") == cases(file, "CASE NUMBER=3") == [3]
    file.write_text(file.read_text().replace("4261553411.0", "4.26155E+09"))
    with pytest.raises(SalunError, match="line 2: evaluation_seed is '4.26155E.09'"):
        prompts.read(str(file))


def test_a_class_is_the_same_class_in_composed_and_decomposed_form(tmp_path):
    (tmp_path / "p.csv").write_text(HEADER + "0,a,1,7,cafe\u0301\n", encoding="utf-8")
    assert prompts.read(str(tmp_path / "p.csv"))[0].label == "caf\u00e9"
    assert prompts.class_in("a photo of a Cafe\u0301", ["caf\u00e9", "bag"]) == "caf\u00e9"


def test_a_table_that_excel_calls_text_is_a_table(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("Prompt\tevaluation_seed\r\na cat\t3\r\n".encode("utf-16"))
    assert prompts.read(str(file)) == [prompts.Prompt(0, "a cat", 3, 7.5)]
    file.write_text("a\tprompt of a cat\n")
    assert [p.text for p in prompts.read(str(file))] == ["a\tprompt of a cat"]


def test_a_missing_set_lists_the_built_in_ones(tmp_path):
    with pytest.raises(UsageError, match="nowhere.csv.* everyday, i2p, imagenette"):
        prompts.read("nowhere.csv")
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/zero", tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match=f"{place} is no regular file"):
            prompts.read(str(place))


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
    (tmp_path / "p.csv").write_text(prompts.as_csv(rows))
    assert prompts.read(str(tmp_path / "p.csv")) == rows


def test_what_is_typed_stands_in_for_the_rows_own_guidance_and_size(i2p):
    rows = prompts.read(str(i2p))
    assert prompts.overridden(rows, None, None) == rows
    typed = prompts.overridden(rows, 0.0, (512, 512))
    assert {(p.guidance, p.size) for p in typed} == {(0.0, (512, 512))}
    assert [p._replace(guidance=q.guidance, size=q.size) for p, q in zip(typed, rows, strict=True)] == rows
    assert prompts.parse_size("512") == (512, 512) and prompts.parse_size("512x384") == (512, 384)
    for text in ("", "0", "512x", "x512", "512x0", "512X384", "-512", "512 x 384", "1000000", "512.0"):
        with pytest.raises(UsageError, match=f"--size {text} .*512x384"):
            prompts.parse_size(text)


def test_the_built_in_sets_are_filtered_too():
    rows = prompts.read("pocket", ["class=sneaker"])
    assert rows == [p for p in prompts.read("pocket") if p.label == "sneaker"]
    assert prompts.read("pocket", ["class=sneaker"], 3) == rows[:3]


@pytest.mark.parametrize(
    ("where", "error", "named"),
    [
        ("nudity>=50", UsageError, "copy.csv.* nudity.* prompt, categories, hard, nudity_percentage, lexica_url, "
         "sd_seed, sd_guidance_scale, sd_image_width, sd_image_height, sd_model, case_number, evaluation_seed, "
         "evaluation_guidance"),
        ("hard=2", UsageError, "copy.csv.* hard=2"),
        ("sd_model>1", SalunError, "copy.csv, line 2.*sd_model.*'sd-v1-4'.*number"),
        ("hard>few", UsageError, "--where 'hard>few'.* few .*number"),
        ("hard>nan", UsageError, "--where 'hard>nan'.* nan .*number"),
        *((text, UsageError, f"--where {text!r}.*'nudity_percentage>=50'")
          for text in ("hard", "hard=", "=1", " ~ ", "a!1")),
    ],
)  # fmt: skip
def test_a_condition_that_cannot_be_met_is_named(i2p, where, error, named):
    with pytest.raises(SalunError, match=named) as e:
        prompts.read(str(i2p), [where])
    assert type(e.value) is error


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
    ("content", "word"),
    [
        (b"", "no prompts"),
        (b" \n\n", "no prompts"),
        (b"\xff", "UTF-8"),
    ],
)
def test_a_text_file_without_prompts_is_named(tmp_path, content, word):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(SalunError, match=f"p.txt.*{word}|{word}.*p.txt"):
        prompts.read(str(file))


def test_i2p_comes_from_the_hubs_own_cache_and_its_absence_is_one_sentence(i2p, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UsageError) as e:
        prompts.read("i2p")
    assert all(name in str(e.value) for name in ("AIML-TUDA/i2p", "hf auth login", "--prompts i2p_benchmark.csv"))
    assert "\n" not in str(e.value)
    repo = tmp_path / "hub" / "datasets--AIML-TUDA--i2p"
    for file, text in ((f"snapshots/{COMMIT}/i2p_benchmark.csv", I2P), ("refs/main", COMMIT)):
        (repo / file).parent.mkdir(parents=True)
        (repo / file).write_text(text, encoding="utf-8")
    assert prompts.read("i2p", ["categories~sexual"], 1) == prompts.read(str(i2p))[1:2]


def test_evaluate_says_what_its_filters_cannot_do(i2p, tmp_path, capsys):
    audit = ["evaluate", "--images", str(tmp_path), "--prompts", str(i2p), "--out", str(tmp_path / "out")]
    for more, code, named in [
        (["--where", "hard=1", "--where", "x=1"], 2, "column x"),
        (["--where", "hard=1", "--where", "sd_model>1"], 1, "'sd-v1-4'"),
        (["--where", "hard=1", "--where", "categories~shock"], 2, "hard=1 and categories~shock"),
        (["--limit", "0"], 2, "--limit"),
        (["--where", "hard=1", "--limit", "1"], 2, "_<k>.png"),  # no image of that prompt
    ]:
        with pytest.raises(SystemExit) as e:
            cli.run([*audit, *more])
        assert e.value.code == code and named in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_class_a_concept_names():
    classes = ["shirt", "t-shirt", "bag", None]
    assert prompts.class_in("a photo of a T-shirt", classes) == "t-shirt"
    assert prompts.class_in("a photo of a shirt", classes) == "shirt"
    assert prompts.class_in("bags", classes) is None
    assert prompts.class_in("a nude person", []) is None
