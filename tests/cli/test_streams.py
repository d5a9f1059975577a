"""What a command says on stderr: lines for a person, nothing but failures, or events for a program."""

import json
import logging
import sys
import warnings

import pytest
from helpers.commands import CONCEPT

from salun_sd.cli import app as cli
from salun_sd.cli import streams


@pytest.fixture(autouse=True)
def afterwards():
    yield
    streams.listen()


def said(argv, capsys, code=0) -> tuple[str, str]:
    """stdout and stderr of a command that ends with a code."""
    try:
        cli.run(list(argv))
    except SystemExit as e:
        assert e.code == code
    else:
        assert code == 0
    return capsys.readouterr()


def events(argv, capsys, code=0) -> list[dict]:
    """The events of a command, in order."""
    return [json.loads(line) for line in said(argv, capsys, code).err.splitlines()]


def settings_in(shown: str) -> str:
    """What a dry run prints, without the memory, which differs from run to run."""
    return shown.partition("memory,")[0]


def test_a_run_says_the_same_to_a_person_and_to_a_program_and_quiet_leaves_the_result(tiny, capsys):
    dry = ["mask", tiny, "--concept", CONCEPT, "--dry-run"]
    plain, (out, err) = said(dry, capsys), said([*dry[:2], "--quiet", *dry[2:]], capsys)
    assert plain.err and err == "" and settings_in(out) == settings_in(plain.out)
    found = events([*dry, "--json"], capsys)
    assert found[0]["event"] == "start" and found[-1]["event"] == "result"
    assert [e["text"] for e in found if e["event"] == "info"] == plain.err.splitlines()
    assert found[-1]["command"] == "mask" and found[-1]["out"] == "mask.safetensors"
    assert all({"event", "time", "text"} <= e.keys() for e in found)


def test_the_words_stand_anywhere_and_hold_for_one_command(capsys):
    for argv, kinds in {
        "--json cache": ["start", "result"], "cache --json": ["start", "result"],
        "--quiet cache --json": ["result"], "cache --json --quiet": ["result"],
    }.items():  # fmt: skip
        assert [event["event"] for event in events(argv.split(), capsys)] == kinds
    assert said(["cache"], capsys).err == ""


@pytest.mark.parametrize("argv", [["mask", "nowhere", "--concept", "x"], ["mask", "pocket", "--nowhere"], ["nowhere"],
                                  ["mask", "pocket", "--seed", "1", "--seed", "2"], ["--nowhere"], ["mask"],
                                  ["mask", "pocket", "--dtype", "float8"]])  # fmt: skip
def test_the_last_event_of_a_failure_is_an_error_with_its_code(argv, capsys):
    found = events([*argv, "--json"], capsys, code=2)
    assert found[-1]["event"] == "error" and found[-1]["code"] == 2
    assert [e["event"] for e in events(["--json", "--quiet", *argv], capsys, code=2)] == ["error"]


def test_of_several_processes_the_main_one_says_that_a_command_begins(capsys, monkeypatch):
    wrong = ["--json", "mask", "pocket", "--concept", "x", "--plan", "nudity"]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # to be put back: another process than the main one is mute
    assert [event["event"] for event in events(wrong, capsys, code=2)] == ["start", "error"]
    monkeypatch.setenv("RANK", "1")
    assert [event["event"] for event in events(["--json", "cache"], capsys)] == ["start", "result"]  # it has no others
    assert events(wrong, capsys, code=2) == []


@pytest.mark.parametrize(("option", "named"), [
    (["--dtype", "float8"], ["--dtype", "float8", "float32, bfloat16, float16"]), (["--out"], ["--out"]),
    (["--samples", "x"], ["--samples", "'x'"]), (["--samples", "0"], ["--samples", "'0'", " 1 "]),
    (["--density", "much"], ["--density", "'much'"]), (["--nowhere"], ["--nowhere", "mask --help"]), ([], ["MODEL"]),
])  # fmt: skip
def test_what_is_wrongly_typed_is_one_sentence(option, named, capsys):
    [sentence] = said(["mask", *(["pocket", *option] if option else ())], capsys, code=2).err.splitlines()
    assert [word for word in named if word not in sentence] == []


def test_warnings_and_odd_names_are_events_of_one_line(capsys):
    streams.listen(as_json=True)
    logging.getLogger("salun_sd.draw").warning("a\x1b[31m\nb ☃")
    warnings.warn("old", FutureWarning, stacklevel=1)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["event"] == second["event"] == "warning" and first["text"] == "a\x1b[31m\nb ☃"
    assert "old" in second["text"]


def test_the_numbers_of_a_bar_are_an_event(capsys):
    streams.listen(as_json=True)
    fields = {"event": "progress", "what": "draw", "done": 3, "of": 7, "unit": "image", "left": 2.5}
    logging.getLogger("salun_sd.runtime.bar").info("draw: 3 of 7", extra={"fields": fields})
    [line] = capsys.readouterr().err.splitlines()
    assert fields.items() <= json.loads(line).items()
