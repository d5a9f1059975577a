import errno
import os

import pytest

from salun_sd.errors import SalunError
from salun_sd.runtime import files


def test_what_a_killed_run_left_goes_at_the_next_write_of_the_file_or_for_a_folder_of_many_at_once(tmp_path):
    for name in (".a.99999999.partial", ".b.99999999.partial", f".a.{os.getppid()}.partial"):
        (tmp_path / name).write_text("")
    with files.new_file(tmp_path / "a", sweep=False) as partial:
        partial.write_text("many")
    assert (tmp_path / "a").read_text() == "many" and len(list(tmp_path.iterdir())) == 4  # the folder was not read
    files.write_atomic(tmp_path / "a", b"")
    assert {p.name for p in tmp_path.iterdir()} == {"a", ".b.99999999.partial", f".a.{os.getppid()}.partial"}
    files.remove_stale(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a", f".a.{os.getppid()}.partial"}


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
    with pytest.raises(SalunError, match=f"{tmp_path}/out"):
        with files.new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "first").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "first"]
