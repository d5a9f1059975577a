"""The README says what is true of the commands."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import salun_sd
from salun_sd import cli, plan, prompts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = ["mask", "erase", "apply", "evaluate", "compare", "cache", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_blocks_are_the_real_ones(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cli.run([command, "--help"])
    shown = capsys.readouterr().out.strip()
    assert shown in README, f"The README's help of {command} is stale: COLUMNS=80 salun-sd {command} --help"


def test_every_command_is_documented():
    assert [c.name or c.callback.__name__ for c in cli.app.registered_commands] == COMMANDS


def test_every_command_line_in_the_docs_parses():
    lines = re.findall(
        r"salun-sd (?:mask|erase|apply|evaluate|compare|cache|demo) [^`\n]*", README.replace("\\\n", " ")
    )
    lines = [line for line in lines if "[OPTIONS]" not in line and "--help" not in line]
    assert lines
    group = typer.main.get_command(cli.app)
    for line in lines:
        name, *rest = shlex.split(line.removeprefix("salun-sd ").split("&&")[0])
        group.commands[name].make_context(name, rest)  # raises on an unknown or a missing option


def test_the_file_tree_and_the_prompt_sets_are_complete():
    for path in Path(salun_sd.__file__).parent.glob("*.py"):
        if not path.name.startswith("__"):
            assert re.search(rf"^  {re.escape(path.name)} ", README, re.MULTILINE), path.name
    for name in prompts.builtin() + plan.builtin():
        assert f"`{name}`" in README
