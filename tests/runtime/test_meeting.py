"""How the processes of a run find each other, and what happens where they do not."""

import signal
import socket
import time
from datetime import timedelta

import pytest

from salun_sd.errors import UsageError
from salun_sd.runtime import ranks

PLACE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """What sets the launcher's variables; there are none at first."""
    for name in (*PLACE, "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_place", {"rank": 0, "count": 1})

    def put(changes: dict) -> None:
        for name, value in (PLACE | changes).items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)

    return put


@pytest.fixture
def nobody(variables, monkeypatch):
    """Variables of two processes of which there is one, by its rank; it waits for so many seconds."""

    def alone(rank: str, seconds: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            variables({"RANK": rank, "MASTER_PORT": str(free.getsockname()[1])})
        monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=seconds))

    return alone


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, (0, 2)), ({"RANK": "1"}, (1, 2)), ({"WORLD_SIZE": " 8 ", "RANK": "7"}, (7, 8)),
        ({"WORLD_SIZE": "1", "RANK": "x"}, (0, 1)), ({"WORLD_SIZE": ""}, (0, 1)), ({"WORLD_SIZE": None}, (0, 1)),
    ],
)  # fmt: skip
def test_the_launchers_variables_are_read(changes, place, variables):
    variables(changes)
    assert ranks.launched() == place


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "WORLD_SIZE": ["two", "-1", "0", "2.5"],
        "RANK": [None, "", "x", "-1", "2"],
        "MASTER_ADDR": [None, " "],
        "MASTER_PORT": [None, "", "http", "0", "65536"],
        "LOCAL_RANK": ["zz", "-1", "2"],
    }.items(),
)
def test_one_that_is_wrong_is_named(name, values, variables):
    for value in values:
        variables({name: value})
        with pytest.raises(UsageError, match=rf"\b{name}\b.*unset WORLD_SIZE"):
            ranks.start("cpu")


@pytest.mark.parametrize(("says", "share"), [("4", 4), ("0", 1), ("", 1), ("two", 1), (None, 1)])
def test_memory_is_shared_with_the_processes_beside_it_if_there_are_any(says, share, variables, monkeypatch):
    variables({"LOCAL_WORLD_SIZE": says})
    assert ranks.beside() == 1  # the variables are what some other launcher left
    monkeypatch.setitem(ranks._place, "count", 4)
    assert ranks.beside() == share


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_process_that_nobody_meets_says_so_in_time(rank, nobody, caplog):
    nobody(rank, 1)
    started = time.monotonic()
    with caplog.at_level("INFO"), pytest.raises(UsageError, match="WORLD_SIZE is 2.*127.0.0.1.*torchrun"):
        ranks.start("cpu")
    assert 0.9 < time.monotonic() - started < 10 and ranks.count() == 1
    assert "127.0.0.1" in caplog.text  # said before the wait


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_ends_the_wait(rank, nobody):
    nobody(rank, 60)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            ranks.start("cpu")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 30
