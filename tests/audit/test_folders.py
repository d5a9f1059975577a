"""`evaluate --images` without --prompts: any folder of images, alone and beside another one."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.models import write_clip
from helpers.runs import fails_with
from PIL import Image, PngImagePlugin
from skimage import data

import salun_sd
from salun_sd.audit.change import between

EVIL = "<script>alert(1)</script> [x](https://x.yz)"


def crop(file: Path, left: int, parameters: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    if parameters:
        info.add_text("parameters", f"{parameters}\nNegative prompt: dog\nSteps: 20, CFG scale: 7, Seed: 3")
    Image.fromarray(data.astronaut()[:64, left : left + 64]).save(file, "png", pnginfo=info)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    """Two folders of classes, of which `erased` has a torn image and `base` one more; one of images alone; an empty
    one."""
    here = tmp_path_factory.mktemp("folders")
    for side, step in (("erased", 0), ("base", 5)):
        for n, name in enumerate(("sneaker/1 (copy).png", "sneaker/2.png", "bag/1.png", "bag/2.png")):
            crop(here / side / name, 40 * n + step, f"{EVIL} {name[0]}" if n % 2 else None)
    (here / "erased" / "bag" / "torn.png").write_bytes(b"\x89PNG")
    crop(here / "base" / "bag" / "torn.png", 0)
    crop(here / "base" / "coat" / "1.png", 0)
    crop(here / "plain" / "a.png", 0)
    (here / "empty").mkdir()
    return {path.name: path for path in here.iterdir()} | {"here": here}


@pytest.fixture(scope="module")
def report(places) -> dict:
    return salun_sd.evaluate(
        images=places["erased"], against=places["base"], recursive=True, concept_class="sneaker",
        out=places["here"] / "audit",
    )  # fmt: skip


def test_sub_folders_are_classes_and_two_folders_are_compared_path_by_path(report, places):
    assert (
        report["metrics"]["ua"]["of"] == report["metrics"]["ra"]["of"] == 2
    )  # of the pocket's judge, without --classifier
    assert report["against"]["metrics"]["ra"]["of"] == 3 and [Path(file).name for file in report["broken"]] == [
        "torn.png"
    ]
    assert report["unpaired"] == {"model": [], "against": ["coat/1.png"]}
    pairs = report["paired"]["flag_rate"]
    assert sum(pairs[kind] for kind in ("both", "only_base", "only_model", "neither")) == 4
    files = [places[side] / "bag" / name for name in ("1.png", "2.png") for side in ("erased", "base")]
    mean = (between(*files[:2])["pixels"] + between(*files[2:])["pixels"]) / 2
    assert report["quality"]["change"]["value"] == pytest.approx(mean, abs=1e-6) and mean > 0.01
    assert report["settings"]["metadata"] == {"A1111": 2, "none": 3}


def test_prompts_of_strangers_are_shown_and_do_nothing(report, places):
    lines = (places["here"] / "audit" / "manifest.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["prompt"] == f"{EVIL} s" for line in lines) == 1
    page = (places["here"] / "audit" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "coat/1.png" in page and "1 (copy).png" in page
    assert 'href="https://x' not in page and "`coat/1.png`" in (places["here"] / "audit" / "report.md").read_text()


def test_audits_of_one_list_of_images_are_compared_image_by_image(report, places, tmp_path):
    shutil.copytree(places["erased"], tmp_path / "again")
    other = salun_sd.evaluate(
        images=tmp_path / "again", recursive=True, concept_class="sneaker", out=tmp_path / "audit"
    )
    [table] = salun_sd.compare([places["here"] / "audit", tmp_path / "audit"])
    assert not table.unpaired and other["unpaired"] is None
    (tmp_path / "again" / "bag" / "1.png").rename(tmp_path / "again" / "bag" / "3.png")
    salun_sd.evaluate(images=tmp_path / "again", recursive=True, concept_class="sneaker", out=tmp_path / "audit")
    with pytest.raises(salun_sd.SalunError, match="same prompts"):
        salun_sd.compare([places["here"] / "audit", tmp_path / "audit"])


def test_images_that_were_drawn_here_say_their_prompts_which_a_clip_compares(tiny, tmp_path):
    (tmp_path / "p.txt").write_text("a photo of a bag\na sneaker\n")
    write_clip(tmp_path / "clip")
    drawn = salun_sd.evaluate(tiny, prompts=tmp_path / "p.txt", denoising_steps=1, clip=tmp_path / "clip",
                              out=tmp_path / "drawn")  # fmt: skip
    crop(tmp_path / "drawn" / "images" / "of nobody.png", 0)
    found = salun_sd.evaluate(images=tmp_path / "drawn" / "images", clip=tmp_path / "clip", out=tmp_path / "found")
    assert found["settings"]["metadata"] == {"none": 1, "salun_sd": 2} and found["metrics"]["flag_rate"]["of"] == 3
    assert found["quality"]["clip_score"] == drawn["quality"]["clip_score"]  # of the two whose prompt is known


def test_an_audit_of_other_images_is_not_written_over(places, tmp_path, capsys):
    salun_sd.evaluate(images=places["plain"], out=tmp_path / "audit")
    before = (tmp_path / "audit" / "report.json").read_bytes()
    line = "evaluate --images {erased} --recursive --out {out}"
    fails_with(line, places | {"out": tmp_path / "audit"}, 2, "{out} a.png --out", capsys)
    assert (tmp_path / "audit" / "report.json").read_bytes() == before
    shutil.copytree(places["plain"], tmp_path / "plain")
    salun_sd.evaluate(images=tmp_path / "plain", against=places["plain"], out=tmp_path / "grown")
    shutil.copytree(places["plain"], tmp_path / "moved")
    line = "evaluate --images {plain} --against {moved} --out {out}"
    given = {"plain": tmp_path / "plain", "moved": tmp_path / "moved", "out": tmp_path / "grown"}
    fails_with(line, given, 2, "{out}/against a.png --out", capsys)
    crop(tmp_path / "plain" / "b.png", 20)
    assert len(salun_sd.evaluate(images=tmp_path / "plain", out=tmp_path / "grown")["broken"]) == 0


IMAGES = "evaluate --images {plain} "
CASES = {
    "no prompts for a model": ("evaluate pocket", "--prompts"),
    "no images": ("evaluate --images {empty}", "{empty} --images"),
    "images of sub-folders alone": ("evaluate --images {erased}", "{erased} --recursive"),
    "no such folder": ("evaluate --images {here}/nowhere", "{here}/nowhere"),
    "rows of no prompts": (IMAGES + "--limit 3", "--limit --prompts"),
    "a condition on no prompts": (IMAGES + "--where class=bag", "--where --prompts"),
    "a base that draws": (IMAGES + "--against pocket", "--against pocket --prompts"),
    "a base of other images": (IMAGES + "--against {base} --recursive", "{plain} {base} --against"),
    "a size of images that are there": (IMAGES + "--against {base} --size 32", "--size"),
    "sub-folders of a prompt set": (IMAGES + "--prompts pocket --recursive", "--recursive --prompts"),
    "other names than a prompt set's": (IMAGES + "--prompts pocket", "a.png --prompts"),
    "no prompts to compare with": (IMAGES + "--clip x", "--clip {plain} --prompts"),
    "a class that no folder has": (IMAGES + "--concept-class sneaker", "sneaker --classifier --recursive"),
    "one class of two": (
        "evaluate --images {erased} --recursive --concept-class bag --concept-class coat", "coat 'sneaker'",
    ),
    "nothing to judge": (IMAGES + "--classifier x", "--classifier --recursive"),
    "a record of images": (IMAGES + "--record", "--record"),
    "a bound on a change from nothing": (IMAGES + "--fail-if 'change > 0'", "change --against"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "named"), CASES.values(), ids=CASES)
def test_what_does_not_go_together_is_named_and_nothing_is_written(line, named, places, tmp_path, capsys):
    code = 1 if line.endswith("--prompts pocket") else 2  # what the folder holds
    fails_with(f"{line} --out {{out}}", places | {"out": tmp_path / "out"}, code, named, capsys)
    assert list(tmp_path.iterdir()) == []
