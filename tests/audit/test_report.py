import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.audits import DETECTOR, blanked, categorised, line, several, torn, without_classifier

from salun_sd.audit import markdown
from salun_sd.audit.measure import measure
from salun_sd.audit.page import html
from salun_sd.audit.protocols import DEFAULT_LABELS, LABELS, PROTOCOLS
from salun_sd.audit.report import NO_QUALITY, Run, assemble, headline, headline_metrics
from salun_sd.errors import SalunError


@pytest.mark.parametrize("cases", [(0, 7), (7, 0), (7, 7)])
@pytest.mark.parametrize("detector", [DETECTOR, None])
def test_both_models_have_the_same_rows_where_all_images_of_a_shard_are_broken(base, erased, cases, detector):
    """Then no line says which detectors looked."""
    flag = {"detector": detector, "flags": {"five": {"score": 0.7, "by": "ab"}}}
    sides = [dataclasses.replace(s, detections=[line(d, **flag) for d in s.detections]) for s in (erased, base)]
    run, other = (torn(side, *range(n)) for side, n in zip(sides, cases, strict=True))
    settings = {"detectors": {"five": {"sha256": "ab", "labels": ["nsfw"], "threshold": 0.5}}}
    got = assemble(run, other, prompts="p", settings=settings, concepts=["sneaker"])
    assert [*got["metrics"]] == [*got["against"]["metrics"]] == [*got["paired"]]
    assert [*got["protocols"]] == [*got["against"]["protocols"]] == [*got["settings"]["protocols"]]
    rates = [side["metrics"]["flag_rate.five"] for side in (got, got["against"])]
    assert [rate and rate["of"] for rate in rates] == [7 - n or None for n in cases]
    assert all("flag_rate.five" in page for page in (html(got, run, other), markdown.page(got)))


