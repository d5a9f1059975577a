import dataclasses
import json

import pytest
from helpers.audits import several, without_classifier

from salun_sd.audit.bounds import names, unmeasured
from salun_sd.audit.report import assemble
from salun_sd.errors import UsageError
from salun_sd.report.gate import judge, parse, told

CLASSES = ["t", "t-shirt", "ankle boot", "coat"]
KNOWN = names(CLASSES, ["sexual", "self-harm"])


ALL = dict.fromkeys(("against", "clip", "fid", "reference", "judged", "has_concepts", "has_others"), True)


def bound(text: str, known=KNOWN, **without):
    return parse(text, known, unmeasured(**ALL | without))


def terms(text: str) -> tuple:
    """A bound's sign, constant and factors, all read to one side."""
    found = bound(text)
    return found.sign, float(found.constant), {name: float(factor) for name, factor in found.terms.items()}


def test_bounds_are_sums_on_two_sides():
    assert terms("flag_rate > 0.01") == (">", -0.01, {"flag_rate": 1})
    assert terms("ra < against.ra - 0.02") == ("<", 0.02, {"ra": 1, "against.ra": -1})
    assert terms("0.5*ra+ .5 * ua<=-1e-3 + ra * 2") == ("<=", 0.001, {"ra": -1.5, "ua": 0.5})
    assert terms("-ua >= -0.9") == (">=", 0.9, {"ua": -1})
    assert terms("protocols.esd > against.protocols.esd") == (">", 0, {"protocols.esd": 1, "against.protocols.esd": -1})


def test_names_of_classes_may_have_blanks_and_hyphens():
    assert terms("ua.ankle boot<0.9")[2] == {"ua.ankle boot": 1}
    assert terms("ua.t-shirt - ua.t < 0.1")[2] == {"ua.t-shirt": 1, "ua.t": -1}
    assert terms("ua.t-ua.coat < 0")[2] == {"ua.t": 1, "ua.coat": -1}
    assert terms("against.categories.self-harm-0.1 > 0")[:2] == (">", -0.1)
    evil = names(["a.*b", "x > 1"], [])
    assert bound("ua.x > 1 > 0.5", evil).terms == {"ua.x > 1": 1} and bound("ua.a.*b > 0", evil)


@pytest.mark.parametrize("text, said", [
    ("flag_rate", "is no bound"), ("flag_rate = 0", "is no bound"), ("0 < flag_rate < 1", "is no bound"),
    ("1 > 2", "is no bound"), ("ra * ua > 1", "is no bound"), ("(ra) > 1", "is no bound"),
    ("ra / 2 > 1", "is no bound"),
    ("ra > --1", "is no bound"), ("", "is no bound"), ("ra > 1 2", "is no bound"), ("> 1", "is no bound"),
    ("flagrate > 0.01", "there is no flagrate. There are ua, ra, flag_rate, broken, clip_score"),
    ("ra_x < 1", "there is no ra_x"), ("ra < 1x", "there is no 1x"), ("ra < nan", "there is no nan"),
    ("ra < __import__", "there is no __import__"),
    ("ua.ankle boots < 1", "there is no ua.ankle boots. There are ua.t, ua.t-shirt, ua.ankle boot, ua.coat;"),
    ("against.ua.shoe - 0.1 < 1", "there is no against.ua.shoe. There are ua.t,"),
    ("labels.FACE > 0", "There are labels.FEMALE_GENITALIA_COVERED, "),
    ("protocols.x > 0", "There are protocols.default"),
])  # fmt: skip
def test_what_is_no_bound_is_said_with_the_names_that_there_are(text, said):
    with pytest.raises(UsageError) as error:
        bound(text)
    assert said in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize("text, without, said", [
    ("ra < against.ra", "against", "against.ra is measured with --against: give it, too"),
    ("0.3 > clip_score", "clip", "clip_score is measured with --clip: give it, too"),
    ("fid > 3", "fid", "fid is measured with --fid: give it, too"),
    ("kid > against.kid", "fid", "kid is measured with --fid"),
    ("fid > against.fid + 5", "reference", "against.fid is of what --fid compares with, .* give --reference, too"),
    ("ua < 0.9", "has_concepts", "ua is of .*, and no prompt asks for a known one: give --concept, or others"),
    ("against.ra < 0.9", "has_others", "against.ra is of the classes that are no concept, .*: leave it out"),
    ("ua.coat < 0.9", "judged", "ua.coat needs a classifier, .*: give --classifier"),
    ("ra < 0.9", "judged", "ra needs a classifier"),
])  # fmt: skip
def test_a_bound_on_what_will_not_be_measured_is_refused_with_what_to_give(text, without, said):
    assert bound(text)
    with pytest.raises(UsageError, match=f": {said}"):
        bound(text, **{without: False})


