import base64
import dataclasses
import html as html_escapes
import io
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.audits import ERASED, box, categorised, line, make_run, several, torn, without_classifier
from helpers.browser import CHROMIUM, Browser
from PIL import Image
from skimage.data import astronaut

from salun_sd.audit import page
from salun_sd.audit.bounds import names
from salun_sd.audit.measure import measure
from salun_sd.audit.page import chosen, histogram, html, label_counts, marks
from salun_sd.audit.protocols import DEFAULT_LABELS, PROTOCOLS
from salun_sd.audit.report import NO_QUALITY, Run, assemble
from salun_sd.errors import SalunError
from salun_sd.report import html as pages
from salun_sd.report.escape import visible
from salun_sd.report.gate import judge, parse
from salun_sd.report.html import ticks

EVIL = "<script>alert(1)</script>\"'&</style><img src=x onerror=alert(1)>{{ 7 * 7 }}"
TURNED = "\u202eevil\u202c \u2066left\u2069 \x00null \x1b[31m \x85 \x7f שלום \ud800"


def page_of(run: Run, base: Run | None = None, *concepts: str, images: bool = True, **settings) -> str:
    made = assemble(run, base, prompts="pocket", settings=settings, concepts=concepts)
    return html(made, run, base, images=images)


def text(page: str) -> str:
    """What stands on the page, in one line; what is isolated is not set apart."""
    bare = re.sub(r"<style>.*?</style>|<[^>]*>", " ", re.sub("</?bdi>", "", page), flags=re.S)
    return html_escapes.unescape(re.sub(r"\s+", " ", bare))


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


def test_each_group_says_how_it_was_chosen_and_of_how_many(erased, monkeypatch):
    monkeypatch.setattr(page, "chosen", lambda *args: chosen(*args, 4))
    run = longer(erased, [0.9, 0.8, 0.7, 0.6, 0.3, 0.4] + [None] * 36)
    said = text(page_of(run, None, "sneaker"))
    assert "The highest scores 4 of 6 images with a box of a flagged label, the highest score first." in said
    assert "Asked for as “sneaker” 4 of 15 others, drawn at random (seed 0), in the order of the prompts." in said
    assert "Everything else 4 of 23 others, drawn at random (seed 0), in the order of the prompts." in said
    still = text(page_of(run, None, "bag"))
    assert "Still seen as “bag” 4 of 5 images not shown above that were asked for as “bag” and are" in still
    assert "Others asked for as “bag”" in still


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
    assert "0.45 to 0.50 2 0.50 to 0.55 0" in text(said)
    assert "Of all images, 5 have no such box" in text(said)


@pytest.mark.parametrize("peak", [0, 1, 3, 4, 5, 9, 99, 100, 4703, 10**6])
def test_axes_have_few_round_ticks_that_hold_all(peak):
    got = ticks(peak)
    assert got[0] == 0 and got[-1] >= peak and len(got) <= 5
    assert got == list(range(0, got[-1] + 1, got[1] if peak else 1))
    assert peak == 0 or got[-1] < 5 * peak


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
    assert "still sneaker" not in text(page) and "seen as bag" in text(page)
    assert "size none " in text(page)  # a setting without a value


def test_page_without_pictures_lists_what_stands_out(base, erased):
    page = page_of(erased, base, "bag", images=False)
    assert "<img" not in page and "data:" not in page.partition("</style>")[2] and "<input" not in page
    said = text(page)
    assert "a photo of a sneaker case 0, seed 100, images/0_0.png sneaker female breast exposed 0.50" in said
    assert cases(page) == [0, 6, 3]  # the scores in the order of the prompts, as they are alike; the bag still seen
    bare = dataclasses.replace(erased, detections=[line(found, boxes=[]) for found in erased.detections])
    assert "Nothing stands out: no image has a box of a flagged label." in text(page_of(bare, images=False))
    assert "label, and none is still seen as “sneaker”." in text(page_of(bare, None, "sneaker", images=False))
    assert "buttocks exposed 0.50" in said and "still bag" in said and "random" not in said
    assert page_of(erased).count("<img") == 7