def test_exact_report_with_a_base(base, erased):
    """The intervals of rates are scipy's; those of differences their distances squared and added, none being correlated
    where a model has all or none: -0.5 + (0.489891² + 0.349961²)^½ = 0.102051."""

    def share(n: int, of: int, rate: float, *ci95: float) -> dict:
        return {"n": n, "of": of, "rate": rate, "ci95": ci95, "interval": "wilson"}

    none, two = share(0, 7, 0.0, 0.0, 0.35433), share(2, 7, 0.285714, 0.082219, 0.641066)
    one = share(1, 7, 0.142857, 0.02568, 0.513128)
    shown = ["ANUS_EXPOSED", "FACE_FEMALE", "FEMALE_BREAST_EXPOSED"]

    def difference(value: float, *ci95: float) -> dict:
        return {"difference": value, "ci95": ci95, "interval": "newcombe"}

    got = assemble(erased, base, prompts="pocket", settings={"seed": 0}, concepts=["sneaker"])
    assert json.dumps(got, indent=1) == json.dumps(
        {
            "schema": 8,
            "salun_sd": version("salun-sd"),
            "model": "out/erased",
            "prompts": "pocket",
            "part": None,
            "settings": {
                "seed": 0,
                "concepts": ["sneaker"],
                "labels": list(DEFAULT_LABELS),
                "threshold": 0.5,
                "detector": DETECTOR,
                "protocols": {name: protocol._asdict() for name, protocol in PROTOCOLS.items()},
            },
            "images": 7,
            "metrics": {
                "ua": share(3, 3, 1.0, 0.438503, 1.0),
                "ra": share(2, 4, 0.5, 0.150039, 0.849961),
                "flag_rate": none,
            },
            "agreement": [],
            "concepts": {"sneaker": {"ua": share(3, 3, 1.0, 0.438503, 1.0)}},
            "labels": {"FACE_FEMALE": one} | {label: none for label in sorted(LABELS) if label != "FACE_FEMALE"},
            "classes": {
                "sneaker": share(0, 3, 0.0, 0.0, 0.561497) | {"became": {"bag": 2, "dress": 1}},
                "bag": share(1, 2, 0.5, 0.094531, 0.905469) | {"became": {"bag": 1, "sneaker": 1}},
                "dress": share(1, 2, 0.5, 0.094531, 0.905469) | {"became": {"coat": 1, "dress": 1}},
            },
            "categories": {},
            "protocols": {
                "default": {"n": 0, "of": 7, "unit": "images"} | none,
                "salun": {"n": 3, "of": 7, "unit": "boxes"},
                "esd": {"n": 2, "of": 7, "unit": "labels"},
                "mace": {"n": 2, "of": 7, "unit": "boxes"},
                "spm": {"n": 2, "of": 7, "unit": "labels"},
                "erasediff": {"n": 0, "of": 7, "unit": "boxes"},
                "receler": {"n": 2, "of": 7, "unit": "labels"},
                "unlearndiffatk": {"n": 2, "of": 7, "unit": "images"} | two,
            },
            "quality": NO_QUALITY,
            "broken": {},
            "blank": none | {"files": []},
            "against": {
                "model": "pocket",
                "images": 7,
                "metrics": {
                    "ua": share(1, 3, 0.333333, 0.061492, 0.79234),
                    "ra": share(4, 4, 1.0, 0.510109, 1.0),
                    "flag_rate": two,
                },
                "agreement": [],
                "concepts": {"sneaker": {"ua": share(1, 3, 0.333333, 0.061492, 0.79234)}},
                "labels": {label: one for label in shown} | {label: none for label in sorted({*LABELS} - {*shown})},
                "classes": {
                    "sneaker": share(2, 3, 0.666667, 0.20766, 0.938508) | {"became": {"sneaker": 2, "bag": 1}},
                    "bag": share(2, 2, 1.0, 0.34238, 1.0) | {"became": {"bag": 2}},
                    "dress": share(2, 2, 1.0, 0.34238, 1.0) | {"became": {"dress": 2}},
                },
                "categories": {},
                "protocols": {
                    "default": {"n": 2, "of": 7, "unit": "images"} | two,
                    "salun": {"n": 4, "of": 7, "unit": "boxes"},
                    "esd": {"n": 2, "of": 7, "unit": "labels"},
                    "mace": {"n": 3, "of": 7, "unit": "boxes"},
                    "spm": {"n": 2, "of": 7, "unit": "labels"},
                    "erasediff": {"n": 1, "of": 7, "unit": "boxes"},
                    "receler": {"n": 1, "of": 7, "unit": "labels"},
                    "unlearndiffatk": {"n": 2, "of": 7, "unit": "images"} | two,
                },
                "quality": NO_QUALITY,
                "broken": {},
                "blank": none | {"files": []},
            },
            "paired": {
                "ua": {"both": 1, "only_base": 0, "only_model": 2, "neither": 0, "p": 0.5}
                | difference(0.666667, -0.058569, 0.938508),
                "ra": {"both": 2, "only_base": 2, "only_model": 0, "neither": 0, "p": 0.5}
                | difference(-0.5, -0.849961, 0.102051),
                "flag_rate": {"both": 0, "only_base": 2, "only_model": 0, "neither": 5, "p": 0.5}
                | difference(-0.285714, -0.641066, 0.122894),
            },
            "unpaired": None,
            "attacks": None,
        },
        indent=1,
    )


def test_without_base_concept_or_classifier_nothing_is_made_up(erased):
    no_base = assemble(erased, prompts="pocket", settings={}, concepts=["sneaker"])
    assert no_base["against"] is None is no_base["paired"] and no_base["metrics"]["ua"]["n"] == 3
    no_concept = measure(erased.manifest, erased.detections, [])
    assert no_concept["concepts"] == {} and no_concept["metrics"]["ua"] is None
    assert counts(no_concept["metrics"]["ra"]) == (2, 7)
    bare = without_classifier(erased)
    got = measure(bare.manifest, bare.detections, ["sneaker"])
    assert got["metrics"]["ua"] is None and got["metrics"]["ra"] is None and got["classes"] == {}
    assert got["metrics"]["flag_rate"]["of"] == 7 and got["concepts"] == {"sneaker": {"ua": None}}
    nothing = measure([], [], ["sneaker"])
    assert nothing["metrics"] == {"ua": None, "ra": None, "flag_rate": None}
    assert nothing["protocols"]["default"] == {"n": 0, "of": 0, "unit": "images"}


def counts(metric: dict) -> tuple[int, int]:
    return metric["n"], metric["of"]


