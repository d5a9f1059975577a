import dataclasses
import html as html_escapes
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.audits import (
    ERASED,
    blanked,
    box,
    categorised,
    judged,
    line,
    make_entry,
    make_run,
    make_tries,
    several,
    sha256_of,
    torn,
    without_classifier,
)
from helpers.browser import CHROMIUM, Browser
from PIL import Image
from skimage.data import astronaut

from salun_sd.audit.examine import ONE_COLOUR
from salun_sd.audit.measure import measure
from salun_sd.audit.page import SHOWN, chosen, histogram, html, label_counts, marks
from salun_sd.audit.protocols import DEFAULT_LABELS, PROTOCOLS
from salun_sd.audit.report import NO_QUALITY, Run, assemble
from salun_sd.errors import SalunError
from salun_sd.runtime.escape import visible

EVIL = "<script>alert(1)</script>\"'&</style><img src=x onerror=alert(1)>{{ 7 * 7 }}"
TURNED = "\u202eevil\u202c \u2066left\u2069 \x00null \x1b[31m \x85 \x7f שלום \ud800"


def page_of(run: Run, base: Run | None = None, *concepts: str, images: bool = True, **settings) -> str:
    made = assemble(run, base, prompts="pocket", settings=settings, concepts=concepts)
    return html(made, run, base, images=images)


def text(page: str) -> str:
    """What stands on the page, in one line; what is isolated is not set apart."""
    bare = re.sub(r"<style>.*?</style>|<[^>]*>", " ", re.sub("</?bdi>", "", page), flags=re.S)
    return html_escapes.unescape(re.sub(r"\s+", " ", bare))


def rows(page: str, start: str = "") -> list[list[str]]:
    """The texts of each table row's cells, of those rows whose first cell begins so."""
    found = [re.findall(r"<t[hd][^>]*>(.*?)(?=<t[hd][ >]|</tr>|$)", row, re.S)
             for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)]  # fmt: skip
    cells = [[text(cell).strip() for cell in row] for row in found]
    return [row for row in cells if row and row[0].startswith(start)]


def headings(page: str, level: int = 2) -> list[str]:
    return [text(heading) for heading in re.findall(rf"<h{level}[^>]*>(.*?)</h{level}>", page, re.S)]


def galleries(page: str) -> list[tuple[str, str]]:
    """The heading of each group of images, and how it was chosen."""
    pairs = re.findall(r"<h3>(.*?)</h3>\s*<p>(.*?)</p>", page, re.S)
    return [(text(heading), text(how)) for heading, how in pairs]


def section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.S)[1]


def still_seen(page: str) -> list[str]:
    """The captions that say that a picture still shows its concept."""
    captions = [text(words).strip() for words in re.findall("<strong>(.*?)</strong>", page)]
    return [caption for caption in captions if caption.startswith("still")]


def numbers(text: str) -> list[str]:
    return re.findall(r"[+−]?\d+(?:\.\d+)?", text)


def sources(page: str) -> list[str]:
    return re.findall(r'src="([^"]*)"', page)


def cases(page: str) -> list[int]:
    return [int(case) for case in re.findall(r"</bdi><small>case (\d+)", page)]


def longer(run: Run, scores: list[float | None], **changes) -> Run:
    """As many images as scores of a flagged label, None for no box; the seven images of the run in turn."""
    manifest = [line(run.manifest[case % 7], case=case, **changes) for case in range(len(scores))]
    found = [
        line(run.detections[case % 7], case=case, boxes=[box("ANUS_EXPOSED", score)] if score else [])
        for case, score in enumerate(scores)
    ]
    return dataclasses.replace(run, manifest=manifest, detections=found)


def groups(run: Run, *concepts: str, count: int = 30) -> dict[str, tuple[list[int], int]]:
    lines = {(r["case"], r["k"]): (r, d) for r, d in zip(run.manifest, run.detections, strict=True)}
    samples = chosen(lines, concepts, DEFAULT_LABELS, count)
    return {name: ([case for case, _ in sample.keys], sample.of) for name, sample in samples.items()}


def test_the_worst_come_first_and_the_rest_is_a_random_draw(erased):
    scores = [0.3 + case / 250 if case % 3 == 0 else None for case in range(100)]
    got = groups(longer(erased, scores), count=10)
    assert got["worst"] == ([99, 96, 93, 90, 87, 84, 81, 78, 75, 72], 34)
    drawn, of = got["others"]
    assert of == 90 and len(drawn) == 10 and drawn == sorted(drawn) and not set(drawn) & set(got["worst"][0])
    assert drawn == groups(longer(erased, scores), count=10)["others"][0]
    assert drawn not in ([*range(10)], [*range(0, 100, 10)])
    assert got["still"] == got["of_concepts"] == ([], 0)


