import dataclasses
import re

from helpers.audits import EVIL, blanked, categorised, judged, line, make_entry, read_table, without_classifier

from salun_sd.audit.examine import ONE_COLOUR
from salun_sd.audit.markdown import page
from salun_sd.audit.report import NO_QUALITY, assemble, headline
from salun_sd.runtime import escape
from salun_sd.runtime.escape import code


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table of a page, heads first."""
    return [read_table(f"\n{rows}", "\n") for rows in re.findall(r"(?:^\| .*\n)+", text, re.MULTILINE)]


def test_page_has_the_numbers_beside_each_other(base, erased):
    made = assemble(categorised(erased), categorised(base), prompts="pocket", settings={}, concepts=["sneaker"])
    made["gate"] = [judged(made, text) for text in ("ra < against.ra", "ra < 0.1")]
    got = page(made)
    title, _, rest = got.partition("\n")
    assert title.startswith("# ") and "`out/erased`" in title and "`pocket`" in title and headline(made, code) in rest
    assert "![" not in got and "<" not in re.sub("`[^`]*`", "", got)
    metrics, pairs, gate, became, classes, categories, labels, protocols, settings = tables(got)
    assert metrics[0] == ["metric", "base: `pocket`", "`out/erased`"]
    assert metrics[3] == ["ra", "4 / 4 = 1.000 [0.510, 1.000]", "2 / 4 = 0.500 [0.150, 0.850]"]
    assert [row[0] for row in metrics[2:]] == ["ua", "ra", "flag_rate"]
    assert pairs == [
        ["metric", "both", "base only", "model only", "neither", "difference", "p"], ["---"] * 7,
        ["ua", "1", "0", "2", "0", "+0.667 [-0.059, +0.939]", "0.5"],
        ["ra", "2", "2", "0", "0", "-0.500 [-0.850, +0.102]", "0.5"],
        ["flag_rate", "0", "2", "0", "5", "-0.286 [-0.641, +0.123]", "0.5"]]  # fmt: skip
    assert [row[:2] for row in gate[2:]] == [["`ra < against.ra`", "**failed**"], ["`ra < 0.1`", "passed"]]
    assert became[2:] == [["`bag`", "1", "2"], ["`dress`", "0", "1"], ["`sneaker`", "2", "0"]]
    assert classes[3] == ["`bag`", "2 / 2 = 1.000 [0.342, 1.000]", "1 / 2 = 0.500 [0.095, 0.905]"]
    assert [row[0] for row in categories[2:]] == ["`sexual`", "`shocking`"]
    assert [row[0] for row in labels[2:]] == [
        "`FACE_FEMALE`", "`ANUS_EXPOSED`, flagged", "`FEMALE_BREAST_EXPOSED`, flagged"]  # fmt: skip
    assert ["`salun`", "boxes", "4", "3"] in protocols
    assert ["`threshold`", "`0.5`"] in settings


def test_page_has_each_of_several_concepts(base, erased):
    metrics, _, *became, _, _, _, _ = tables(
        page(assemble(erased, base, prompts="p", settings={}, concepts=["sneaker", "bag"]))
    )
    assert [row[0] for row in metrics[5:]] == ["ua of `sneaker`", "ua of `bag`"]
    assert len({len(row) for row in metrics}) == 1 and len(became) == 2


def test_page_has_no_base_and_no_classes_where_there_are_none(erased):
    alone = page(assemble(without_classifier(erased), prompts="p", settings={"sampling": None}))
    metrics, labels, protocols, settings = tables(alone)
    assert "base" not in alone and metrics[2] == ["ua", "not measured"]
    assert [table[0][0] for table in (labels, protocols, settings)] == ["label", "protocol", "setting"]


def test_page_has_quality_and_broken_files_where_a_report_has(base, erased):
    made = assemble(erased, base, prompts="p", settings={})
    clip = {"name": "clip|x", "value": 0.25, "ci95": [0.2, 0.3], "images": 7}
    fid = {"name": "fid[judge]", "value": 12.5, "images": [7, 9], "note": "fewer images than dimensions"}
    change = {"name": "change[x]", "value": 0.1, "ci95": [0.05, 0.2], "images": 7, "note": "other noise"}
    made["quality"] = NO_QUALITY | {"change": change, "clip_score": clip, "fid": fid}
    made["against"]["quality"] = NO_QUALITY | {"clip_score": clip | {"value": 0.5, "ci95": None}}
    made["broken"] = {f"{EVIL}{i}.png": "it is empty" for i in range(30)}
    got = page(made)
    *_, quality, broken, _ = tables(got)
    assert quality[2:] == [
        ["`change[x]`", "not measured", "0.1 [0.05, 0.2] of 7 images"],
        ["`clip|x`", "0.5 of 7 images", "0.25 [0.2, 0.3] of 7 images"],
        ["`fid[judge]`", "not measured", "12.5 of 7 and 9 images"]]  # fmt: skip
    assert "`change[x]`: other noise" in got and "`fid[judge]`: fewer images than dimensions" in got
    assert len(broken) == 2 + 20 and all(row[1] == "`it is empty`" for row in broken[2:])
    [count] = [row for row in got.splitlines() if "`out/erased`" in row and "30" in row]
    assert "20" in count


def test_page_names_images_of_one_colour(base, erased):
    *_, named, _ = tables(page(assemble(erased, blanked(base, 2), prompts="p", settings={})))
    assert named[2:] == [["`images/2_0.png`", f"`{ONE_COLOUR}`"]]


def test_page_names_images_without_a_partner(base, erased):
    alone = {"model": [], "against": [EVIL + str(n) for n in range(30)]}
    got = page(assemble(erased, base, prompts="p", settings={}) | {"unpaired": alone})
    *_, named, _ = tables(got)
    [count] = [row for row in got.splitlines() if "30 of base" in row]
    assert named[0] == ["file"] and len(named) == 2 + 20 and "`pocket`" in count


def test_what_people_wrote_is_shown_as_text(erased):
    manifest = [line(row, **{"class": EVIL}) for row in erased.manifest]
    run = dataclasses.replace(erased, model=EVIL, manifest=manifest)
    made = assemble(run, prompts=EVIL, settings={"note": EVIL, "list": [EVIL]}, concepts=[EVIL])
    got = page(made)
    outside = re.sub(r"(?<!`)``(?!`).*?(?<!`)``(?!`)", "", got)
    assert got.count("@mention") >= 5 and "mention" not in outside and "<" not in outside
    metrics, *_, settings = tables(got)
    assert all(len(row) == 2 for row in metrics + settings)


def test_a_note_and_the_name_of_a_setting_that_a_path_is_in_are_shown_as_text(erased):
    detectors = {EVIL: {"sha256": "x", "labels": ["nsfw"], "threshold": 0.5}}
    made = assemble(erased, prompts="p", settings={"detectors": detectors})
    note = {"name": "change", "value": 0.1, "ci95": None, "images": 3, "note": f"The seeds of {EVIL} are not known."}
    got = page(made | {"quality": NO_QUALITY | {"change": note}})
    assert got.count(f"The seeds of {escape.text(EVIL)} are") == 1
    outside = re.sub(r"(?<!`)``(?!`).*?(?<!`)``(?!`)", "", got.replace(escape.text(EVIL), ""))
    assert "mention" not in outside and got.count("threshold`` | `0.5`") == 1


def test_page_has_attacks_beside_control_and_floor(base, erased):
    made = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"])
    entries = {"prefix": make_entry(), "relearn": make_entry(stages=["no attack", EVIL, "50 steps"], from_picture=True)}
    entries["relearn"]["sides"]["model"]["back_at"] = "50 steps"
    under = {"judged_by": EVIL, "false_positives": None, "of": entries, "failed": {"tokens": EVIL},
             "not_run": {"benign": EVIL}}  # fmt: skip
    got = page(made | {"attacks": under})
    whole = next(table for table in tables(got) if table[0][0] == "attack")
    assert whole[0] == ["attack", "tries", "before", "ASR", "fresh", "control", "floor", "base",
                        "ASR - control", "ASR - floor"]  # fmt: skip
    prefix, relearn = whole[2:]
    assert prefix[:4] == ["`prefix`", "`best of 2, quick`", "1 / 4 = 0.250 [0.046, 0.699]",
                          "3 / 4 = 0.750 [0.301, 0.954]"]  # fmt: skip
    assert [cell.partition(" [")[0] for cell in prefix[4:]] == [
        "2 / 4 = 0.500", "2 / 4 = 0.500", "1 / 4 = 0.250", "not measured", "+0.250", "+0.500"]  # fmt: skip
    assert relearn[1] == "`at 50 steps, quick`" and relearn[3].startswith("1 / 4")
    [curve] = [table for table in tables(got) if table[0][0] == "stage"]
    assert curve[0] == ["stage", "model", "control", "floor"] and len(curve) == 2 + 3 + 1
    assert [cell.partition(" ")[0] for cell in curve[2]] == ["`no", "1", "1", "0"]
    assert curve[5] == ["back at", "`50 steps`", "no stage", "no stage"]
    assert "mention" not in re.sub(r"(?<!`)``(?!`).*?(?<!`)``(?!`)", "", got)
    assert "`attack prefix lr`" in [row[0] for row in tables(got)[-1]]
    assert "attack" not in page(made).lower()
