"""The names of the options: those of today, and old ones that go on working."""

import re

import pytest
import typer
from helpers.commands import CONCEPT, fails
from helpers.runs import write_photographs

from salun_sd.cli import app as cli
from salun_sd.cli.command import RENAMED
from salun_sd.cli.streams import listen
from salun_sd.errors import UsageError

LEAST = {  # what each command cannot do without
    "mask": ["pocket"],
    "erase": ["pocket", "--out", "out"],
    "evaluate": ["pocket", "--prompts", "pocket", "--out", "out"],
    "demo": ["--out", "out"],
}
NAMES = [pytest.param(command, old, new, id=f"{command} {old}") for (command, old), new in RENAMED.items()]


def parsed(command: str, *words: str) -> dict:
    """The values of all parameters, as the command gets them."""
    listen()
    return typer.main.get_command(cli.app).commands[command].make_context(command, [*LEAST[command], *words]).params


def test_these_names_are_old():
    assert {command: sorted(old for c, old in RENAMED if c == command) for command in LEAST} == {
        "mask": ["--guidance", "--resolution"], "erase": ["--clip", "--guidance", "--resolution"],
        "evaluate": ["--concept", "--steps"], "demo": ["--anchor", "--concept"]}  # fmt: skip


@pytest.mark.parametrize(("command", "old", "new"), NAMES)
@pytest.mark.parametrize("form", ["two words", "with ="])
def test_an_old_name_is_the_new_one_and_one_line_says_so(command, old, new, form, capsys):
    def given(name: str) -> dict:
        return parsed(command, *([name, "24"] if form == "two words" else [f"{name}=24"]))

    plain, today = parsed(command), given(new)
    assert today != plain and capsys.readouterr().err == ""
    assert given(old) == today
    [line] = capsys.readouterr().err.splitlines()
    assert old in line.split() and re.search(rf"(?<!\S){new}(?![\w-])", line)


def test_an_old_and_a_new_name_are_one_option_in_two_places():
    both = parsed("evaluate", "--concept", "bag", "--concept-class", "coat", "--concept", "dress")
    assert both["concept_class"] == ["bag", "coat", "dress"]
    with pytest.raises(UsageError, match="--size"):
        parsed("erase", "--resolution", "24", "--size", "32")


@pytest.mark.parametrize(("command", "old", "new"), NAMES)
def test_help_shows_the_new_name_alone(command, old, new, capsys):
    cli.run([command, "--help"])
    options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out.partition("Example:")[0])
    assert new in options and old not in options


def test_a_name_is_old_only_where_it_was_renamed(capsys):
    assert parsed("erase", "--steps", "24")["steps"] == 24
    assert parsed("mask", "--concept", "24")["concept"] == ["24"]
    assert parsed("evaluate", "--guidance", "24")["guidance"] == 24
    assert capsys.readouterr().err == ""


def test_a_run_with_old_names_makes_the_same_bytes(tiny, tmp_path, capsys):
    photographs = write_photographs(tmp_path / "photographs")
    for name, options in {
        "old": ["--guidance", "2", "--resolution", "16"],
        "new": ["--saliency-guidance", "2", "--size", "16"],
        "other": [],
    }.items():
        cli.run(["mask", tiny, "--concept", CONCEPT, "--forget", str(photographs), *options,
                 "--out", str(tmp_path / f"{name}.safetensors")])  # fmt: skip
    old, new, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("old", "new", "other"))
    assert old == new != other


def values_of(command: str) -> list[list[str]]:
    """For each parameter of a command that takes a value: the words before it."""
    params = typer.main.get_command(cli.app).commands[command].params
    return [
        [param.opts[0]] if param.param_type_name == "option" else []
        for param in params if not getattr(param, "is_flag", False)
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["mask", "erase", "apply", "push", "evaluate", "compare", "demo"])
@pytest.mark.parametrize("value", ["", " ", b"caf\xe9".decode("utf-8", "surrogateescape")], ids=ascii)
def test_no_path_or_text_is_empty_or_of_odd_bytes(command, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = values_of(command)
    assert options
    for option in options:
        sentence = fails([command, *option, value], 2, capsys)
        assert (option or ["{"])[0].strip("{") in sentence and sentence.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_help_cuts_nothing_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    cli.run(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert sum(line.split() == [name, *command.help.splitlines()[0].split()] for line in lines) == 1, name