def test_images_that_are_still_seen_as_the_concept_are_shown_surest_first(base):
    run = longer(base, [None] * 70)
    found = [line(found, score=0.5 + found["case"] / 200) for found in run.detections]
    got = groups(dataclasses.replace(run, detections=found), "sneaker", count=10)
    assert got["still"] == ([64, 63, 57, 56, 50, 49, 43, 42, 36, 35], 20)  # cases 0 and 1 of every seven
    assert got["of_concepts"][1] == 20 and got["others"][1] == 40
    assert all(case % 7 < 3 for case in got["of_concepts"][0])
    everything = groups(run, "sneaker", count=100)
    assert sorted(case for shown, _ in everything.values() for case in shown) == list(range(70))
    assert len(everything["still"][0]) == 20 and len(everything["of_concepts"][0]) == 10


def test_each_group_says_how_it_was_chosen_and_of_how_many(erased):
    """Of every seven images three are asked for as a sneaker, and two as a bag, of which one is seen as a bag."""
    run = longer(erased, [0.9] * 35 + [None] * 385)
    worst, asked, others = galleries(page_of(run, None, "sneaker"))
    assert f"{SHOWN} of 35" in worst[1]
    assert "“sneaker”" in asked[0] and f"{SHOWN} of {180 - 14}" in asked[1] and "seed 0" in asked[1]
    assert f"{SHOWN} of {240 - 16}" in others[1] and "seed 0" in others[1]
    _, still, asked, _ = galleries(page_of(run, None, "bag"))
    assert "“bag”" in still[0] and f"{SHOWN} of {60 - 4}" in still[1] and "“bag”" in asked[0]
    few = galleries(page_of(erased, None, "sneaker"))
    assert len(few) == 3 and not any("random" in how for _, how in few)


def test_histogram_agrees_with_the_rates_at_every_threshold(erased):
    rng = np.random.default_rng(0)
    edges = [0.25, 0.45, 0.4499999, 0.5, 0.55, 0.6, 0.65, 0.95, 1.0]
    run = longer(erased, [*edges, *rng.uniform(0.25, 1, 300), *[None] * 50])
    counted = histogram(run.detections, DEFAULT_LABELS)
    assert len(counted["bins"]) == 15 and counted["below"] == 50
    assert sum(counted["bins"]) + counted["below"] == len(run.manifest)
    for threshold in (0.25, 0.45, 0.5, 0.6, 0.95):
        flags = measure(run.manifest, run.detections, [], threshold=threshold)["metrics"]["flag_rate"]["n"]
        assert sum(counted["bins"][round((threshold - 0.25) / 0.05) :]) == flags, threshold
    other = histogram(run.detections, ["FACE_MALE"])
    assert other["bins"] == [0] * 15 and other["below"] == len(run.manifest)


def test_thresholds_are_marked_with_the_names_of_who_counts_from_them(erased):
    settings = assemble(erased, prompts="p", settings={}, threshold=0.7)["settings"]
    assert marks(settings) == [(0.45, ["unlearndiffatk"]), (0.5, ["default"]), (0.6, ["erasediff"]), (0.7, ["flagged"])]
    said = page_of(erased)
    for at, who in ((0.45, "unlearndiffatk"), (0.5, "flagged, default"), (0.6, "erasediff")):
        assert re.search(rf'class="mark" style="--x:{100 * (at - 0.25) / 0.75!s:.5}[^>]*><span>{at} {who}<', said)
    at = rows(said).index(["0.45 to 0.50", "2"])
    assert rows(said)[at + 1] == ["0.50 to 0.55", "0"] and rows(said)[at - 5][1] == "5"  # without a box


def test_bars_of_labels_are_of_both_models_the_longest_first(base, erased):
    made = assemble(erased, base, prompts="p", settings={})
    got = label_counts(made)
    assert got["FEMALE_BREAST_EXPOSED"] == [("base", 1), ("erased", 0)]
    assert got["FACE_FEMALE"] == [("base", 1), ("erased", 1)] and "BUTTOCKS_EXPOSED" not in got
    longest = [max(n for _, n in counts) for counts in got.values()]
    assert longest == sorted(longest, reverse=True)
    unread = label_counts(assemble(torn(erased, *range(7)), base, prompts="p", settings={}))
    assert unread == {label: [("base", 1), ("erased", 0)] for label in got}


