"""A bar on a terminal; elsewhere a line now and then, with the same numbers."""

import io
import logging
import sys

import pytest

from salun_sd.runtime import bar
from salun_sd.runtime.bar import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Every pass counts as a long one."""
    monkeypatch.setattr(bar, "AFTER", 1e-9)
    yield
    bar.show()


def passed(monkeypatch, caplog, stream, total=4, **way) -> list[dict]:
    """What a pass of so many items shows: the fields of its log lines."""
    monkeypatch.setattr(sys, "stderr", stream)
    bar.show(**way)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert list(Bar(range(total), desc="count", unit="item", mininterval=0)) == list(range(total))
    return [record.fields for record in caplog.records]


def test_a_time_has_two_units_at_most():
    times = {0.4: "0 s", 59: "59 s", 60: "1 min", 3570: "1 h 0 min", 3661: "1 h 1 min", 4e6: "1,111 h 7 min"}
    assert {seconds: bar.in_time(seconds) for seconds in times} == times


def test_a_terminal_gets_a_bar_and_a_file_lines(monkeypatch, caplog):
    monkeypatch.setenv("TERM", "xterm")
    terminal, file, dumb = Terminal(), io.StringIO(), Terminal()
    assert passed(monkeypatch, caplog, terminal) == [] and "4/4" in terminal.getvalue()
    lines = passed(monkeypatch, caplog, file, seconds=0)
    assert "|" not in file.getvalue() and [line["done"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["of"] == 4 and lines[-1]["left"] == 0 and lines[-1]["what"] == "count"
    assert "count: 4 of 4" in caplog.messages[-1]
    monkeypatch.setenv("TERM", "dumb")
    assert passed(monkeypatch, caplog, dumb, seconds=0) and "|" not in dumb.getvalue()


def test_lines_come_no_oftener_than_was_asked_and_the_last_one_after_others(monkeypatch, caplog):
    assert passed(monkeypatch, caplog, io.StringIO(), seconds=60) == []
    assert passed(monkeypatch, caplog, Terminal(), bars=False, seconds=60) == []
    assert len(passed(monkeypatch, caplog, io.StringIO(), total=1, seconds=0)) == 1
    monkeypatch.setattr(bar, "AFTER", 60)
    assert passed(monkeypatch, caplog, io.StringIO(), seconds=0) == []  # it was over before
