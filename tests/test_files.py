import errno
import os

import pytest

from salun_sd import files
from salun_sd.errors import SalunError


def test_a_placed_file_is_the_others_bytes_and_stays_them_when_the_other_is_replaced(tmp_path):
    for name in ("kept", "old"):
        (tmp_path / name).write_bytes(name.encode())
    files.place(tmp_path / "kept", tmp_path / "new" / "file")
    files.place(tmp_path / "kept", tmp_path / "old")
    files.place(tmp_path / "kept", tmp_path / "old")
    files.write_atomic(tmp_path / "kept", b"other")
    assert (tmp_path / "new" / "file").read_bytes() == (tmp_path / "old").read_bytes() == b"kept"
    assert {p.name for p in tmp_path.iterdir()} == {"kept", "old", "new"}
    with pytest.raises(FileNotFoundError):
        files.place(tmp_path / "nowhere", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.99999999.partial").mkdir()  # as kill -9 leaves it
    (tmp_path / ".out.99999999.partial" / "stale").write_text("")
    (tmp_path / f".out.{os.getppid()}.partial").mkdir()  # of a run that goes on
    with files.new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("")
    assert {p.name for p in tmp_path.iterdir()} == {"out", f".out.{os.getppid()}.partial"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_file_is_whole_or_not_there(tmp_path):
    (tmp_path / "file").mkdir()  # a place that cannot be renamed into
    with pytest.raises(OSError) as raised:
        files.write_atomic(tmp_path / "file", b"data")
    assert raised.value.errno == errno.EISDIR
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_of_two_that_make_one_folder_the_second_says_so_and_leaves_the_first(tmp_path):
    with pytest.raises(SalunError, match="out was filled by another run meanwhile"):
        with files.new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "first").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "first"]