def test_page_is_one_file_that_asks_for_nothing(base, erased):
    page = page_of(erased, base, "sneaker", size=None)
    assert page.startswith("<!doctype html>")
    for outside in ("http://", "https://", "url(", "@import", "<link", "<script"):
        assert outside not in page
    assert len(sources(page)) == 14 and all(src.startswith("data:image/png;base64,") for src in sources(page))
    assert page.count("src=") == 14
    assert still_seen(page) == []
    assert ["size", "none"] in rows(page)  # a setting without a value


def test_page_without_pictures_lists_what_stands_out(base, erased):
    page = page_of(erased, base, "bag", images=False)
    assert "<img" not in page and "data:" not in page.partition("</style>")[2] and "<input" not in page
    [(prompt, of_base, of_erased)] = rows(page, "a photo of a sneaker")
    assert all(part in prompt for part in ("case 0", "seed 100", "images/0_0.png"))
    assert "female breast exposed 0.50" in of_base and "buttocks exposed 0.50" in of_erased
    assert cases(page) == [0, 6, 3]  # the scores in the order of the prompts, as they are alike; the bag still seen
    assert still_seen(page) == ["still bag"] and "random" not in text(page)
    assert page_of(erased).count("<img") == 7


def test_page_without_pictures_says_where_nothing_stands_out(erased):
    bare = dataclasses.replace(erased, detections=[line(found, boxes=[]) for found in erased.detections])
    plain, of_concept = (section(page_of(bare, None, *own, images=False), "images") for own in ((), ("sneaker",)))
    assert "Nothing" in plain and "Nothing" in of_concept and "sneaker" in of_concept and "sneaker" not in plain
    assert "Nothing" not in section(page_of(erased, images=False), "images")


def test_page_of_several_concepts_has_each_by_itself(base, erased):
    two, one = page_of(erased, base, "sneaker", "bag"), page_of(erased, base, "sneaker")
    assert "<dd><bdi>sneaker</bdi>, <bdi>bag</bdi></dd>" in two and "<dd><bdi>sneaker</bdi></dd>" in one
    each = [
        ["sneaker", "1 / 3 6.1 to 79.2 %", "3 / 3 43.9 to 100.0 %"],
        ["bag", "0 / 2 0.0 to 65.8 %", "1 / 2 9.5 to 90.5 %"],
    ]
    assert all(
        any(row[:3] == own for row in rows(two)) and not any(row[:3] == own for row in rows(one)) for own in each
    )
    became = [
        [sum(f"“{name}”" in heading for heading in headings(page)) for name in ("sneaker", "bag")]
        for page in (two, one)
    ]
    assert became == [[1, 1], [1, 0]]
    assert [page.count('class="note"') for page in (two, one)] == [2, 1]
    [(heading, how)] = [group for group in galleries(two) if "“sneaker” and “bag”" in group[0]]
    assert "3" in how
    assert still_seen(two) == ["still bag"]  # case 4, a bag seen as a sneaker, is gone
    half = page_of(without_classifier(erased), base, "sneaker", "bag")
    assert not any(row[0] in ("sneaker", "bag") for row in rows(half)) and len(unmeasured(half)) == 2


def unmeasured(page: str) -> list[str]:
    """The metrics that a page says were not measured."""
    return [row[0] for row in rows(section(page, "measured")) if "Not measured" in row[0]]


def evil(run: Run, prompt: str) -> tuple[dict, Run]:
    """An audit in which everything that people, files and models name is that text."""
    manifest = [line(row, prompt=prompt, categories=[prompt], **{"class": prompt}) for row in run.manifest]
    seen = [
        line(found, predicted=[prompt, prompt[::-1]][n % 2], detector=prompt, boxes=[box(prompt, 0.9)])
        for n, found in enumerate(run.detections)
    ]
    run = dataclasses.replace(run, model=prompt, manifest=manifest, detections=seen)
    settings = {"note": prompt, prompt: {prompt: [prompt]}}
    made = assemble(run, run, prompts=prompt, settings=settings, concepts=[prompt], labels=[prompt])
    fid = {"name": prompt, "value": 1.0, "note": prompt, "images": [1, 2], "reference": prompt}
    extra = {"broken": {prompt: prompt}, "quality": NO_QUALITY | {"change": fid, "fid": fid}}
    made["against"] |= extra
    gate = {"bound": prompt, "holds": False, "confident": False, "values": {prompt: None}}
    return made | extra | {"gate": [gate], "attacks": under_attack(prompt)}, run


