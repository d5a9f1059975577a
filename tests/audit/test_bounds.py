"""What a bound may name in an audit, and what an audit's report has of it."""

import dataclasses

import pytest
from helpers.audits import blanked, judged, make_entry, several, torn, without_classifier

from salun_sd.audit.attacked import in_report
from salun_sd.audit.bounds import ATTACKED, CHANGES, names, of_attack, unmeasured
from salun_sd.audit.report import assemble
from salun_sd.errors import UsageError
from salun_sd.report.gate import parse

KNOWN = names(["t", "coat"], ["sexual", "self-harm"])
ALL = dict.fromkeys(("against", "clip", "fid", "reference", "judged", "has_concepts", "has_others", "has_kept"), True)


def bound(text: str, known=KNOWN, **without):
    return parse(text, known, unmeasured(**ALL | without))


def test_a_bound_may_name_every_number_of_a_report():
    for name in ("ua", "ua.t", "ra", "flag_rate", "broken", "blank", "blank_rate", "clip_score", "fid", "kid",
                 "labels.FACE_MALE", "protocols.esd", "categories.self-harm"):  # fmt: skip
        assert bound(f"{name} > 0").terms == {name: 1} and bound(f"against.{name} > 0").terms == {f"against.{name}": 1}
    for name in CHANGES:
        assert bound(f"{name} > 0").terms == {name: 1}
        with pytest.raises(UsageError, match=f"against.{name} "):
            bound(f"against.{name} > 0")
    with pytest.raises(UsageError, match="labels.FEMALE_GENITALIA_COVERED"):
        bound("labels.FACE > 0")
    with pytest.raises(UsageError, match="protocols.default"):
        bound("protocols.x > 0")


@pytest.mark.parametrize(("text", "without", "name", "give"), [
    ("ra < against.ra", "against", "against.ra", "--against"),
    ("0.3 > clip_score", "clip", "clip_score", "--clip"),
    ("fid > 3", "fid", "fid", "--fid"),
    ("change > 0.1", "against", "change", "--against"),
    ("change_ssim < 0.9", "has_kept", "change_ssim", "--prompts"),
    ("change_features > 0.1", "fid", "change_features", "--fid"),
    ("kid > against.kid", "fid", "kid", "--fid"),
    ("fid > against.fid + 5", "reference", "against.fid", "--reference"),
    ("ua < 0.9", "has_concepts", "ua", "--concept-class"),
    ("against.ra < 0.9", "has_others", "against.ra", "leave"),
    ("ua.coat < 0.9", "judged", "ua.coat", "--classifier"),
    ("ra < 0.9", "judged", "ra", "--classifier"),
])  # fmt: skip
def test_a_bound_on_what_will_not_be_measured_is_refused_with_what_to_give(text, without, name, give):
    assert bound(text)
    with pytest.raises(UsageError, match=f": {name} .*{give}"):
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


def test_rates_count_exactly(report):
    def holds(text):
        return judged(report, text)["holds"]

    assert not holds("ra < 0.6") and holds("ra < 0.5") and not holds("ra <= 0.5")
    assert not holds("ra < against.ra - 0.4") and holds("ra < against.ra - 0.5")
    assert holds("flag_rate > 0") and not holds("against.flag_rate > 0.285714")
    assert not holds("7 * against.flag_rate >= 2") and holds("7 * against.flag_rate > 2")  # 2 of 7 is no 0.285714
    assert not holds("3 * against.ua.sneaker >= 1") and holds("ua.sneaker < 1")
    assert not holds("labels.FACE_FEMALE > 0.14") and holds("labels.FACE_MALE > 0")
    assert not holds("protocols.salun > 2") and holds("protocols.salun > 3") and holds("protocols.default > 0")


def test_confident_judges_a_rate_at_an_end_of_its_interval(report):
    low, high = report["against"]["metrics"]["flag_rate"]["ci95"]
    for text, at in (("against.flag_rate > 0.5", high), ("against.flag_rate < 0.1", low)):
        assert judged(report, text, confident=True)["values"]["against.flag_rate"]["judged_at"] == at
        assert judged(report, text)["holds"] and not judged(report, text, confident=True)["holds"]
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
    made = assemble(torn(erased, 5), base, prompts="p", settings={})
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


def test_protocols_that_count_images_have_the_interval_of_their_share(report):
    boxes = judged(report, "protocols.salun > 3", confident=True)
    assert boxes["holds"] and boxes["values"]["protocols.salun"]["ci95"] is None
    images = judged(report, "against.protocols.default > 4", confident=True)
    assert not images["holds"]
    assert images["values"]["against.protocols.default"]["judged_at"] == 4.487462  # 0.641066 of 7 images


@pytest.mark.parametrize("confident", [False, True])
def test_what_was_not_measured_does_not_pass(erased, base, confident):
    runs = without_classifier(erased), without_classifier(base)
    made = assemble(*runs, prompts="p", settings={}, concepts=["sneaker"])
    for text in ("ua > 2", "ua.sneaker > 2", "ra < against.ra - 1", "clip_score < -1", "fid > 1e9"):
        entry = judged(made, text, confident)
        assert not entry["holds"] and None in entry["values"].values(), text


