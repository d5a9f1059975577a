"""How much the images changed that an erasure should leave alone."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import skimage.data
from helpers.audits import box, judged, line, torn
from PIL import Image
from skimage.metrics import structural_similarity

from salun_sd.audit import change
from salun_sd.audit.change import between, ssim
from salun_sd.audit.detectors import Detectors
from salun_sd.audit.examine import examine
from salun_sd.audit.measure import kept
from salun_sd.audit.report import NO_QUALITY, Run, assemble
from salun_sd.runtime import seals

NOISE = np.random.default_rng(0)


def noisy(pixels: np.ndarray, spread: float) -> np.ndarray:
    return np.clip(pixels + NOISE.normal(0, spread, pixels.shape), 0, 255).astype(np.uint8)


def saved(pixels: np.ndarray, file):
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.parametrize(("height", "width"), [(11, 11), (32, 32), (12, 70), (61, 45)])
def test_ssim_is_scikit_images(height, width):
    """As Wang et al. compute it; of images that are alike, that are not, and that are negatives."""
    a = skimage.data.camera()[100 : 100 + height, 200 : 200 + width]
    for b in (noisy(a, 5), noisy(a, 60), 255 - a, np.zeros_like(a)):
        expected = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert [ssim(a, b), ssim(b, a)] == pytest.approx([expected] * 2, abs=1e-9) and ssim(a, b) < 0.99
    assert ssim(a, a) == 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 8), (1, 1), (9, 13)])
def test_a_window_is_no_larger_than_the_image(height, width):
    """Along a short side, one window; the moments about the mean, place by place."""
    a = skimage.data.camera()[100 : 100 + height, 200 : 200 + width]
    b, found = noisy(a, 40), []
    high, wide = min(height, 11), min(width, 11)
    down, across = (np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * 1.5**2)) for n in (high, wide))
    weights = np.outer(down, across) / np.outer(down, across).sum()
    for top in range(height - high + 1):
        for left in range(width - wide + 1):
            x, y = (image[top : top + high, left : left + wide].astype(float) for image in (a, b))
            dx, dy = x - (weights * x).sum(), y - (weights * y).sum()
            means = 2 * (weights * x).sum() * (weights * y).sum() + 2.55**2
            squares = (weights * x).sum() ** 2 + (weights * y).sum() ** 2 + 2.55**2
            spread = (2 * (weights * dx * dy).sum() + 7.65**2) / ((weights * (dx**2 + dy**2)).sum() + 7.65**2)
            found.append(means / squares * spread)
    assert ssim(a, b) == pytest.approx(np.mean(found), abs=1e-9) and ssim(a, a) == 1


def test_two_files_differ_by_their_pixels_and_not_by_their_sizes(tmp_path):
    photo = skimage.data.astronaut()[:40, :30]
    other = noisy(photo, 30)
    a, b, small = (saved(p, tmp_path / f"{n}.png") for n, p in enumerate((photo, other, photo[:39])))
    got = between(a, b)
    assert got["pixels"] == pytest.approx(np.abs(photo / 255 - other / 255).mean(), abs=1e-6)
    grey = [np.asarray(Image.open(file).convert("L")) for file in (a, b)]
    assert got["ssim"] == pytest.approx(ssim(*grey), abs=1e-6) and got == between(b, a)
    assert between(a, a) == {"pixels": 0, "ssim": 1} and between(a, small) == {"pixels": None, "ssim": None}
    black, white = (saved(np.full((16, 16, 3), n, np.uint8), tmp_path / f"of{n}.png") for n in (0, 255))
    assert between(black, white)["pixels"] == 1 and between(black, white)["ssim"] == pytest.approx(0, abs=1e-3)


def manifest_of(folder, name: str, seeds: bool = True) -> list[dict]:
    return [
        {"file": f"{name}/{n}.png", "case": n, "k": 0, "class": None, "seed": n if seeds else None} for n in range(3)
    ]


@pytest.fixture
def looked(tmp_path):
    """The folder of three images a/ and of their twins b/, and what looks at both."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for n in range(3):
            saved(noisy(skimage.data.astronaut()[: 40 + n, :40], 9), tmp_path / name / f"{n}.png")

    def look() -> tuple[list[dict], Run, Run]:
        base = examine("base", manifest_of(tmp_path, "../b"), None, Detectors(), tmp_path / "base")
        run = examine("m", manifest_of(tmp_path, "../a"), None, Detectors(), tmp_path / "run", base)
        assert not any("change" in found for found in base.detections)
        return [found.get("change") for found in run.detections], run, base

    return tmp_path, look


def test_a_line_has_the_change_and_of_what_and_is_not_measured_again(looked):
    folder, look = looked
    changes, run, base = look()
    for n, found in enumerate(changes):
        twin = base.detections[n]["sha256"]
        assert found == {"against": twin, **between(folder / f"a/{n}.png", folder / f"b/{n}.png")}
    file = folder / "run" / "detections.jsonl"
    planted = [line(found, change=changes[n] | {"pixels": 0.5}) for n, found in enumerate(run.detections)]
    file.write_text("".join(map(seals.line, planted)))
    assert [found["pixels"] for found in look()[0]] == [0.5] * 3
    saved(noisy(skimage.data.astronaut()[:41, :40], 9), folder / "b/1.png")  # another image of the base
    assert [found["pixels"] == 0.5 for found in look()[0]] == [True, False, True]
    file.rename(folder / "run" / ".detections.0.partial")  # as a run leaves it that was killed
    assert [found["pixels"] == 0.5 for found in look()[0]] == [True, False, True]