def under_attack(text: str, **about) -> dict:
    """A report's attacks: prefix, and relearn in stages, whose last is that text."""
    relearn = make_entry(stages=["no attack", "10 steps", text], from_picture=True, **about)
    relearn["sides"]["model"]["back_at"] = text
    false_positives = {"n": 1, "of": 9, "rate": 0.111111, "ci95": [0.02, 0.4], "interval": "wilson"}
    entries = {"prefix": make_entry(), "relearn": relearn}
    return {"judged_by": text, "false_positives": false_positives, "of": entries, "failed": {"tokens": text},
            "not_run": {"benign": text}}  # fmt: skip


@pytest.mark.parametrize("images", [True, False])
def test_page_shows_what_people_and_models_wrote_as_text(erased, images):
    made, run = evil(erased, EVIL)
    page = html(made, run, run, images=images)
    assert "<script" not in page and page.count("&lt;script&gt;") > 30 and "onerror=alert(1)>" not in page
    assert page.count("</style>") == 1 and "{{ 7 * 7 }}" in page
    assert text(page).count(EVIL) > 30


@pytest.mark.parametrize("images", [True, False])
def test_page_shows_control_characters_instead_of_obeying_them(erased, images):
    made, run = evil(erased, TURNED)
    page = html(made, run, run, images=images)
    assert not set(page) & {c for c in TURNED if visible(c) != c}
    assert page.count("⟨U+202E⟩evil⟨U+202C⟩ ⟨U+2066⟩left⟨U+2069⟩ ␀null ␛[31m ⟨U+0085⟩ ␡ שלום \ufffd") > 30
    page.encode()
    isolated = re.sub(r"<title>.*?</title>|<bdi>.*?</bdi>|<[^>]*>", "", page, flags=re.S)
    assert "evil" in page and "evil" not in isolated and "שלום" not in isolated


def test_a_very_long_prompt_is_cut(erased):
    manifest = [line(row, prompt="word " * 10_000) for row in erased.manifest]
    page = page_of(dataclasses.replace(erased, manifest=manifest))
    assert page.count("word ") == 7 * 1000 / len("word ") and page.count("word …") == 7


def test_images_with_any_box_of_a_flagged_label_are_blurred_until_chosen(base, erased):
    page = page_of(erased, base, "sneaker")
    blurred = re.findall(r'<label class="frame flagged"><input type="checkbox" aria-label="([^"]+)"><img ', page)
    assert len(blurred) == 4 == page.count("<input")  # 0.4999 is no flag, and blurred all the same
    [of_base] = [name for name in blurred if "case 3" in name]
    assert all(part in of_base for part in ("base", "seed 103", "bag", "anus exposed", "0.80"))
    veils = Counter(re.findall('class="veil" aria-hidden="true">(.*?)<', page))
    assert veils["flagged"] == 2 and len(veils) == 2 and veils.total() == 4
    faces = [line(found, boxes=[box("FACE_FEMALE", 0.9)]) for found in erased.detections]
    assert "<input" not in page_of(dataclasses.replace(erased, detections=faces))


def test_page_without_a_base_has_no_base(base, erased):
    alone, both = page_of(erased, None, "sneaker"), page_of(erased, base, "sneaker")
    assert "base" in text(both) and "base" not in text(alone)
    assert len(sources(alone)) == 7
    assert not unmeasured(alone) and len(unmeasured(page_of(without_classifier(erased)))) == 2


def test_page_counts_as_each_paper_does(base, erased):
    both, alone = page_of(erased, base), page_of(erased)
    for page in (both, alone):
        papers, settings = section(page, "papers"), section(page, "settings")
        assert "7 images" in text(papers)
        for name, way in PROTOCOLS.items():
            [counted] = [row for row in rows(papers, name) if f" {len(way.labels)} " in row[0]]
            assert [way.source] in rows(papers) and (str(way.threshold) in counted[0] or not way.threshold)
            assert [name, ", ".join(way.labels)] in rows(settings)
    assert rows(section(both, "papers"))[0][1:] == ["base", "erased"]
    assert rows(section(alone, "papers"))[0][1:] == ["audited"]
    assert rows(section(both, "papers"), "default")[0][1:] == ["2 images 8.2 to 64.1 %", "0 images 0.0 to 35.4 %"]
    assert rows(section(both, "papers"), "salun")[0][1:] == ["4 boxes", "3 boxes"]
    assert rows(section(alone, "papers"), "salun")[0][1:] == ["3 boxes"]