def test_page_of_several_concepts_has_each_by_itself(base, erased):
    def said(run, *concepts):
        return text(page_of(run, base, *concepts))

    two, one = said(erased, "sneaker", "bag"), said(erased, "sneaker")
    assert "Concepts sneaker, bag " in two and "Concept sneaker " in one
    assert "sneaker 1 / 3 6.1 to 79.2 % 3 / 3 43.9 to 100.0 % bag 0 / 2 0.0 to 65.8 % 1 / 2 9.5 to 90.5 %" in two
    assert [page.count("Concept by concept") for page in (two, one)] == [1, 0]
    became = [f"What “{name}” became The" for name in ("sneaker", "bag")]
    assert [page.count(title) for page in (two, one) for title in became] == [1, 1, 1, 0]
    assert [page.count("a concept ") for page in (two, one)] == [2, 0] and one.count("the concept ") == 1
    assert "Asked for as “sneaker” and “bag” All 3 others, in the order of the prompts." in two.replace("Others a", "A")
    assert two.count("still bag") == 1 and two.count("still sneaker") == 0  # case 4, a bag seen as a sneaker, is gone
    half = said(without_classifier(erased), "sneaker", "bag")
    assert "Concept by concept" not in half and "Concepts gone ua Not measured" in half


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
    extra = {"broken": {prompt: prompt}, "quality": {"clip_score": None, "fid": fid, "kid": None}}
    made["against"] |= extra
    gate = {"bound": prompt, "holds": False, "confident": False, "values": {prompt: None}}
    return made | extra | {"gate": [gate]}, run


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
    assert visible("tab\tline\nemoji 👩‍🚀 שלום") == "tab\tline\nemoji 👩‍🚀 שלום" and visible(3) == 3
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
    assert "Show the blurred base image of case 3, seed 103, seen as bag: anus exposed, score 0.80" in blurred
    assert page.count('aria-hidden="true">flagged<') == 2 == page.count('aria-hidden="true">below the threshold<')
    faces = [line(found, boxes=[box("FACE_FEMALE", 0.9)]) for found in erased.detections]
    assert "<input" not in page_of(dataclasses.replace(erased, detections=faces))


def test_page_without_a_base_has_no_base(base, erased):
    alone, both = page_of(erased, None, "sneaker"), page_of(erased, base, "sneaker")
    assert "base" in text(both) and "base" not in text(alone)
    assert len(sources(alone)) == 7
    assert "Not measured" not in alone
    assert page_of(without_classifier(erased)).count("Not measured") == 2


def test_page_counts_as_each_paper_does(base, erased):
    both, alone = text(page_of(erased, base)), text(page_of(erased))
    for said in (both, alone):
        table = said.partition("counted as each paper counts")[2].partition("Settings")[0]
        assert all(
            f" {name} {len(way.labels)} labels" in table and way.source in table for name, way in PROTOCOLS.items()
        )
        settings = said.rpartition(" Settings ")[2]
        assert all(f"{name} {', '.join(way.labels)}" in settings for name, way in PROTOCOLS.items())
    assert "at the 7 images of each model" in both and " Counted as base erased " in both
    assert "at the 7 images;" in alone and " Counted as audited " in alone
    assert "default 5 labels, a score of 0.5 or more 2 images 8.2 to 64.1 % 0 images 0.0 to 35.4 % Ours" in both
    assert "salun 18 labels, every box NudeNet returns 4 boxes 3 boxes OPTML" in both
    assert "salun 18 labels, every box NudeNet returns 3 boxes OPTML" in alone


def test_page_has_every_setting(erased):
    said = text(
        page_of(erased, sampling={"steps": 50, "safety_checker": "off"}, where=[], limit=None, a={"b": {"c": 1}})
    )
    for shown in ("sampling: steps 50 ", "sampling: safety_checker off ", "where none ", "limit none ", "a: b: c 1 "):
        assert shown in said
    assert "threshold 0.5 detector nudenet 3.4.2" in said


def test_page_says_what_pairs_show_and_how_sure_that_is(base, erased):
    def said(*runs):
        return text(page_of(*runs, *[None] * (2 - len(runs)), "sneaker"))

    page = said(erased, base)
    assert "Image by image: 2 flagged in the base only, 0 in the erased model only, 0 in both, 5 in neither." in page
    assert "less likely, chance would split the 2 that differ at least this unevenly with probability 0.5." in page
    assert "0 gone in the base only, 2 in the erased model only" in page and "2 as asked in the base only" in page
    assert "too small" not in page and "(95 %: wilson)" in page
    assert "Image by image" not in said(erased) and "chance" not in said(base, base)
    runs = several(erased, 3), several(base, 3)
    assert "images of one prompt are alike, which makes that too small." in said(*runs)
    assert "(95 %: wilson with effective size)" in said(*runs)


def test_page_has_categories_where_prompts_do(base, erased):
    assert "sexual 2 / 4 15.0 to 85.0 % 0 / 4 0.0 to 49.0 %" in text(page_of(categorised(erased), categorised(base)))
    assert "Category by category" not in text(page_of(erased))


def test_page_says_whether_the_gate_holds(base, erased):
    made = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"])
    bounds = [parse(text, names(["sneaker"], [])) for text in ("flag_rate > 0.01", "clip_score < 0.3", "ra < 0.6")]
    said = text(html(made | {"gate": [judge(made, bound, confident=True) for bound in bounds]}, erased, base))
    assert "flag_rate > 0.01 flag_rate is 0 [0, 0.35433], judged at 0.35433 failed" in said
    assert "clip_score < 0.3 clip_score was not measured" in said and "ra < 0.6 ra is 0.5 [" in said
    calm = [judge(made, bound, confident=False) for bound in bounds[:1]]
    assert "flag_rate > 0.01 flag_rate is 0 [0, 0.35433] passed" in text(html(made | {"gate": calm}, erased, base))
    assert not any("Gate" in text(html(ungated, erased, base)) for ungated in (made, made | {"gate": None}))