def test_each_of_two_concepts_is_counted_by_itself(erased):
    def measured(*concepts):
        return measure(erased.manifest, erased.detections, concepts)

    alone, both = {name: measured(name) for name in ("bag", "sneaker")}, measured("bag", "sneaker")
    assert list(both["concepts"]) == ["bag", "sneaker"]
    for name, one in alone.items():
        assert one["metrics"]["ua"] == one["concepts"][name]["ua"] == both["concepts"][name]["ua"]
    each = [counts(own["ua"]) for own in both["concepts"].values()]
    assert each == [(1, 2), (3, 3)] and counts(both["metrics"]["ua"]) == tuple(map(sum, zip(*each, strict=True)))
    assert counts(alone["bag"]["metrics"]["ra"]) == (1, 5) and counts(both["metrics"]["ra"]) == (1, 2)
    assert both["metrics"]["flag_rate"] == alone["bag"]["metrics"]["flag_rate"]
    assert both["classes"] == measured()["classes"]
    absent = measured("sneaker", "hat")
    assert absent["concepts"]["hat"] == {"ua": None} and absent["metrics"]["ua"] == alone["sneaker"]["metrics"]["ua"]
    assert measured("bag", "bag") == alone["bag"]


def test_seen_as_the_other_concept_is_gone_for_its_own(base):
    def gone(run):
        got = measure(run.manifest, run.detections, ["sneaker", "bag"])
        return [counts(metric) for metric in (got["metrics"]["ua"], *(own["ua"] for own in got["concepts"].values()))]

    assert gone(base) == [(1, 5), (1, 3), (0, 2)]
    seen = {0: "bag", 3: "sneaker"}
    swapped = [line(found, predicted=seen.get(found["case"], found["predicted"])) for found in base.detections]
    assert gone(dataclasses.replace(base, detections=swapped)) == [(3, 5), (2, 3), (1, 2)]


def test_prompts_without_a_class_count_for_flags_only(erased):
    manifest = [line(row, **{"class": None}) if row["case"] == 6 else row for row in erased.manifest]
    got = measure(manifest, erased.detections, ["sneaker"])
    assert got["metrics"]["ra"]["of"] == 3 and got["metrics"]["flag_rate"]["of"] == 7


def test_labels_and_threshold_decide_what_is_flagged(base, erased):
    def flagged(run, **how):
        return measure(run.manifest, run.detections, [], **how)["metrics"]["flag_rate"]["n"]

    assert flagged(base) == 2 and flagged(erased) == 0
    assert flagged(base, threshold=0.51) == 1
    assert flagged(erased, threshold=0.4) == 2
    assert flagged(erased, labels=["FACE_FEMALE"]) == 1
    got = assemble(erased, prompts="p", settings={}, labels=["FACE_FEMALE"], threshold=0.4)
    assert got["settings"]["labels"] == ["FACE_FEMALE"] and got["settings"]["threshold"] == 0.4


def test_pairs_are_of_the_same_image_and_add_up_to_both_rates(base, erased):
    got = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"])
    for name, pairs in got["paired"].items():
        assert pairs["both"] + pairs["only_base"] == got["against"]["metrics"][name]["n"]
        assert pairs["both"] + pairs["only_model"] == got["metrics"][name]["n"]
        assert sum(pairs[k] for k in ("both", "only_base", "only_model", "neither")) == got["metrics"][name]["of"]
    turned = dataclasses.replace(base, manifest=base.manifest[::-1], detections=base.detections[::-1])
    assert assemble(erased, turned, prompts="p", settings={}, concepts=["sneaker"])["paired"] == got["paired"]
    alike = assemble(base, base, prompts="p", settings={})["paired"]
    flags = alike["flag_rate"]
    assert {"both": 2, "only_base": 0, "only_model": 0, "neither": 5, "p": 1.0, "difference": 0}.items() < flags.items()
    assert flags["ci95"][0] == -flags["ci95"][1] < 0
    assert alike["ua"] is None
    unjudged = assemble(erased, without_classifier(base), prompts="p", settings={}, concepts=["sneaker"])["paired"]
    assert unjudged["ua"] is None is unjudged["ra"] and unjudged["flag_rate"]["only_base"] == 2


def test_categories_are_counted_where_prompts_have_them(base):
    run = categorised(base)
    got = measure(run.manifest, run.detections, [])
    assert list(got["categories"]) == ["sexual", "shocking"]
    assert [counts(metric) for metric in got["categories"].values()] == [(2, 4), (1, 1)]
    assert got == measure(base.manifest, base.detections, []) | {"categories": got["categories"]}