def test_page_has_every_setting(erased):
    settings = {"sampling": {"steps": 50, "safety_checker": "off"}, "where": [], "limit": None, "a": {"b": {"c": 1}}}
    shown = rows(section(page_of(erased, **settings), "settings"))
    for row in (["sampling: steps", "50"], ["sampling: safety_checker", "off"], ["where", "none"], ["limit", "none"],
                ["a: b: c", "1"], ["threshold", "0.5"]):  # fmt: skip
        assert row in shown
    assert any(name == "detector" and value.startswith("nudenet 3.4.2") for name, value in shown)


def pairs_of(page: str) -> list[list[str]]:
    """Of each metric the numbers of its pairs, in the order of the page: in the base only, in the erased model only, in
    both, in neither; the difference and its interval; how many differ, and p."""
    found = [numbers(text(cell).replace("95 %", "")) for cell in re.findall(r'class="paired">(.*?)</td>', page, re.S)]
    assert all(len(of_metric) in (7, 9) for of_metric in found)
    return found


def test_page_says_what_pairs_show_and_how_sure_that_is(base, erased):
    page = page_of(erased, base, "sneaker")
    gone, as_asked, flagged = pairs_of(page)
    assert flagged == ["2", "0", "0", "5", "−28.6", "−64.1", "+12.3", "2", "0.5"]
    assert gone[:4] == ["0", "2", "1", "0"] and as_asked[:4] == ["2", "0", "2", "0"]
    assert "alike" not in text(page) and "(95 %: wilson)" in text(page)
    assert pairs_of(page_of(erased, None, "sneaker")) == []
    assert {len(of_metric) for of_metric in pairs_of(page_of(base, base, "sneaker"))} == {7}  # none differ: no p
    repeated = text(page_of(several(erased, 3), several(base, 3), "sneaker"))
    assert "alike" in repeated and "(95 %: wilson with effective size)" in repeated


def test_page_has_categories_where_prompts_do(base, erased):
    page = page_of(categorised(erased), categorised(base))
    assert rows(page, "sexual")[0][1:3] == ["2 / 4 15.0 to 85.0 %", "0 / 4 0.0 to 49.0 %"]
    assert not rows(page_of(erased), "sexual") and len(headings(page)) == len(headings(page_of(erased, base))) + 1


def test_page_says_whether_the_gate_holds(base, erased):
    made = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"])
    bounds = ["flag_rate > 0.01", "clip_score < 0.3", "ra < 0.6"]

    def of_gate(*texts, confident):
        gate = [judged(made, text, confident) for text in texts]
        return rows(re.search('class="lined gate">.*?</table>', html(made | {"gate": gate}, erased, base), re.S)[0])[1:]

    flags, clip, ra = of_gate(*bounds, confident=True)
    assert flags[0].startswith("flag_rate > 0.01 ") and flags[0].count("0.35433") == 2 and flags[1] == "failed"
    assert clip[0].startswith("clip_score < 0.3 ") and clip[1] == "failed" and ra[0].startswith("ra < 0.6 ")
    [[calm, passed]] = of_gate(bounds[0], confident=False)
    assert calm.startswith("flag_rate > 0.01 ") and calm.count("0.35433") == 1 and passed == "passed"
    assert not any(
        "gate" in html(ungated, erased, base).partition("</style>")[2] for ungated in (made, made | {"gate": None})
    )


def test_page_has_the_quality_of_both_models_with_the_metrics_whole_names(base, erased):
    clip = {"name": "clip score[tiny]", "value": 0.26541, "ci95": [0.25, 0.27], "images": 7}
    fid = {"name": "fid[x]", "value": 12.3, "note": "Too few.", "images": [7, 9], "reference": "pocket"}
    change = {"name": "change[y]", "value": 0.1, "ci95": None, "images": 3}
    quality = (
        NO_QUALITY | {"change": change, "clip_score": clip, "fid": fid},
        NO_QUALITY | {"clip_score": clip | {"value": 0.281}},
    )
    page = html(assemble(erased, base, prompts="p", settings={}, quality=quality), erased, base)
    shown = rows(page)
    at, end = (shown.index(rows(page, name)[0]) for name in ("clip score[tiny]", "fid[x]"))
    assert shown[at - 1] == ["erased", "0.1", "", "3"] and shown[at - 2][0].startswith("change[y]")
    assert shown[at + 1 : end] == [["base", "0.281", "0.25 to 0.27", "7"], ["erased", "0.2654", "0.25 to 0.27", "7"]]
    assert (
        "pocket" in shown[end][0]
        and "Too few." in shown[end][0]
        and shown[end + 1] == ["erased", "12.3", "", "7 and 9"]
    )
    assert 'class="metrics quality"' in page and 'class="metrics quality"' not in page_of(erased, base)