def test_quality_and_broken_images_can_be_bound(report):
    quality = {"clip_score": {"name": "clip", "value": 0.25, "ci95": [0.2, 0.3]}, "fid": {"name": "f", "value": 12.5}}
    made = report | {"quality": quality | {"kid": None}, "broken": {"a.png": "empty", "b.png": "empty"}}
    assert judged(made, "fid > 12.5")["holds"] and not judged(made, "fid > 12")["holds"]
    assert judged(made, "clip_score < 0.21")["holds"] and not judged(made, "clip_score < 0.21", confident=True)["holds"]
    assert not judged(made, "broken > 1")["holds"] and judged(made, "broken > 2")["holds"]
    assert not judged(made, "kid > 1")["holds"]


def test_images_of_one_colour_can_be_bound_by_number_and_by_rate(base, erased):
    """One of seven, and none of the base's; the upper end of none of seven is 0.35433."""
    made = assemble(blanked(erased, 3), base, prompts="p", settings={})
    assert judged(made, "blank > 1")["holds"] and not judged(made, "blank > 0", confident=True)["holds"]
    assert judged(made, "blank_rate > 0.142858")["holds"] and not judged(made, "blank_rate > 0.142857")["holds"]
    assert judged(made, "against.blank > 0", confident=True)["holds"]  # a number has no interval
    assert not judged(made, "against.blank_rate > 0.3543", confident=True)["holds"]
    nothing = assemble(torn(erased, *range(7)), base, prompts="p", settings={})
    assert not judged(nothing, "blank > 0")["holds"] and not judged(nothing, "blank_rate > 1")["holds"]


WHOLE = ("model", *ATTACKED)
UNDER_ATTACK = {"prefix": WHOLE, "round-trip": ("model", "base"), "tokens": ()}
OF_ATTACKS = names(["t"], [], attacks=UNDER_ATTACK)


def test_a_bound_may_name_the_rates_of_attacks_and_of_their_other_sides():
    for name in [*of_attack("prefix"), "asr.round-trip", "base.asr.round-trip"]:
        assert bound(f"{name} > 0", OF_ATTACKS, attacks=UNDER_ATTACK).terms == {name: 1}
    both = bound("asr.prefix-floor-control.asr.prefix > 0.05", OF_ATTACKS, attacks=UNDER_ATTACK)
    assert both.terms == {"asr.prefix": 1, "floor-control.asr.prefix": -1}


@pytest.mark.parametrize(("text", "of_prefix", "give"), [
    ("asr.tokens > 0", WHOLE, "asr.tokens .*--with tokens"),
    ("floor.asr.tokens > 0", WHOLE, "floor.asr.tokens .*--with tokens"),
    ("asr.prefix - floor.asr.prefix > 0.05", ("model", "control"), "floor.asr.prefix .*--floor"),
    ("floor-control.asr.prefix > 0", ("model",), "floor-control.asr.prefix .*--floor"),
    ("base.asr.prefix < 1", ("model",), "base.asr.prefix .*--base"),
    ("control.asr.round-trip > 0", WHOLE, "control.asr.round-trip does not exist"),
    ("fresh.asr.prefix > 0", ("model",), "fresh.asr.prefix does not exist"),
    ("against.asr.prefix > 0", WHOLE, "against.asr.prefix .*base.asr"),
    ("asr.prefx > 0", WHOLE, "asr.prefx.*asr.prefix"),
    ("floor.asr > 0", WHOLE, "floor.asr.*floor.asr.prefix"),
])  # fmt: skip
def test_a_bound_on_what_no_attack_measures_is_refused_with_what_to_give(text, of_prefix, give):
    attacks = UNDER_ATTACK | {"prefix": of_prefix, "round-trip": ("model",)}
    with pytest.raises(UsageError, match=give):
        bound(text, OF_ATTACKS, attacks=attacks)


def test_a_bound_on_the_base_of_attacks_without_one_names_the_option_of_attacks():
    for text in ("ra < against.ra", "change > 0.1"):
        with pytest.raises(UsageError, match="--base"):
            bound(text, OF_ATTACKS, attacks=UNDER_ATTACK, against=False)


def test_attacks_are_judged_beside_their_floor_in_pairs_of_cases(report, base):
    """3 of 4 cases, 2 of the control's, 1 of the floor's; the fresh images are 2 of 4."""
    made = report | {"attacks": in_report({"prefix": make_entry()}, report | {"settings": report["settings"] | {
        "classifier": "the judge"}}, base)}  # fmt: skip
    assert not judged(made, "asr.prefix > 0.74")["holds"] and judged(made, "asr.prefix > 0.75")["holds"]
    assert judged(made, "asr.prefix - control.asr.prefix > 0.25")["holds"]
    assert judged(made, "fresh.asr.prefix > 0.5")["holds"] and not judged(made, "floor.asr.prefix < 0.26")["holds"]
    apart = judged(made, "asr.prefix - floor.asr.prefix > 0.5")
    assert apart["holds"] and set(apart["values"]) == {"asr.prefix", "floor.asr.prefix"}
    pairs = made["attacks"]["of"]["prefix"]["paired"]["floor"]
    values = judged(made, "asr.prefix > floor.asr.prefix + 0.05", confident=True)["values"]
    upper = pairs["ci95"][1]
    assert values == {"asr.prefix - floor.asr.prefix": {"value": 0.5, "ci95": pairs["ci95"], "judged_at": upper}}
    assert set(judged(made, "asr.prefix > fresh.asr.prefix", True)["values"]) == {"asr.prefix", "fresh.asr.prefix"}
    gone = judged(made, "base.asr.prefix < 2")
    assert not gone["holds"] and gone["values"] == {"base.asr.prefix": None}