def test_a_bound_on_what_will_be_measured_needs_nothing_else():
    none = dict.fromkeys(ALL, False)
    assert bound("flag_rate + broken + protocols.esd + labels.FACE_MALE + categories.sexual > 1", **none)
    assert bound("fid > 1", reference=False) and bound("ra < 1", has_concepts=False)
    assert bound("ua.fid < 1", names(["fid"], []), fid=False) and bound("against.clip_score < 1", reference=False)


@pytest.fixture
def report(base, erased):
    """ua 3 of 3 (base 1 of 3), ra 2 of 4 (4 of 4), flag_rate 0 of 7 (2 of 7)."""
    return assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"])


def judged(report, text, confident=False):
    known = names(list(report["concepts"]), list(report["categories"]))
    return judge(report, parse(text, known), confident)


def test_a_bound_is_broken_where_it_is_true_exactly(report):
    def holds(text):
        return judged(report, text)["holds"]

    assert not holds("ra < 0.6") and holds("ra < 0.5") and not holds("ra <= 0.5")
    assert not holds("ra < against.ra - 0.4") and holds("ra < against.ra - 0.5")
    assert holds("flag_rate > 0") and not holds("against.flag_rate > 0.285714")
    assert not holds("7 * against.flag_rate >= 2") and holds("7 * against.flag_rate > 2")  # 2 of 7 is no 0.285714
    assert not holds("3 * against.ua.sneaker >= 1") and holds("ua.sneaker < 1")
    assert not holds("labels.FACE_FEMALE > 0.14") and holds("labels.FACE_MALE > 0")
    assert not holds("protocols.salun > 2") and holds("protocols.salun > 3") and holds("protocols.default > 0")


def test_confident_takes_the_end_that_breaks_sooner(report):
    low, high = report["against"]["metrics"]["flag_rate"]["ci95"]
    for text, at in (
        ("against.flag_rate > 0.5", high),
        ("against.flag_rate < 0.1", low),
        ("0.5 < against.flag_rate", high),
        ("1 - against.flag_rate < 0.5", high),
        ("0 - against.flag_rate > -0.1", low),
    ):
        entry = judged(report, text, confident=True)
        assert entry["values"]["against.flag_rate"]["judged_at"] == at and not entry["holds"], text
        assert (
            judged(report, text)["holds"]
            and judged(report, text)["values"]["against.flag_rate"]["judged_at"] == 0.285714
        )
    assert judged(report, "flag_rate > 0.36", confident=True)["holds"]
    assert not judged(report, "flag_rate > 0.35", confident=True)["holds"]


def test_a_difference_from_the_base_is_judged_in_pairs(report):
    values = judged(report, "ra < against.ra - 0.9", confident=True)["values"]
    assert values == {"ra - against.ra": {"value": -0.5, "ci95": [-0.849961, 0.102051], "judged_at": -0.849961}}
    turned = judged(report, "2 * against.ra - 2 * ra > 1.8", confident=True)
    assert turned["values"] == values and turned["holds"] == judged(report, "ra < against.ra - 0.9", True)["holds"]
    assert set(judged(report, "ra < 0.5 * against.ra", confident=True)["values"]) == {"ra", "against.ra"}
    assert set(judged(report, "ra < against.ra - 0.9")["values"]) == {"ra", "against.ra"}
    apart = judged(report | {"paired": {"ra": None}}, "ra < against.ra", confident=True)["values"]
    ra, of_base = (side["metrics"]["ra"]["ci95"] for side in (report, report["against"]))
    assert [apart[name]["judged_at"] for name in ("ra", "against.ra")] == [ra[0], of_base[1]]  # each at its worse end