def test_page_has_a_row_for_each_attack_beside_its_control_and_floor(base, erased):
    made = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"])
    page = html(made | {"attacks": under_attack("50 steps")}, erased, base)
    attacks = section(page, "attacks")
    head, prefix, relearn, _, *stages = rows(attacks)
    assert head == ["Attack", "before", "ASR", "fresh", "control", "floor", "ASR − control", "ASR − floor"]
    assert "best of 2" in prefix[0] and "quick" in prefix[0] and "at 50 steps" in relearn[0]
    assert prefix[1:6] == ["25.0 % 1 / 4 5 to 70 %", "75.0 % 3 / 4 30 to 95 %", "50.0 % 2 / 4 9 to 91 %",
                           "50.0 % 2 / 4 15 to 85 %", "25.0 % 1 / 4 5 to 70 %"]  # fmt: skip
    assert [cell.partition(" ")[0] for cell in prefix[6:]] == ["+25.0", "+50.0"]
    assert [stage[0] for stage in stages] == ["no attack", "10 steps", "50 steps"] and len(stages[0]) == 4
    for of_the_text in ("1 for the concept", "“relearn”", "“tokens”"):  # which begins with a picture; which failed
        assert of_the_text in text(attacks)
    assert 'id="attacks"' in page and "#attacks" in page and "attacks" not in html(made, erased, base)
    assert ["attack prefix: lr", "0.01"] in rows(section(page, "settings"))
    with_base = under_attack("50 steps")
    with_base["of"]["prefix"]["sides"]["base"] = with_base["of"]["prefix"]["sides"]["model"]
    head, prefix, relearn, *_ = rows(section(html(made | {"attacks": with_base}, erased, base), "attacks"))
    assert head[4:] == ["control", "floor", "base", "ASR − control", "ASR − floor"]
    assert prefix[6] == prefix[2] and relearn[6] == "–"


def test_pictures_of_attacks_are_successes_and_always_blurred(base, erased, tmp_path):
    tries = make_tries("out/erased", {n: "bbSS" for n in range(20)}, tmp_path, prompt=EVIL)
    made = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"]) | {"attacks": under_attack("last")}
    attacks = section(html(made, erased, base, attacks={"prefix": tries, "relearn": tries}), "attacks")
    assert len(sources(attacks)) == attacks.count('class="frame flagged"') == attacks.count("<input") == 12
    assert text(attacks).count(EVIL) == 12 and "<script" not in attacks
    shown = re.findall(r"<small><bdi>(\w+)</bdi>, case (\d+), image (\d+)", attacks)
    assert [(name, int(case)) for name, case, _ in shown] == [(a, n) for n in range(6) for a in ("prefix", "relearn")]
    assert {k for *_, k in shown} == {"2"}
    bare = html(made, erased, base, images=False, attacks={"prefix": tries})
    assert "<img" not in bare and rows(section(bare, "attacks"), "prefix")
    none = make_tries("out/erased", {0: "Sbb"}, tmp_path)
    assert not sources(section(html(made, erased, base, attacks={"prefix": none}), "attacks"))


def test_page_names_what_could_not_be_read_and_shows_none_of_it(base, erased):
    why = "image file is <truncated>"
    assert not [row for row in rows(page_of(erased, base)) if why in row]
    (erased.folder / "images" / "6_0.png").write_bytes(b"")
    run, other = torn(erased, 6), torn(base, 0, 1)
    page = page_of(run, other, "sneaker")
    lead = text(re.search('class="lead">(.*?)</p>', page)[1])
    assert "1 image " in lead and "2 images " in lead
    assert [row for row in rows(page) if row[-1] == why] == [
        ["base: images/0_0.png", why], ["base: images/1_0.png", why], ["images/6_0.png", why]]  # fmt: skip
    assert "image file is &lt;truncated&gt;" in page and page.count("images/6_0.png") == 1
    assert sorted(cases(page)) == [*range(6)] and len(sources(page)) == 6 + 4
    assert page.count('class="frame unread"') == 2 and text(page).count(why) == 3 + 2
    scores = rows(page_of(torn(erased, 5, 6), images=False))
    assert scores[scores.index(["0.25 to 0.30", "0"]) - 1][1] == "4"  # without a box
    assert 'class="lined files"' in page_of(torn(erased, *range(7)), base)


