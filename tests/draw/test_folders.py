"""The images of a folder: which files are, and that no other is passed over in silence."""

import os

import pytest

from salun_sd.draw.folders import images_in, left_out
from salun_sd.draw.images import formats


@pytest.fixture
def folder(tmp_path):
    """A folder with one image."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpeg").write_bytes(b"")
    return tmp_path / "photos"


def test_images_in_a_folder_are_those_by_their_ending(folder):
    for name in ("b.PNG", "c.gif", "d.mpo", "notes.txt", "d", ".DS_Store", "._a.jpeg", "e.eps", "f.mpg", "g.h5"):
        (folder / name).write_bytes(b"")
    assert [file.name for file in images_in(folder)] == ["a.jpeg", "b.PNG", "c.gif", "d.mpo"]


@pytest.mark.parametrize("name", [".DS_Store", "._a.jpeg", "._a.txt", "Thumbs.db", "desktop.ini", "__MACOSX"])
def test_what_systems_put_into_a_folder_is_passed_over_in_silence(folder, name):
    (folder / name).write_bytes(b"")
    assert [file.name for file in images_in(folder)] == ["a.jpeg"] and left_out(folder) == ""


@pytest.mark.parametrize("name", ["a", "a.jxl", "a.mp4", "a.eps", "a.npz", "a.jpg~", "a.p\u0308ng"])
def test_a_file_that_is_not_read_is_named(folder, name):
    (folder / name).write_bytes(b"")
    assert name in left_out(folder) and left_out(folder, {name}) == ""


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), lambda file: file.symlink_to("no")]
)
def test_a_pipe_a_device_and_a_dangling_link_are_no_images_and_are_named(folder, make):
    make(folder / "b.png")
    assert [file.name for file in images_in(folder)] == ["a.jpeg"] and "b.png" in left_out(folder)


def test_heic_is_an_image_or_named_with_what_to_install(folder):
    for name in ("a.heic", "B.HEIC", "c.hif"):
        (folder / name).write_bytes(b"")
    if "HEIF" in formats():
        assert len(images_in(folder)) == 4 and left_out(folder) == ""
    else:
        assert all(word in left_out(folder) for word in ("a.heic", "B.HEIC", "c.hif", "salun-sd[heif]"))


def test_a_folder_of_images_is_named_with_what_to_type_and_kohyas_by_its_layout(folder):
    (folder / "empty").mkdir()
    (folder / "x.png").mkdir()
    assert left_out(folder) == ""
    for name in ("more", "10_shoe"):
        (folder / name).mkdir()
        (folder / name / "b.png").write_bytes(b"")
    more, kohya = left_out(folder).split(";")[::-1]
    assert "more" in more and str(folder) in more and "kohya" not in more
    assert "10_shoe" in kohya and str(folder) in kohya and "kohya" in kohya


def test_many_files_are_counted(folder):
    for n in range(12):
        (folder / f"{n:02}.mp4").write_bytes(b"")
    assert "04.mp4" in left_out(folder) and "05.mp4" not in left_out(folder) and "7 more" in left_out(folder)
