"""The README says what is true of the commands."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import salun_sd
from salun_sd.audit.protocols import LABELS, PROTOCOLS
from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.edit.concepts import builtin

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
    for name in prompts.builtin() + builtin():
        assert f"`{name}`" in README


def keys(value: object) -> set[str]:
    """Every key at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_every_key_of_a_report_is_in_the_readme(tmp_path):
    rows = prompts.read("pocket", limit=2)
    (tmp_path / "p.csv").write_text(prompts.write(rows))
    cli.run(["evaluate", "pocket", "--against", "pocket", "--prompts", str(tmp_path / "p.csv"), "--steps", "1",
             "--fail-if", "flag_rate > 1", "--out", str(tmp_path / "audit")])  # fmt: skip
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    names = {*LABELS, *PROTOCOLS}.union(*(side["classes"] for side in (report, report["against"])))
    names = names.union(*(of["became"] for side in (report, report["against"]) for of in side["classes"].values()))
    schema = README[README.index("`report.json` (schema") : README.index("### compare")]
    [settings] = re.findall(r"^\| `settings` \| .*", schema, re.MULTILINE)
    for told, text in ((keys(report), schema), (keys(report["settings"]), settings)):
        assert len(told - names) > 15
        assert not {key for key in told - names if f"`{key}`" not in text and f'"{key}"' not in text}