def test_page_names_images_of_one_colour(base, erased):
    page = page_of(erased, blanked(base, 2))
    assert ["base: images/2_0.png", ONE_COLOUR] in rows(page) and f"broken: {ONE_COLOUR}" in text(page)


def test_page_lists_the_first_hundred_unreadable_files(erased):
    run = longer(erased, [None] * 110)
    found = [line(found, file=f"{case}.png") for case, found in enumerate(run.detections)]
    said = text(page_of(torn(dataclasses.replace(run, detections=found), *range(102))))
    assert "102 images" in said and said.count("image file is <truncated>") == 100


def test_page_of_no_images_still_opens():
    page = page_of(Run("m", Path(), [], []))
    assert page.rstrip().endswith("</html>") and "<img" not in page and "0 / 0" not in text(page)


def test_a_picture_that_is_gone_is_named(erased):
    (erased.folder / "images" / "6_0.png").unlink()
    with pytest.raises(SalunError, match="6_0.png"):
        page_of(erased)


def test_a_picture_that_was_replaced_since_it_was_looked_at_is_named_and_not_shown(erased):
    assert len(sources(page_of(erased))) == 7
    Image.new("RGB", (32, 32), "red").save(erased.folder / "images" / "6_0.png")
    with pytest.raises(SalunError, match="6_0.png"):
        page_of(erased)
    assert not sources(page_of(erased, images=False)) and len(sources(page_of(torn(erased, 6)))) == 6


def test_files_of_other_programs_may_lie_elsewhere(erased):
    """Absolute paths in the manifest stand as they are; seed, guidance and steps may be unknown."""
    manifest = [
        line(row, file=str(erased.folder / row["file"]), seed=None, guidance=None, steps=None)
        for row in erased.manifest
    ]
    page = page_of(dataclasses.replace(erased, folder=Path("elsewhere"), manifest=manifest))
    assert len(sources(page)) == 7 and "seed 1" not in page


def faces(folder: Path, side: int, noise: int = 0) -> Path:
    """Six crops of a photograph, with that much noise to make them hard to compress."""
    (folder / "images").mkdir(parents=True)
    photo, rng = Image.fromarray(astronaut()), np.random.default_rng(0)
    for n in range(6):
        crop = np.asarray(photo.crop((40 * n, 20 * n, 40 * n + 260, 20 * n + 260)).resize((side, side))).astype(int)
        crop += rng.integers(-noise, noise + 1, crop.shape)
        Image.fromarray(crop.clip(0, 255).astype(np.uint8)).save(folder / f"images/{n}.png", compress_level=1)
    return folder


def of_i2p_size(run: Run, folder: Path, count: int = 4703) -> Run:
    """A run of so many long prompts, a third flagged, a third still seen as the concept."""
    scores = [0.25 + 0.7 * (case * 37 % 100) / 100 if case % 3 == 0 else None for case in range(count)]
    long = longer(run, scores, prompt="a photo of 宇航员 " * 40)
    manifest = [line(row, file=f"images/{row['case'] % 6}.png", categories=["sexual"]) for row in long.manifest]
    digests = [sha256_of(folder / f"images/{n}.png") for n in range(6)]
    detections = [line(d, predicted="sneaker", sha256=digests[d["case"] % 6]) for d in long.detections]
    return dataclasses.replace(long, folder=folder, manifest=manifest, detections=detections)


def test_page_of_4703_pairs_stays_under_five_megabytes(erased, tmp_path):
    run = of_i2p_size(erased, faces(tmp_path / "faces", 256, noise=60))
    base = dataclasses.replace(run, model="base")
    made = assemble(run, base, prompts="pocket", settings={}, concepts=["sneaker"])
    page = html(made, run, base)
    assert 1_000_000 < len(page.encode()) < 5_000_000 and page.count("<img") == 2 * 4 * SHOWN
    assert len(html(made, run, base, images=False).encode()) < 500_000


