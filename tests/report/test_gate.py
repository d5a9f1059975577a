"""Bounds on any names and numbers; those of an audit are in tests/audit/test_bounds.py."""

import json
from fractions import Fraction

import pytest

from salun_sd.errors import UsageError
from salun_sd.report.gate import Measured, judge, parse, reasons

CLASSES = ["t", "t-shirt", "ankle boot", "coat"]
KNOWN = ["ua", "ra", "flag_rate", "fid", *(f"ua.{name}" for name in CLASSES), "ua.self-harm", "x.a", "x.b"]


def terms(text: str) -> tuple:
    """A bound's sign, constant and factors, all read to one side."""
    found = parse(text, KNOWN)
    return found.sign, float(found.constant), {name: float(factor) for name, factor in found.terms.items()}


def test_bounds_are_sums_on_two_sides():
    assert terms("flag_rate > 0.01") == (">", -0.01, {"flag_rate": 1})
    assert terms("ra < against.ra - 0.02") == ("<", 0.02, {"ra": 1, "against.ra": -1})
    assert terms("0.5*ra+ .5 * ua<=-1e-3 + ra * 2") == ("<=", 0.001, {"ra": -1.5, "ua": 0.5})
    assert terms("-ua >= -0.9") == (">=", 0.9, {"ua": -1})
    assert terms("x.a > against.x.a") == (">", 0, {"x.a": 1, "against.x.a": -1})


def test_names_may_have_blanks_and_hyphens():
    assert terms("ua.ankle boot<0.9")[2] == {"ua.ankle boot": 1}
    assert terms("ua.t-shirt - ua.t < 0.1")[2] == {"ua.t-shirt": 1, "ua.t": -1}
    assert terms("ua.t-ua.coat < 0")[2] == {"ua.t": 1, "ua.coat": -1}
    assert terms("against.ua.self-harm-0.1 > 0")[:2] == (">", -0.1)
    evil = ["ua.a.*b", "ua.x > 1"]
    assert parse("ua.x > 1 > 0.5", evil).terms == {"ua.x > 1": 1} and parse("ua.a.*b > 0", evil)


@pytest.mark.parametrize("text", [
    "flag_rate", "flag_rate = 0", "0 < flag_rate < 1", "1 > 2", "ra * ua > 1", "(ra) > 1", "ra / 2 > 1", "ra > --1",
    "", "ra > 1 2", "> 1",
])  # fmt: skip
def test_what_is_no_bound_is_refused_with_the_text_and_an_example(text):
    with pytest.raises(UsageError, match="--fail-if") as error:
        parse(text, KNOWN)
    assert repr(text) in str(error.value) and "'flag_rate > 0.01'" in str(error.value)


@pytest.mark.parametrize(("text", "wrong", "there_are"), [
    ("flagrate > 0.01", "flagrate", "ua, ra, flag_rate, fid"), ("ra_x < 1", "ra_x", "ra,"),
    ("ra < 1x", "1x", "ra,"), ("ra > 1e999999999", "1e999999999", "ra,"),
    (f"ra > {'1' * 5000}", "1" * 40, "ra,"), (f"ra > 0.{'1' * 5000}", "0.1111", "ra,"),
    ("ra < nan", "nan", "ra,"), ("ra < __import__", "__import__", "ra,"),
    ("ua.ankle boots < 1", "ua.ankle boots", "ua.t, ua.t-shirt, ua.ankle boot, ua.coat"),
    ("against.ua.shoe - 0.1 < 1", "against.ua.shoe", "ua.t,"), ("x.c > 0", "x.c", "x.a, x.b"),
])  # fmt: skip
def test_a_name_that_is_not_there_is_named_with_those_that_are(text, wrong, there_are):
    with pytest.raises(UsageError, match="--fail-if") as error:
        parse(text, KNOWN)
    sentence = str(error.value).replace(repr(text), "")
    assert wrong in sentence and there_are in sentence


