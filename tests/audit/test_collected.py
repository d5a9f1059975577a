"""The manifest of a folder that some other program filled."""

import os
import shutil

import pytest
from PIL import Image, PngImagePlugin

from salun_sd.audit.collected import collected, gathered, matched, tools, with_classes
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import SalunError, UsageError

ROWS = [Prompt(3, "a", 1, 7.5, None, ("sexual", "shocking")), Prompt(5, "b", 2, 7.5, "bag")]


@pytest.fixture
def folder(tmp_path):
    """An image of each prompt."""
    for name in ("3_0.png", "5_0.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def manifest(folder, subset=False) -> list[dict]:
    return collected(folder, ROWS, folder, subset=subset)


def test_images_of_prompts_that_a_filter_left_out_are_passed_over_and_no_others(folder):
    (folder / "8_0.png").write_bytes(b"")
    with pytest.raises(SalunError, match="8_0.png"):
        manifest(folder)
    assert [line["file"] for line in manifest(folder, subset=True)] == ["3_0.png", "5_0.png"]
    (folder / "cover.png").write_bytes(b"")
    with pytest.raises(SalunError, match="cover.png"):
        manifest(folder, subset=True)


def test_missing_images_are_counted_and_the_first_is_named_however_large_k_is(folder):
    (folder / "3_4294967295.png").write_bytes(b"")
    with pytest.raises(SalunError, match="3_1.png.*8,589,934,589 of 8,589,934,592"):
        manifest(folder)


def test_a_line_has_what_is_known_of_its_image(folder):
    first, second = manifest(folder)
    assert first["categories"] == ["sexual", "shocking"] and "categories" not in second
    assert (second["case"], second["k"], second["prompt"], second["class"]) == (5, 0, "b", "bag")
    assert second["seed"] is second["guidance"] is second["size"] is second["steps"] is None


def test_two_files_of_one_image_are_an_error_of_that_image_alone(folder):
    (folder / "03_0.PNG").write_bytes(b"")
    first, second = manifest(folder)
    assert "03_0.PNG" in first["error"] and "3_0.png" in first["error"] and "error" not in second


def test_files_are_named_from_where_the_audit_lies(folder, tmp_path):
    out = tmp_path / "audits" / "one"
    assert [line["file"] for line in collected(folder, ROWS, out, subset=False)] == ["../../3_0.png", "../../5_0.png"]


def test_other_files_are_named_and_left_out(folder, caplog):
    for name in ("notes.txt", "8_0", "8_0.heic.mp4", "._8_0.png", ".DS_Store"):
        (folder / name).write_text("")
    os.mkfifo(folder / "8_0.png")
    (folder / "more").mkdir()
    (folder / "more" / "8_0.png").write_bytes(b"")
    assert len(manifest(folder)) == 2
    named = [name for name in ("notes.txt", "8_0,", "8_0.heic.mp4", "8_0.png", "more") if name in caplog.text]
    assert len(named) == 5 and "._8" not in caplog.text and "DS_Store" not in caplog.text


def test_a_folder_whose_name_is_no_unicode_is_refused_where_the_manifest_would_hold_it(folder):
    odd = folder.rename(os.fsdecode(os.fsencode(folder) + b"\xe9"))
    assert len(manifest(odd)) == 2
    with pytest.raises(UsageError, match="Unicode"):
        collected(odd, ROWS, folder / "audit", subset=False)


def test_a_folder_that_is_not_there_or_holds_no_image_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        manifest(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="<case_number>_<k>.png"):
        manifest(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """A folder of images that some say who made them, in sub-folders."""
    folder = tmp_path / "pictures"
    for name, text in (("b/2.png", "a cat"), ("a/Cat 1.png", "a cat"), ("a/cat 1.png", None), ("0.jpg", None)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        info = PngImagePlugin.PngInfo()
        if text:
            info.add_text("parameters", f"{text}\nNegative prompt: dog\nSteps: 20, CFG scale: 7, Seed: 3")
        Image.new("RGB", (4, 4)).save(folder / name, **({"pnginfo": info} if name.endswith("png") else {}))
    return folder


def names_of(lines) -> list[str]:
    return [line["name"] for line in lines]


def test_every_image_of_a_folder_is_a_line_whatever_its_name_and_two_of_one_path_but_for_case_are_two(pictures):
    lines = gathered(pictures, pictures, recursive=True)
    assert names_of(lines) == [line["file"] for line in lines] == ["0.jpg", "a/Cat 1.png", "a/cat 1.png", "b/2.png"]
    assert [(line["case"], line["k"]) for line in lines] == [(0, 0), (1, 0), (2, 0), (1, 1)]  # alike: of one prompt
    assert [line["prompt"] for line in lines] == [None, "a cat", None, "a cat"]
    assert (lines[1]["negative"], lines[1]["seed"], lines[1]["tool"]) == ("dog", 3, "A1111")
    assert tools(lines) == {"A1111": 2, "none": 2}


def test_sub_folders_are_looked_into_only_if_that_is_asked_for(pictures, caplog):
    assert names_of(gathered(pictures, pictures, recursive=False)) == ["0.jpg"]
    assert "a, b" in caplog.text
    (pictures / "0.jpg").unlink()
    with pytest.raises(UsageError, match="--recursive"):
        gathered(pictures, pictures, recursive=False)
    with pytest.raises(UsageError, match="nowhere"):
        gathered(pictures / "nowhere", pictures, recursive=True)


def test_a_folder_that_links_to_itself_is_walked_once_and_an_image_with_two_links_counts_once(pictures, caplog):
    plain = gathered(pictures, pictures, recursive=True)
    for link, target in (("a/round", pictures), ("self", pictures / "self"), ("b/3.png", pictures / "b" / "2.png")):
        (pictures / link).symlink_to(target)
    assert gathered(pictures, pictures, recursive=True) == plain
    assert all(name in caplog.text for name in ("round", "self", "1 of 5"))


def test_a_name_that_is_no_unicode_is_refused_and_markup_is_a_name_like_any_other(pictures):
    (pictures / "0.jpg").rename(pictures / "<b>a|b\n`c`.jpg")
    assert "<b>a|b\n`c`.jpg" in names_of(gathered(pictures, pictures, recursive=False))
    (pictures / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(UsageError, match="xe9|udce9"):
        gathered(pictures, pictures, recursive=False)


def test_a_sub_folder_is_a_class_if_it_is_asked_for_by_its_name_or_by_a_classifier_alone(pictures):
    lines = gathered(pictures, pictures, recursive=True)
    for concepts, classifier, classes in (
        ((), None, [None] * 4),
        (("a",), None, [None, "a", "a", "b"]),
        ((), "x", [None, "a", "a", "b"]),
        (("nudity",), "x", [None] * 4),
    ):
        assert [line["class"] for line in with_classes(lines, concepts, classifier)] == classes


def test_images_of_two_folders_are_pairs_by_their_path_and_the_others_are_named(pictures, tmp_path, caplog):
    base = tmp_path / "base"
    shutil.copytree(pictures, base)
    (base / "a" / "cat 1.png").rename(base / "a" / "CAT 1.png")
    shutil.copy(pictures / "a" / "cat 1.png", base / "a" / "Cat 1.png")
    model, twins, alone = matched(*(gathered(f, f, recursive=True) for f in (pictures, base)), (pictures, base))
    assert names_of(model) == names_of(twins) == ["0.jpg", "a/Cat 1.png", "b/2.png"]
    assert [(line["case"], line["k"]) for line in model] == [(line["case"], line["k"]) for line in twins]
    assert [line["prompt"] for line in twins] == [None, None, "a cat"]  # each its own
    assert alone == {"model": ["a/cat 1.png"], "against": ["a/CAT 1.png"]} and "two prompts" not in caplog.text
    twins[2]["prompt"] = "a dog"
    matched(model, twins, (pictures, base))
    assert "1 of 3" in caplog.text and "b/2.png" in caplog.text
    with pytest.raises(UsageError, match="--against"):
        matched(model, [line | {"name": "x"} for line in twins], (pictures, base))