def test_an_image_or_a_twin_that_cannot_be_read_has_no_change(looked):
    folder, look = looked
    (folder / "a/0.png").write_bytes(b"")
    (folder / "b/1.png").write_bytes(b"")
    first, second, third = look()[0]
    assert first is None is second and third["pixels"] > 0


ANUS, FACE = box("ANUS_EXPOSED", 0.5), box("FACE_FEMALE", 0.9)


@pytest.mark.parametrize(("label", "found", "is_kept"), [
    ("sneaker", {}, False), ("bag", {}, True), ("bag", {"boxes": [ANUS]}, True),
    (None, {}, True), (None, {"boxes": [FACE]}, True), (None, {"boxes": [ANUS]}, False),
    (None, {"flags": {"y": {"score": 0.5}}}, False), (None, {"flags": {"y": {"score": 0.49}}}, True),
    (None, {"concepts": {"a hat": 0.6}}, False), (None, {"concepts": {"a hat": 0.5}}, True),
])  # fmt: skip
def test_the_prompts_class_decides_what_is_left_alone_or_else_the_bases_image(label, found, is_kept):
    row, detection = {"case": 3, "k": 1, "class": label}, {"case": 3, "k": 1, "detector": "x", "boxes": []} | found
    assert kept([(row, detection)], ["sneaker", "a hat"]) == ({(3, 1)} if is_kept else set())


def changed(run: Run, pixels: list[float | None]) -> Run:
    """The seven images of a run, changed by so much."""
    changes = [{"against": "x", "pixels": p, "ssim": None if p is None else 1 - p} for p in pixels]
    detections = [line(found, change=c) for found, c in zip(run.detections, changes, strict=True)]
    return dataclasses.replace(run, detections=detections)


PIXELS = [0.9, 0.9, 0.9, 0.1, 0.2, 0.3, 0.6]  # of three sneakers, two bags and two dresses


def measured(run: Run, base: Run, *concepts: str) -> dict:
    return change.measure(run, base, concepts)


def test_the_change_is_the_mean_over_the_images_that_were_to_be_kept(base, erased):
    got = measured(changed(erased, PIXELS), base, "sneaker")
    assert (got["change"]["value"], got["change_ssim"]["value"], got["change_features"]) == (0.3, 0.7, None)
    assert (got["change"]["images"], got["change"]["prompts"], got["change"]["note"]) == (4, 4, None)
    low, high = got["change"]["ci95"]
    assert 0.1 < low < 0.3 < high < 0.6 and got["change_ssim"]["ci95"] == pytest.approx([1 - high, 1 - low])
    assert measured(changed(erased, PIXELS), base)["change"]["images"] == 7
    unclassed = dataclasses.replace(base, manifest=[line(row, **{"class": None}) for row in base.manifest])
    assert measured(changed(erased, PIXELS), unclassed)["change"]["value"] == 0.58  # without 0 and 3
    assert measured(changed(erased, PIXELS), base, "sneaker", "bag", "dress") == dict.fromkeys(got)


def test_unreadable_twins_other_sizes_and_unknown_seeds_are_said(base, erased, caplog):
    caplog.set_level(logging.WARNING)
    got = measured(changed(erased, [*PIXELS[:3], None, *PIXELS[4:]]), torn(base, 6), "sneaker")
    assert got["change"]["value"] == 0.25 and got["change"]["images"] == 2
    assert "1 of 3" in got["change"]["note"] and "1 of 3" in caplog.text
    assert measured(changed(erased, [None] * 7), base) == dict.fromkeys(got) and "7 of 7" in caplog.text
    seedless = dataclasses.replace(erased, manifest=[line(row, seed=None) for row in erased.manifest])
    assert erased.model in measured(changed(seedless, PIXELS), base)["change"]["note"]


def test_a_change_can_be_bound_at_the_ends_of_its_interval(base, erased):
    quality = NO_QUALITY | measured(changed(erased, PIXELS), base, "sneaker"), NO_QUALITY
    made = assemble(erased, base, prompts="p", settings={}, concepts=["sneaker"], quality=quality)
    low, high = made["quality"]["change"]["ci95"]
    assert judged(made, "change > 0.3")["holds"] and not judged(made, "change > 0.299")["holds"]
    assert judged(made, "change > 0.31", confident=True)["values"]["change"]["judged_at"] == high
    assert judged(made, "change_ssim < 0.6", confident=True)["values"]["change_ssim"]["judged_at"] == 1 - high
    assert not judged(made, "change_features > 2")["holds"]  # it was not measured
    assert json.loads(json.dumps(made["quality"])) == made["quality"] and low < high
