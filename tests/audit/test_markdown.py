import dataclasses
import re

import pytest
from helpers.audits import EVIL, categorised, line, read_table, without_classifier

from salun_sd.audit.bounds import names
from salun_sd.audit.markdown import page
from salun_sd.audit.report import assemble, headline
from salun_sd.report.escape import code
from salun_sd.report.gate import judge, parse
from salun_sd.report.markdown import table


@pytest.mark.parametrize("text", [EVIL, "`", "``a`", "a``", "", "plain", "a\\|b", "\u202e\x00", "“x”"])
def test_code_is_one_span_that_gives_the_text_back(text):
    """Read as CommonMark does: to the next fence of as many backticks, a blank at both ends taken away."""
    shown = code(text)
    fence = re.match("`+", shown)[0]
    assert shown.endswith(fence) and "\n" not in shown and shown.isprintable()
    inner = shown[len(fence) : -len(fence)]
    assert fence not in re.findall("`+", inner)
    inner = inner[1:-1] if inner.startswith(" ") and inner.endswith(" ") and inner.strip() else inner
    if text.isprintable():
        assert inner.strip() == text
    elif "\n" in text:
        assert inner == " ".join(text.split())
    else:
        assert inner == r"\u202e\x00"


def test_tables_keep_their_columns_whatever_cells_hold():
    rows = read_table("# x\n" + table([code(EVIL), "b"], [[code("|" * 3), "x|y"]]), "# x")
    assert rows == [[code(EVIL), "b"], ["---", "---"], [code("|||"), "x|y"]]


def test_page_has_the_numbers_beside_each_other(base, erased):
    made = assemble(categorised(erased), categorised(base), prompts="pocket", settings={}, concepts=["sneaker"])
    made["gate"] = [judge(made, parse(text, names(["sneaker"], [])), False) for text in ("ra < against.ra", "ra < 0.1")]
    got = page(made)
    assert got.startswith("# Audit of `out/erased` on `pocket`\n\n") and headline(made, code) in got
    assert "![" not in got and "<" not in re.sub("`[^`]*`", "", got)
    metrics = read_table(got, "# Audit")
    assert metrics[0] == ["metric", "base: `pocket`", "`out/erased`"]
    assert metrics[3] == ["ra", "4 / 4 = 1.000 [0.510, 1.000]", "2 / 4 = 0.500 [0.150, 0.850]"]
    assert read_table(got, "## Image by image") == [
        ["metric", "both", "base only", "model only", "neither", "difference", "p"], ["---"] * 7,
        ["ua", "1", "0", "2", "0", "+0.667 [-0.059, +0.939]", "0.5"],
        ["ra", "2", "2", "0", "0", "-0.500 [-0.850, +0.102]", "0.5"],
        ["flag_rate", "0", "2", "0", "5", "-0.286 [-0.641, +0.123]", "0.5"]]  # fmt: skip
    assert read_table(got, "## What `sneaker` became")[2:] == [
        ["`bag`", "1", "2"], ["`dress`", "0", "1"], ["`sneaker`", "2", "0"]]  # fmt: skip
    assert read_table(got, "by class")[3] == ["`bag`", "2 / 2 = 1.000 [0.342, 1.000]", "1 / 2 = 0.500 [0.095, 0.905]"]
    assert [row[0] for row in metrics[2:]] == ["ua", "ra", "flag_rate"]
    assert [row[:2] for row in read_table(got, "## Gate")[2:]] == [
        ["`ra < against.ra`", "**failed**"], ["`ra < 0.1`", "passed"]]  # fmt: skip
    assert read_table(got, "by category")[2][0] == "`sexual`"
    assert [row[0] for row in read_table(got, "show a label")[2:]] == [
        "`FACE_FEMALE`", "`ANUS_EXPOSED`, flagged", "`FEMALE_BREAST_EXPOSED`, flagged"]  # fmt: skip
    assert ["`salun`", "boxes", "4", "3"] in read_table(got, "each paper")
    assert ["threshold", "`0.5`"] in read_table(got, "## Settings")


def test_page_has_each_of_several_concepts_and_no_base_where_there_is_none(base, erased):
    both = page(assemble(erased, base, prompts="p", settings={}, concepts=["sneaker", "bag"]))
    assert read_table(both, "# Audit")[5][0] == "ua of `sneaker`"
    assert len({len(row) for row in read_table(both, "# Audit")}) == 1
    alone = page(assemble(without_classifier(erased), prompts="p", settings={"sampling": None}))
    assert "base" not in alone and "## Gate" not in alone and "Quality" not in alone and "read" not in alone
    assert "Image by image" not in alone and "became" not in alone and "by class" not in alone
    assert read_table(alone, "# Audit")[2] == ["ua", "not measured"]


def test_page_has_quality_and_broken_files_where_a_report_has(base, erased):
    made = assemble(erased, base, prompts="p", settings={})
    clip = {"name": "clip|x", "value": 0.25, "ci95": [0.2, 0.3], "images": 7}
    fid = {"name": "fid[judge]", "value": 12.5, "images": [7, 9], "note": "fewer images than dimensions"}
    made["quality"] = {"clip_score": clip, "kid": None, "fid": fid}
    made["against"]["quality"] = {"clip_score": clip | {"value": 0.5, "ci95": None}, "kid": None, "fid": None}
    made["broken"] = {f"{EVIL}{i}.png": "it is empty" for i in range(30)}
    got = page(made)
    assert read_table(got, "## Quality")[2:] == [
        ["`clip|x`", "0.5 of 7 images", "0.25 [0.2, 0.3] of 7 images"],
        ["`fid[judge]`", "not measured", "12.5 of 7 and 9 images"]]  # fmt: skip
    assert "`fid[judge]`: fewer images than dimensions" in got
    assert "30 of `out/erased`, the first 20:" in got and len(read_table(got, "the first 20:")) == 22


def test_what_people_wrote_is_shown_as_text(erased):
    manifest = [line(row, **{"class": EVIL}) for row in erased.manifest]
    run = dataclasses.replace(erased, model=EVIL, manifest=manifest)
    made = assemble(run, prompts=EVIL, settings={"note": EVIL, "list": [EVIL]}, concepts=[EVIL])
    got = page(made)
    outside = re.sub(r"(?<!`)``(?!`).*?(?<!`)``(?!`)", "", got)
    assert got.count("@mention") >= 5 and "mention" not in outside and "<" not in outside
    assert all(len(row) == 2 for row in read_table(got, "# Audit") + read_table(got, "## Settings"))