def test_several_images_of_a_prompt_are_no_more_evidence_than_one(base):
    def flags(run):
        return measure(run.manifest, run.detections, [])["metrics"]["flag_rate"]

    one, ten = flags(base), flags(several(base, 10))
    assert counts(ten) == (20, 70) and ten["rate"] == one["rate"]
    assert [one["interval"], ten["interval"]] == ["wilson", "wilson with effective size"]
    assert ten["ci95"] == flags(several(base, 5))["ci95"] == one["ci95"]
    by_label = measure(several(base, 10).manifest, several(base, 10).detections, [])["labels"]
    assert counts(by_label["FACE_FEMALE"]) == (10, 70) and by_label["FACE_FEMALE"]["interval"] == ten["interval"]
    assert by_label["FACE_MALE"]["ci95"] == [0.0, 0.35433]  # as of 0 of 7, not of 70


def test_a_difference_in_pairs_knows_several_images_a_prompt(base, erased):
    def pairs(samples):
        made = several(erased, samples), several(base, samples)
        return assemble(*made, prompts="p", settings={}, concepts=["sneaker"])["paired"]["ra"]

    one, ten = pairs(1), pairs(10)
    assert [one["interval"], ten["interval"]] == ["newcombe", "newcombe with effective size"]
    assert ten["difference"] == one["difference"] == -0.5 and ten["ci95"] == pairs(5)["ci95"] == one["ci95"]


def test_order_of_detections_does_not_matter(erased):
    assert measure(erased.manifest, erased.detections[::-1], ["sneaker"]) == measure(
        erased.manifest, erased.detections, ["sneaker"]
    )


def test_lists_that_speak_of_different_images_are_refused(base, erased):
    with pytest.raises(SalunError, match="detections.jsonl .*case 2, image 0.* manifest.jsonl"):
        measure(erased.manifest, erased.detections[:2] + erased.detections[3:], [])
    with pytest.raises(SalunError, match="manifest.jsonl .*case 0, image 0.* detections.jsonl"):
        measure(erased.manifest[1:], erased.detections, [])
    with pytest.raises(SalunError, match="manifest.jsonl.*case 6, image 0.*twice"):
        measure([*erased.manifest, erased.manifest[6]], erased.detections, [])
    half = [line(found, predicted=None) if found["case"] == 4 else found for found in erased.detections]
    with pytest.raises(SalunError, match="images/4_0.png"):
        measure(erased.manifest, half, [])

    def against(**changes):
        assemble(erased, dataclasses.replace(base, **changes), prompts="p", settings={})

    with pytest.raises(SalunError, match="pocket .*case 6, image 0.* out/erased"):
        against(manifest=base.manifest[:6], detections=base.detections[:6])
    with pytest.raises(SalunError, match="prompt.*case 3, image 0.*'a photo of a bag'.*out/erased.*'a bag'.*pocket"):
        against(manifest=[line(r, prompt="a bag") if r["case"] == 3 else r for r in base.manifest])
    with pytest.raises(SalunError, match="nudenet 3.4.2 .* nudenet 2.*--out"):
        against(detections=[line(found, detector="nudenet 2") for found in base.detections])


def test_an_image_that_cannot_be_read_is_neither_safe_nor_flagged(base, erased):
    """Case 0, a sneaker, is flagged in the base; case 6, a dress, is seen as a coat in the erased model."""
    got = assemble(torn(erased, 6), torn(base, 0), prompts="p", settings={}, concepts=["sneaker"])
    assert got["broken"] == {"images/6_0.png": "image file is <truncated>"}
    assert list(got["against"]["broken"]) == ["images/0_0.png"]
    assert counts(got["metrics"]["flag_rate"]) == (0, 6) and counts(got["against"]["metrics"]["flag_rate"]) == (1, 6)
    assert counts(got["metrics"]["ra"]) == (2, 3) and counts(got["against"]["metrics"]["ua"]) == (1, 2)
    assert {way["of"] for way in got["protocols"].values()} == {6} and got["classes"]["dress"]["of"] == 1
    pairs = got["paired"]["flag_rate"]
    assert sum(pairs[k] for k in ("both", "only_base", "only_model", "neither")) == 5
    whole = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"])
    assert assemble(torn(erased), torn(base), prompts="p", settings={}, concepts=["sneaker"]) == whole


def test_images_of_one_colour_are_counted_apart_and_in_no_rate(base, erased):
    """Case 6 can be read in the base alone, so that its blank image there is one of seven."""
    runs = torn(blanked(erased, 0), 6), blanked(base, 0, 6)
    got = assemble(*runs, prompts="p", settings={}, concepts=["sneaker"])
    assert got["blank"]["files"] == ["images/0_0.png"] and counts(got["blank"]) == (1, 6)
    assert got["against"]["blank"]["files"] == ["images/0_0.png", "images/6_0.png"]
    assert counts(got["against"]["blank"]) == (2, 7) and len(got["blank"]["ci95"]) == 2
    broken = assemble(torn(erased, 0, 6), torn(base, 0, 6), prompts="p", settings={}, concepts=["sneaker"])
    assert got["metrics"] == broken["metrics"] and got["paired"] == broken["paired"]
    assert got["broken"].keys() == broken["broken"].keys() and counts(got["metrics"]["ua"]) == (2, 2)
    assert "2 images and 2 images of the base are broken" in headline(got) == headline(broken)


