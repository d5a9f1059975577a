"""`salun-sd cache`: what is kept, shown and cleared."""

import os
import time

import pytest
from helpers.commands import fails

from salun_sd.cli import app as cli
from salun_sd.runtime import cache


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Three entries: 3 and 2 images, the latter not used for ten days, and an encoding of 1.5 MB."""
    monkeypatch.setenv("SALUN_SD_CACHE", str(tmp_path / "cache"))
    for kind, key, files, size, days in (("drawn", "one", 3, 10, 0), ("drawn", "two", 2, 10, 10),
                                         ("encoded", "three", 1, 1_500_000, 0)):  # fmt: skip
        with cache.held(kind, key, f"by model-{key}") as entry:
            for i in range(files):
                (entry / f"{i}.png").write_bytes(b"x" * size)
        then = time.time() - days * 86400
        for path in (*entry.iterdir(), entry):
            os.utime(path, (then, then))
    return tmp_path / "cache"


def test_it_is_shown_largest_first_with_what_each_entry_says(kept, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    cli.run(["cache"])
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["kept", "of", "files", "size", "last", "used", "folder"]
    today, then = (time.strftime("%Y-%m-%d", time.localtime(time.time() - days * 86400)) for days in (0, 10))
    assert [row.split() for row in rows] == [
        ["encoded", "by", "model-three", "1", "1.5", "MB", today, "three"],
        ["drawn", "by", "model-one", "3", "0.0", "MB", today, "one"],
        ["drawn", "by", "model-two", "2", "0.0", "MB", then, "two"],
    ]
    assert str(kept) in last and "1.5 MB" in last


def test_it_is_cleared_whole_or_of_what_was_not_used(kept, capsys):
    cli.run(["cache", "--clear", "--older-than", "9"])
    assert " 2 " in capsys.readouterr().out and {e.name for e in cache.entries()} == {"one", "three"}
    cli.run(["cache", "--clear"])
    shown = capsys.readouterr().out
    assert " 4 " in shown and "1.5 MB" in shown and str(kept) in shown
    assert cache.entries() == []


def test_an_age_is_for_clearing(kept, capsys):
    sentence = fails(["cache", "--older-than", "3"], 2, capsys)
    assert "--older-than" in sentence and "--clear" in sentence and len(cache.entries()) == 3


def test_an_audit_that_will_need_a_cache_says_before_it_draws_that_there_is_none(tiny, tmp_path, monkeypatch, capsys):
    audit = ["evaluate", tiny, "--prompts", "pocket", "--limit", "1", "--out", str(tmp_path / "audit")]
    monkeypatch.setenv("SALUN_SD_CACHE", "/dev/null/cache")
    sentence = fails([*audit, "--against", tiny], 2, capsys)
    assert "SALUN_SD_CACHE" in sentence and not (tmp_path / "audit").exists()
    cli.run(audit)  # without a base, it needs none
    assert (tmp_path / "audit" / "report.json").is_file()
