"""Notes on files hold while the files are as they were."""

import os
import shutil

import pytest

from salun_sd.runtime.stamps import Stamps, state_of


@pytest.fixture
def noted(tmp_path):
    """A folder with a file, on which there is a note."""
    (tmp_path / "a b\n.png").write_bytes(b"12345678")
    Stamps(tmp_path).add("a b\n.png", state_of(tmp_path / "a b\n.png"), "whole")
    assert Stamps(tmp_path).of("a b\n.png") == "whole" and Stamps(tmp_path).of("other.png") is None
    return tmp_path / "a b\n.png"


def touched(file):
    os.utime(file)


def replaced(file):
    """By another file of the same size and time, as `cp -p` leaves it."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.unlink()
    file.write_bytes(b"87654321")
    os.utime(file, ns=times)


def rewritten(file):
    """In place, with the same size, and the time put back."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(b"87654321")
    os.utime(file, ns=times)


def grown(file):
    file.write_bytes(b"123456789")


@pytest.mark.parametrize("change", [touched, replaced, rewritten, grown, os.remove])
def test_no_note_outlives_a_change(noted, change):
    change(noted)
    assert Stamps(noted.parent).of(noted.name) is None


def test_a_copy_of_the_folder_has_no_notes_until_its_files_are_looked_at_again(noted, tmp_path_factory):
    copy = shutil.copytree(noted.parent, tmp_path_factory.mktemp("far") / "copy", copy_function=shutil.copy)
    assert Stamps(copy).of(noted.name) is None
    Stamps(copy).add(noted.name, state_of(copy / noted.name), "looked at")
    assert Stamps(copy).of(noted.name) == "looked at" and Stamps(noted.parent).of(noted.name) == "whole"


def test_a_line_that_a_kill_cut_at_any_byte_is_none_and_harms_no_other(noted):
    stamps = noted.parent / ".stamps-0"
    whole, other = stamps.read_bytes(), noted.with_name("b.png")
    other.write_bytes(b"")
    for end in range(len(whole)):
        stamps.write_bytes(whole[:end])
        assert Stamps(noted.parent).of(noted.name) == (None if end < len(whole) - 1 else "whole")  # all but its "\n"
        Stamps(noted.parent).add(other.name, state_of(other), "after it")
        assert Stamps(noted.parent).of(other.name) == "after it"


def test_lines_of_another_program_are_passed_over(noted):
    import zlib

    for content in (b'{"a": 1}', b"[1, [[]], {}]", b'["a", 5, "b"]', b"x"):
        line = content + b" %08x\n" % zlib.crc32(content)
        (noted.parent / ".stamps-1").write_bytes(line)
        assert Stamps(noted.parent).of(noted.name) == "whole"


def test_each_process_has_a_file_of_its_own_and_reads_all(noted):
    (noted.parent / ".stamps-0").rename(noted.parent / ".stamps-7")
    Stamps(noted.parent).add(noted.name, (1, 2, 3), "of another file")
    assert Stamps(noted.parent).of(noted.name) == "whole"
