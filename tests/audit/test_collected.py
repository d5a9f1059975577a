"""The manifest of a folder that some other program filled."""

import os

import pytest

from salun_sd.audit.collected import collected
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
