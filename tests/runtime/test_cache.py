import errno
import os
import pwd
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from salun_sd.errors import SalunError
from salun_sd.runtime import cache

HOLD = """
import sys
from salun_sd.runtime import cache
with cache.held("drawn", "k") as entry:
    print("held", flush=True)
    sys.stdin.readline()
    (entry / "whole").write_bytes(b"1234")
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def holder(place):
    """Another process that holds drawn/k until a line comes in."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def filled(kind: str, key: str, size: int, days_ago: float = 0) -> Path:
    with cache.held(kind, key) as entry:
        (entry / "images").mkdir(exist_ok=True)
        (entry / "images" / "0.png").write_bytes(b"x" * size)
        then = time.time() - days_ago * 86400
        for path in (entry / "images" / "0.png", entry / "images", entry):
            os.utime(path, (then, then))
    return entry


def test_the_folder_is_the_persons_choice(tmp_path, monkeypatch):
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("SALUN_SD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "salun-sd"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "salun-sd"
    for typed, place in (
        ("~/mine", tmp_path / "mine"),
        ("mine", Path.cwd() / "mine"),
        ("", tmp_path / ".cache/salun-sd"),
    ):
        monkeypatch.setenv("SALUN_SD_CACHE", typed)
        assert cache.folder() == place


def test_a_user_without_a_home_needs_only_the_variable(tmp_path, monkeypatch):
    def unknown(_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as for the numbers that containers run with
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() == tmp_path / "cache"
    for typed in ("", "~/mine", "caf\udce9"):
        monkeypatch.setenv("SALUN_SD_CACHE", typed)
        with pytest.raises(SalunError, match="SALUN_SD_CACHE"):
            cache.folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SALUN_SD_CACHE")
    assert cache.folder() == tmp_path / "salun-sd"


def test_a_second_run_waits_until_the_first_is_done(place, holder, caplog):
    assert not (place / "drawn" / "k" / "whole").exists()
    timer = threading.Timer(0.5, lambda: holder.communicate(b"\n"))
    timer.start()
    with cache.held("drawn", "k") as entry:
        assert (entry / "whole").read_bytes() == b"1234"
    timer.join()
    [line] = caplog.messages
    assert str(entry) in line


def test_another_key_is_free_and_a_killed_run_holds_nothing(holder, caplog):
    with cache.held("drawn", "other"), cache.held("encoded", "k"):
        pass
    holder.kill()
    holder.wait()
    with cache.held("drawn", "k") as entry:
        assert entry.is_dir()
    assert caplog.messages == []


def test_holds_nest_and_the_outer_one_ends_last(place, caplog):
    with cache.held("drawn", "k") as outer:
        with cache.held("drawn", "k") as inner, cache.held("encoded", "k"):
            assert inner == outer
        cache.clear()
        assert outer.is_dir()
        assert not (place / "encoded" / "k").exists()
    assert cache.clear() == (0, 0)
    assert not outer.exists()
    with pytest.raises(ZeroDivisionError), cache.held("drawn", "k"):
        raise ZeroDivisionError
    assert len(caplog.messages) == 1 and str(outer) in caplog.messages[0]
    with cache.held("drawn", "k"):
        assert len(caplog.messages) == 1


def test_a_cache_that_cannot_be_written_is_named(place, tmp_path, monkeypatch):
    def refused():
        with pytest.raises(SalunError) as e, cache.held("drawn", "k"):
            pass
        assert str(cache.folder()) in str(e.value) and "SALUN_SD_CACHE" in str(e.value)

    place.write_bytes(b"a file in its place")
    refused()
    place.unlink()
    for path in (place / "drawn", place / "drawn" / "k"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a file in its place")
        refused()
        path.unlink()
    (place / "drawn" / ".k.lock").unlink()
    (place / "drawn" / ".k.lock").mkdir()
    refused()
    for nowhere in ("/dev/null/cache", "/proc/cache"):
        monkeypatch.setenv("SALUN_SD_CACHE", nowhere)
        refused()


def test_what_fails_inside_a_hold_stays_what_it_is(place, monkeypatch):
    with pytest.raises(IsADirectoryError), cache.held("drawn", "k") as entry:
        entry.write_bytes(b"")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "utime", full)
    with pytest.raises(OSError, match="No space left"), cache.held("drawn", "k"):
        pass


def test_entries_are_folders_largest_first(place):
    assert cache.entries() == []
    filled("drawn", "small", 10)
    filled("encoded", "large", 1000, days_ago=3)
    (place / "drawn" / ".b.123.partial").write_bytes(b"x" * 5000)
    (place / "drawn" / "README").write_bytes(b"not an entry")
    (place / "other" / "folder").mkdir(parents=True)
    found = cache.entries()
    assert [e[:4] for e in found] == [("encoded", "large", 1, 1000), ("drawn", "small", 1, 10)]
    assert time.time() - found[0].used == pytest.approx(3 * 86400, abs=60)
    with cache.held("encoded", "large"):
        pass
    assert time.time() - cache.entries()[0].used < 60  # to hold is to use


def test_clear_removes_what_was_not_used_and_counts_it(place):
    filled("drawn", "old", 10, days_ago=31)
    filled("drawn", "new", 20, days_ago=29)
    assert cache.clear(older_than_days=30) == (1, 10)
    assert [e.name for e in cache.entries()] == ["new"]
    assert cache.clear() == (1, 20)
    assert cache.entries() == [] and cache.clear() == (0, 0)


def test_clear_leaves_what_another_process_holds(place, holder, caplog):
    filled("drawn", "free", 10)
    assert cache.clear() == (1, 10)
    [line] = caplog.messages
    assert str(place / "drawn" / "k") in line
    holder.communicate(b"\n")
    assert cache.clear() == (1, 4)


def test_clear_never_leaves_the_cache(place, tmp_path, caplog):
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    for file in (outside / "a", outside / "folder" / "b"):
        file.write_bytes(b"precious")
    entry = filled("drawn", "k", 10)
    (entry / "file").symlink_to(outside / "a")
    (entry / "folder").symlink_to(outside)
    (place / "drawn" / "linked").symlink_to(outside)
    (place / "encoded").symlink_to(outside)
    (place / "other").mkdir()
    (place / "other" / "mine").write_bytes(b"precious")

    assert cache.clear()[0] == 2  # the image and the link to a file
    assert not entry.exists()
    assert (outside / "a").exists() and (outside / "folder" / "b").exists() and (place / "other" / "mine").exists()
    assert sorted(line.split()[0] for line in caplog.messages) == [str(place / "drawn/linked"), str(place / "encoded")]