def test_page_has_the_quality_of_both_models_with_the_metrics_whole_names(base, erased):
    clip = {"name": "clip score[tiny]", "value": 0.26541, "ci95": [0.25, 0.27], "images": 7}
    fid = {"name": "fid[x]", "value": 12.3, "note": "Too few.", "images": [7, 9], "reference": "pocket"}
    quality = NO_QUALITY | {"clip_score": clip, "fid": fid}, NO_QUALITY | {"clip_score": clip | {"value": 0.281}}
    said = text(html(assemble(erased, base, prompts="p", settings={}, quality=quality), erased, base))
    assert "clip score[tiny] base 0.281 0.25 to 0.27 7 erased 0.2654 0.25 to 0.27 7 " in said
    assert "fid[x] Compared with pocket. Too few. erased 12.3 7 and 9 " in said
    assert "How good" not in text(page_of(erased, base))


def test_page_names_what_could_not_be_read_and_shows_none_of_it(base, erased):
    assert "could not be read" not in text(page_of(erased, base))
    (erased.folder / "images" / "6_0.png").write_bytes(b"")
    run, other = torn(erased, 6), torn(base, 0, 1)
    page = page_of(run, other, "sneaker")
    said = text(page)
    assert "1 image and 2 images of the base could not be read and count for nothing." in said
    assert "base: images/1_0.png image file is <truncated> images/6_0.png image file is <truncated> " in said
    assert "image file is &lt;truncated&gt;" in page and page.count("images/6_0.png") == 1
    assert sorted(cases(page)) == [*range(6)] and len(sources(page)) == 6 + 4
    assert said.count(" no picture ") == 2 == said.count("not readable: image file is <truncated>")
    assert "Of all images, 4 have no such box" in text(page_of(torn(erased, 5, 6), images=False))
    assert "Files that could not be read" in text(page_of(torn(erased, *range(7)), base))


def test_page_lists_the_first_hundred_unreadable_files(erased):
    run = longer(erased, [None] * 110)
    found = [line(found, file=f"{case}.png") for case, found in enumerate(run.detections)]
    said = text(page_of(torn(dataclasses.replace(run, detections=found), *range(102))))
    assert "102 images are in no count" in said and "The first 100; all are in report.json." in said
    assert said.count("image file is <truncated>") == 100


def test_page_of_no_images_still_opens():
    assert "no images to report on" in page_of(Run("m", Path(), [], []))


def test_thumbnails_are_small_and_never_enlarged(tmp_path):
    def made(image: Image.Image) -> tuple[Image.Image, dict]:
        image.save(tmp_path / "image.png")
        made = pages.thumbnail(tmp_path / "image.png")
        data = base64.b64decode(made["src"].partition(",")[2])
        assert len(data) <= pages.THUMBNAIL_BYTES
        return Image.open(io.BytesIO(data)), made

    small, said = made(Image.new("RGBA", (32, 32), (200, 10, 10, 90)))
    assert small.size == (32, 32) and small.format == "PNG" and said["tiny"]
    wide, said = made(Image.new("RGBA", (512, 256), (200, 10, 10, 90)))
    assert wide.size == (192, 96) == said["size"] and wide.format == "JPEG" and not said["tiny"]
    for side in (96, 192):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
        assert made(noise)[0].size == (side, side)
    with pytest.raises(SalunError, match="gone.png"):
        pages.thumbnail(tmp_path / "gone.png")


def test_files_of_other_programs_may_lie_elsewhere(erased):
    """Absolute paths in the manifest stand as they are; seed, guidance and steps may be unknown."""
    manifest = [
        line(row, file=str(erased.folder / row["file"]), seed=None, guidance=None, steps=None)
        for row in erased.manifest
    ]
    page = page_of(dataclasses.replace(erased, folder=Path("elsewhere"), manifest=manifest))
    assert len(sources(page)) == 7 and ", seed 1" not in page


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
    detections = [line(d, predicted="sneaker") for d in long.detections]
    return dataclasses.replace(long, folder=folder, manifest=manifest, detections=detections)


def test_page_of_4703_pairs_stays_under_five_megabytes(erased, tmp_path):
    run = of_i2p_size(erased, faces(tmp_path / "faces", 256, noise=60))
    base = dataclasses.replace(run, model="base")
    page = page_of(run, base, "sneaker")
    assert 1_000_000 < len(page.encode()) < 5_000_000 and page.count("<img") == 2 * 4 * 30
    assert len(page_of(run, base, "sneaker", images=False).encode()) < 500_000


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
    made = evil(small, EVIL)[0] | made
    (folder / "report.html").write_text(html(made, run, run), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture
def audit(browser, written) -> Browser:
    browser.media()
    browser.screen(1200)
    browser.open(written)
    return browser


def test_browser_opens_the_page_from_disk_and_asks_for_nothing_else(audit):
    pictures = audit.value("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(pictures) == 120 and all(done and width == 192 for done, width in pictures)
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
    assert audit.value("document.querySelectorAll('.flagged').length") == 40
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
    assert len(boxes) == 40 and all(name.startswith("Show the blurred ") and ", score 0." in name for name in boxes)
    pictures = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") in ("image", "img")]
    assert pictures and all(" image of case " in name for name in pictures)


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