CONTRASTS = """
(() => {
  const parse = colour => { const n = colour.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1] }
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1)
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                       return .2126 * r + .7152 * g + .0722 * b }
  const behind = e => e ? over(parse(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255, 1]
  const worst = []
  for (const e of document.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) || !e.getClientRects().length) continue
    const back = behind(e), [a, b] = [light(over(parse(getComputedStyle(e).color), back)), light(back)]
    worst.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 80)])
  }
  return worst.sort((x, y) => x[0] - y[0])[0]
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no chromium on PATH")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The page of an audit in which everything is there, and prompts and names are hostile."""
    folder = tmp_path_factory.mktemp("audit")
    small = make_run(folder / "small", "out/erased", ERASED, {})
    run = of_i2p_size(small, faces(folder / "faces", 512), count=60)
    manifest = [line(row, prompt=[EVIL, TURNED, "w" * 300][row["case"] % 3]) for row in run.manifest]
    run = dataclasses.replace(run, manifest=manifest)
    made = assemble(run, run, prompts="p" * 200, settings={"note": EVIL}, concepts=["sneaker", "bag"])
    made = evil(small, EVIL)[0] | made | {"attacks": under_attack(EVIL)}
    tries = make_tries("out/erased", {n: "bS" for n in range(3)}, folder / "small", prompt=TURNED)
    (folder / "report.html").write_text(html(made, run, run, attacks={"prefix": tries}), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def audit(browser, written) -> Browser:
    browser.media()
    browser.screen(1200)
    browser.open(written)
    return browser


def test_browser_opens_the_page_from_disk_and_asks_for_nothing_else(audit):
    pictures = audit.value("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(pictures) == 123 and all(done and width in (192, 32) for done, width in pictures)
    wanted = {request["request"]["url"][:11] for request in audit.happened("Network.requestWillBeSent")}
    assert {url.partition(":")[0] for url in wanted} == {"file", "data"} and len(wanted) == 2
    assert audit.happened("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    assert audit.value("document.scripts.length") == 0
    # the same means do see a page that asks for more
    audit.value("new Promise(done => { const i = new Image(); i.onerror = done; i.src = 'https://example.invalid/x' })")
    assert "Content Security Policy" in str(audit.happened("Log.entryAdded", "Runtime.consoleAPICalled"))


def test_browser_blurs_flagged_pictures_until_chosen_by_mouse_or_keyboard(audit):
    state = """[...document.querySelectorAll('.flagged')].slice(0, 2).map(label =>
        getComputedStyle(label.querySelector('img')).filter + ' ' +
        getComputedStyle(label.querySelector('.veil')).display)"""
    hidden = "blur(24px) saturate(0.6) grid"
    assert audit.value(state) == [hidden, hidden]
    assert audit.value("document.querySelectorAll('.flagged').length") == 43
    audit.value("document.querySelector('.flagged').click()")
    assert audit.value(state) == ["none none", hidden]
    audit.value("document.querySelectorAll('.flagged input')[1].focus()")
    audit.press_space()
    assert audit.value(state) == ["none none", "none none"]
    audit.press_space()
    audit.media(kind="print")
    assert audit.value(state) == ["none none", hidden]
    other = "[...document.images].filter(i => !i.closest('.flagged')).every(i => getComputedStyle(i).filter == 'none')"
    assert audit.value(other)


def test_browser_tells_a_screen_reader_what_a_blurred_picture_is(audit):
    nodes = audit.call("Accessibility.getFullAXTree")["nodes"]
    boxes = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") == "checkbox"]
    assert len(boxes) == 43 and all("blurred" in name for name in boxes)
    assert sum("score 0." in name for name in boxes) == 40  # the others are of an attack
    pictures = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") in ("image", "img")]
    assert pictures and all(" case " in name for name in pictures)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_every_text_with_the_contrast_of_wcag_aa(audit, scheme):
    audit.media(scheme)
    ratio, where = audit.value(CONTRASTS)
    assert 4.5 <= ratio < 21, where
    paper = audit.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(22, 24, 27)") == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 375, 768])
def test_browser_scrolls_no_page_sideways(audit, width):
    audit.screen(width)
    assert audit.value("document.documentElement.scrollWidth") <= width


def test_browser_has_every_table_whole_on_a_phone(audit):
    audit.screen(375)
    audit.value("document.querySelectorAll('details').forEach(details => details.open = true)")
    wider = "[...document.querySelectorAll('.card')].filter(card => card.scrollWidth > card.clientWidth)"
    assert audit.value(f"{wider}.map(card => card.ariaLabel)") == []
    names = "[...document.querySelectorAll('th[scope=row], th[scope=rowgroup]')].filter(th => th.clientWidth)"
    assert audit.value(f"Math.min(...{names}.map(th => th.clientWidth))") > 40
