"""README.md and docs/ say what is true of the program.

`python tests/test_docs.py` writes docs/cli-reference.md anew.
"""

import ast
import inspect
import io
import json
import os
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import typer

import salun_sd
from salun_sd.audit.protocols import LABELS, PROTOCOLS
from salun_sd.cli import app as cli
from salun_sd.cli.failures import ways
from salun_sd.draw import prompts
from salun_sd.edit import concepts
from salun_sd.runtime import seals

ROOT = Path(__file__).parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "salun_sd"
PAGES = {str(file.relative_to(ROOT)): file for file in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
REFERENCE = DOCS / "cli-reference.md"
GROUP = typer.main.get_command(cli.app)
OF_PAGE = {
    "erase.md": ["mask", "erase", "apply", "push", "evaluate", "cache"],
    "audit.md": ["evaluate"],
    "gate.md": ["evaluate"],
    "report-json.md": ["evaluate", "merge"],
    "compare.md": ["compare"],
}  # the rest: all
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages."""
    return [text for language, text in FENCE.findall(read(page)) if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def code_in(text: str) -> list[str]:
    """Inline code, each in one line."""
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]


def reference() -> str:
    """docs/cli-reference.md with the help of today, at 80 columns; what stands before the first command is kept."""
    head, _, _ = read(REFERENCE).partition("\n## ")
    parts = [head.rstrip() + "\n"]
    for name in GROUP.commands:
        shown = io.StringIO()
        with redirect_stdout(shown), patch.dict(os.environ, COLUMNS="80"):
            cli.run([name, "--help"])
        parts.append(f"## {name}\n\n```text\n{shown.getvalue().strip()}\n```\n")
    return "\n".join(parts)


def test_the_reference_is_the_real_help():
    assert read(REFERENCE) == reference(), "docs/cli-reference.md is stale: python tests/test_docs.py"


def test_every_command_is_in_the_readme():
    named = {words.split()[1] for words in code_in(prose(ROOT / "README.md")) if words.startswith("salun-sd ")}
    named |= {name for line in typed(ROOT / "README.md") for name in line[:1]}
    assert named == set(GROUP.commands)


def typed(page: Path) -> list[list[str]]:
    """The words after `salun-sd` of each command that a page has, in blocks and in inline code."""
    lines = "\n".join(blocks(page, "sh", "yaml", "text")).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if not line.startswith("Usage:")]
    lines += [words for words in code_in(prose(page)) if len(words.split()) > 2]
    found = [re.search(r"(?:salun-sd|-m salun_sd) (\w.*)", part) for line in lines for part in line.split("&&")]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_every_command_line_parses(page, capsys):
    for name, *rest in typed(page):
        assert name in GROUP.commands, name
        rest = [word for word in rest if word not in ways(rest)]  # the group takes these
        GROUP.commands[name].make_context(name, rest)  # raises on an unknown or a missing option
    assert not capsys.readouterr().err  # where an old name of an option is said


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_every_option_that_is_named_exists(page):
    of_page = OF_PAGE.get(page.name, list(GROUP.commands))
    params = [*GROUP.params, *(param for name in of_page for param in GROUP.commands[name].params)]
    known = {option for param in params for option in [*param.opts, *param.secondary_opts]} | {"--help"}
    options = " ".join(words for words in code_in(prose(page)) if words.startswith("--"))
    assert set(re.findall(r"(?<!\S)--[\w-]+", options)) <= known


def test_commands_and_options_are_found_in_the_pages():
    assert sum(len(typed(page)) for page in PAGES.values()) > 25
    assert ["cache"] in typed(DOCS / "erase.md") and len(typed(REFERENCE)) == len(GROUP.commands)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES.values(), ROOT / "BENCHMARKS.md"], ids=[*PAGES, "BENCHMARKS.md"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists() and file.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_python_blocks_call_what_there_is(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for call in ast.walk(ast.parse(block)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("salun_sd."):
                function = getattr(salun_sd, ast.unparse(call.func).removeprefix("salun_sd."))
                if not any(isinstance(a, ast.Starred) for a in call.args) and all(k.arg for k in call.keywords):
                    inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords})


def test_the_readme_shows_python():
    assert "salun_sd.erase(" in "".join(blocks(ROOT / "README.md", "python"))


def test_the_tree_names_every_module_and_no_other():
    [tree] = [block for block in blocks(DOCS / "architecture.md", "text") if block.startswith("salun_sd/\n")]
    named, folder = set(), ""
    for indent, name in re.findall(r"^( +)(\S+)", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            named.add(name if len(indent) == 2 else f"{folder}{name}")
    files = {str(f.relative_to(PACKAGE)) for ending in ("py", "j2", "css", "csv") for f in PACKAGE.rglob(f"*.{ending}")}
    assert named == {file for file in files if not file.endswith("/__init__.py")}


def test_the_floors_are_those_of_the_house():
    house = ast.parse(read(ROOT / "tests" / "test_house.py"))
    [floors] = [
        node.value for node in house.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    ]
    drawn = [set(line.split()) for line in blocks(DOCS / "architecture.md", "text")[0].splitlines()]
    assert drawn[-1] == {"salun_sd/__init__.py"}
    assert [{"__main__"}, *drawn[:-1], {"__init__"}] == ast.literal_eval(floors)


def test_built_in_sets_and_plans_are_named():
    assert set(prompts.builtin()) <= set(code_in(prose(DOCS / "audit.md")))
    assert set(concepts.builtin()) <= set(code_in(prose(DOCS / "erase.md")))


def test_the_protocols_are_in_the_table():
    rows = {cells[0].strip("`"): cells[2:] for cells in table(read(DOCS / "audit.md").partition("## Protocols")[2])}
    assert set(rows) == set(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        threshold, unit = rows[name]
        assert threshold == (str(protocol.threshold) if protocol.threshold else "every box")
        assert unit.startswith(protocol.unit)


def table(section: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    lines = section[section.index("\n| ") + 1 :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def keys(value: object) -> set[str]:
    """Every key at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_every_key_of_a_report_is_documented_and_no_other(tmp_path):
    from helpers.models import write_clip

    rows = prompts.read("pocket", limit=2)
    (tmp_path / "p.csv").write_text(prompts.as_csv(rows))
    report = salun_sd.evaluate(
        "pocket", against="pocket", prompts=str(tmp_path / "p.csv"), denoising_steps=1, fail_if="flag_rate > 1",
        clip=str(write_clip(tmp_path / "clip")), fid="pocket", out=tmp_path / "audit",
    )  # fmt: skip
    written = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert written == seals.sealed(json.loads(json.dumps(report)))
    page = read(DOCS / "report-json.md")
    sections = {part.partition("\n")[0]: part for part in page.split("\n## ")}
    head = sections.pop("# Keys of report.json")

    def documented(section: str) -> set[str]:
        return {key for cells in table(section) for key in code_in(cells[0])}

    assert documented(head) == set(written)
    assert documented(sections["Settings"]) == set(report["settings"])
    assert documented(sections["Shares"]) == set(report["metrics"])
    assert documented(sections["Quality"]) == set().union(*report["quality"].values())
    assert all(documented(sections["Pairs"]) == set(pairs) for pairs in report["paired"].values() if pairs)
    assert documented(sections["Gate"]) == set(report["gate"][0])

    names = {*LABELS, *PROTOCOLS, *(p.label for p in rows), *report["gate"][0]["values"]}
    names = names.union(*(of["became"] for side in (report, report["against"]) for of in side["classes"].values()))
    for told, text in ((report, page), (report["settings"], sections["Settings"])):
        assert not {key for key in keys(told) - names if f"`{key}`" not in text and f'"{key}"' not in text}


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