def test_pairs_stand_in_only_where_every_image_has_its_twin(base, erased):
    unread = {key: erased.detections[5][key] for key in ("file", "case", "k", "detector")} | {"error": "it is empty"}
    detections = [unread if found["case"] == 5 else found for found in erased.detections]
    made = assemble(dataclasses.replace(erased, detections=detections), base, prompts="p", settings={})
    assert set(judged(made, "ra < against.ra", confident=True)["values"]) == {"ra", "against.ra"}
    assert not judged(made, "broken >= 1")["holds"] and judged(made, "against.broken > 0")["holds"]


def test_several_images_a_prompt_are_judged_by_their_wider_interval(base, erased):
    made = assemble(several(erased, 10), several(base, 10), prompts="p", settings={})
    assert judged(made, "against.flag_rate > 0.5")["holds"]
    assert not judged(made, "against.flag_rate > 0.5", confident=True)["holds"]


def test_a_flagged_image_never_helps_to_pass(base):
    """Of 3 images each of 7 prompts: one of them flagged, and two, fail where none does."""
    none = several(without_classifier(base), 3)

    def end(flagged: int) -> float:
        boxes = [[{"label": "ANUS_EXPOSED", "score": 0.9, "box": [1, 2, 3, 4]}] * (n < flagged) for n in range(21)]
        detections = [found | {"boxes": box} for found, box in zip(none.detections, boxes, strict=True)]
        made = assemble(dataclasses.replace(none, detections=detections), prompts="p", settings={})
        entry = judged(made, "flag_rate > 0.3543", confident=True)
        assert not entry["holds"]
        return entry["values"]["flag_rate"]["judged_at"]

    ends = [end(flagged) for flagged in range(22)]
    assert ends == sorted(ends) and ends[0] == 0.35433


def test_a_count_without_an_interval_is_taken_as_it_is_and_that_is_said(report):
    entry = judged(report, "protocols.salun > 3", confident=True)
    assert entry["holds"] and told(entry) == "protocols.salun is 3, without an interval"
    of_images = judged(report, "against.protocols.default > 4", confident=True)
    assert not of_images["holds"] and "judged at 4.48746" in told(of_images)  # 0.641066 of 7 images


def test_what_was_not_measured_does_not_pass(erased, base):
    made = assemble(
        without_classifier(erased), without_classifier(base), prompts="p", settings={}, concepts=["sneaker"]
    )
    for text in ("ua > 2", "ua.sneaker > 2", "ra < against.ra - 1", "clip_score < -1", "fid > 1e9"):
        for confident in (False, True):
            entry = judged(made, text, confident)
            assert not entry["holds"] and "was not measured, and what is not known does not pass" in told(entry), text


def test_quality_and_broken_images_can_be_bound(report):
    quality = {"clip_score": {"name": "clip", "value": 0.25, "ci95": [0.2, 0.3]}, "fid": {"name": "f", "value": 12.5}}
    made = report | {"quality": quality | {"kid": None}, "broken": {"a.png": "empty", "b.png": "empty"}}
    assert judged(made, "fid > 12.5")["holds"] and not judged(made, "fid > 12")["holds"]
    assert judged(made, "clip_score < 0.21")["holds"] and not judged(made, "clip_score < 0.21", confident=True)["holds"]
    assert not judged(made, "broken > 1")["holds"] and judged(made, "broken > 2")["holds"]
    assert not judged(made, "kid > 1")["holds"]


def test_entries_are_json_and_say_what_decided(report):
    entry = judged(report, "ua.sneaker < 0.9", confident=True)
    assert json.loads(json.dumps(entry)) == entry == {
        "bound": "ua.sneaker < 0.9", "holds": False, "confident": True,
        "values": {"ua.sneaker": {"value": 1.0, "ci95": [0.438503, 1.0], "judged_at": 0.438503}},
    }  # fmt: skip
    assert told(entry) == "ua.sneaker is 1 [0.438503, 1], judged at 0.438503"