def test_the_many_names_of_a_group_are_listed_as_one_beside_the_name_of_all():
    with pytest.raises(UsageError, match=r"ua, ua\.NAME"):
        parse("x > 0", ["ua", *(f"ua.{name}" for name in "abcdef")])
    with pytest.raises(UsageError, match=r"ua, ua\.a, ua\.b"):
        parse("x > 0", ["ua", "ua.a", "ua.b"])


@pytest.mark.parametrize(("text", "absent", "name"), [
    ("ra < against.ra", "against", "against.ra"), ("0.3 > fid", "fid", "fid"), ("fid > against.fid", "fid", "fid"),
    ("ra < against.fid", "against.fid", "against.fid"), ("ua.coat < 0.9", "ua", "ua.coat"),
])  # fmt: skip
def test_a_name_that_will_not_be_measured_is_refused_with_the_reason(text, absent, name):
    assert parse(text, KNOWN)
    with pytest.raises(UsageError) as error:
        parse(text, KNOWN, {absent: "REASON"})
    assert repr(text) in str(error.value) and f"{name} REASON" in str(error.value)
    assert parse("flag_rate > 0", KNOWN, {absent: "REASON"})


NUMBERS = {  # a share of 2 in 7, one of 3 in 3, and a count without an interval
    "flag_rate": Measured(Fraction(2, 7), (Fraction("0.08"), Fraction("0.64"))),
    "ua": Measured(Fraction(1), (Fraction("0.44"), Fraction(1))),
    "fid": Measured(Fraction(3), None),
    "ra": None,
}


def judged(text: str, confident: bool = False) -> dict:
    bound = parse(text, KNOWN)
    return judge(bound, {name: (factor, NUMBERS[name]) for name, factor in bound.terms.items()}, confident)


@pytest.mark.parametrize(("text", "holds"), [
    ("ua < 1", True), ("ua <= 1", False), ("ua > 1", True), ("ua >= 1", False), ("flag_rate > 0.3", True),
    ("flag_rate > 0.285714", False), ("7 * flag_rate >= 2", False), ("7 * flag_rate > 2", True),  # no 0.285714
    ("fid > 3", True), ("fid - 3 * ua < 0", True), ("fid - 3 * ua <= 0", False), ("0.2 < flag_rate", False),
])  # fmt: skip
def test_a_bound_is_broken_where_it_is_true_exactly(text, holds):
    assert judged(text)["holds"] is holds


@pytest.mark.parametrize(("text", "end"), [
    ("flag_rate > 0.5", 0.64), ("flag_rate < 0.1", 0.08), ("0.5 < flag_rate", 0.64), ("1 - flag_rate < 0.5", 0.64),
    ("0 - flag_rate > -0.1", 0.08),
])  # fmt: skip
def test_confident_takes_the_end_that_breaks_sooner(text, end):
    sure, value = judged(text, confident=True), judged(text)
    assert sure["values"]["flag_rate"]["judged_at"] == end and not sure["holds"]
    assert value["values"]["flag_rate"]["judged_at"] == 0.285714 and value["holds"]
    assert judged("flag_rate > 0.65", confident=True)["holds"]


def test_a_number_without_an_interval_is_taken_as_it_is():
    entry = judged("fid > 3", confident=True)
    assert entry["holds"] and entry["values"] == {"fid": {"value": 3.0, "ci95": None, "judged_at": 3.0}}
    assert "fid" in reasons(entry) and "3" in reasons(entry) and "[" not in reasons(entry)


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("text", ["ra > 2", "ra < -1", "ra + ua > 99"])
def test_what_was_not_measured_does_not_pass(text, confident):
    entry = judged(text, confident)
    assert not entry["holds"] and entry["values"]["ra"] is None and "not measured" in reasons(entry)


def test_entries_are_json_and_have_what_decided():
    entry = judged("ua < 0.9", confident=True)
    assert json.loads(json.dumps(entry)) == entry == {
        "bound": "ua < 0.9", "holds": False, "confident": True,
        "values": {"ua": {"value": 1.0, "ci95": [0.44, 1.0], "judged_at": 0.44}},
    }  # fmt: skip
    for number in ("1", "[0.44, 1]", " 0.44"):
        assert number in reasons(entry)