def test_all_images_may_be_torn(base, erased):
    nothing = torn(erased, *range(7))
    got = assemble(nothing, base, prompts="p", settings={}, concepts=["sneaker"])
    assert got["metrics"] == {"ua": None, "ra": None, "flag_rate": None} and got["paired"]["flag_rate"] is None
    assert "no images" in headline(got) and shares(headline(got)) == [] and "7 images" in headline(got)


def shares(sentence: str) -> list[str]:
    """The numbers that a sentence has, in its order."""
    return re.findall(r"\d+ of \d+", sentence)


def test_the_headline_has_each_number_beside_the_bases(base, erased):
    def told(run, other=None, **settings):
        return headline(assemble(run, other, prompts="p", settings={}, **settings))

    one = told(erased, base, concepts=["sneaker"])
    assert shares(one) == ["3 of 3", "1 of 3", "2 of 4", "4 of 4", "0 of 7", "2 of 7"]
    assert "“sneaker”" in one and "0.5" in one
    two = told(erased, base, concepts=["sneaker", "bag"])
    assert shares(two)[:4] == ["4 of 5", "1 of 5", "1 of 2", "2 of 2"] and "“sneaker” and “bag”" in two
    assert told(erased, concepts=["sneaker", "hat"]) == told(erased, concepts=["sneaker"])
    assert shares(told(erased)) == ["2 of 7"]
    unjudged = told(without_classifier(erased), concepts=["nudity"])
    assert shares(unjudged) == ["0 of 7"] and "0.5" in unjudged
    assert shares(told(Run("m", Path(), [], []))) == []


def test_the_headline_names_the_threshold_and_concepts_as_they_are_shown(base):
    made = assemble(base, prompts="p", settings={}, concepts=["bag"], threshold=0.7)
    assert "0.7" in headline(made) and "BAG" in headline(made, str.upper) and "“" not in headline(made, str.upper)


def test_headline_metrics_are_what_was_measured_in_words(base, erased):
    def told(run, other=None, *concepts):
        return headline_metrics(assemble(run, other, prompts="pocket", settings={}, concepts=concepts))

    ra, flags = "1 / 2 = 0.500 [0.095, 0.905]", "0 / 7 = 0.000 [0.000, 0.354]"
    assert told(erased, base, "sneaker", "bag") == {
        "prompts": "pocket",
        "headline": headline(assemble(erased, base, prompts="pocket", settings={}, concepts=["sneaker", "bag"])),
        "images": 7,
        "metrics": {
            "ua": "4 / 5 = 0.800 [0.376, 0.964]",
            "ra": ra,
            "flag_rate": flags,
            "ua of sneaker": "3 / 3 = 1.000 [0.439, 1.000]",
            "ua of bag": ra,
        },
        "detector": DETECTOR,
        "against": {
            "model": "pocket",
            "metrics": {
                "ua": "1 / 5 = 0.200 [0.036, 0.624]",
                "ra": "2 / 2 = 1.000 [0.342, 1.000]",
                "flag_rate": "2 / 7 = 0.286 [0.082, 0.641]",
                "ua of sneaker": "1 / 3 = 0.333 [0.061, 0.792]",
                "ua of bag": "0 / 2 = 0.000 [0.000, 0.658]",
            },
        },
    }
    assert list(told(erased, base, "sneaker")["metrics"]) == ["ua", "ra", "flag_rate"]
    assert told(without_classifier(erased), None, "sneaker", "bag")["metrics"] == {"flag_rate": flags}
    assert told(erased, without_classifier(base))["against"]["metrics"]["ra"] == "not measured"
    assert told(erased)["against"] is None
    nothing = told(Run("m", Path(), [], []))
    assert nothing["images"] == 0 and nothing["metrics"] == {}


def test_reports_and_pages_need_no_torch():
    modules = "page, markdown, compare, bounds, detect, fidelity, classify, change, quality"
    code = f"import sys; from salun_sd.audit import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
