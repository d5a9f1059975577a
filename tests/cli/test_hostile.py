"""One hostile name through everything that shows names: it forges no line, commands no terminal, is no markup and no
formula."""

import ast
import csv
import dataclasses
import io
import logging
import re
import unicodedata
from pathlib import Path

import pytest
from helpers.audits import line
from helpers.commands import fails
from markdown_it import MarkdownIt

from salun_sd import cli
from salun_sd.audit import forms, markdown, page
from salun_sd.audit.compare import Column, Table
from salun_sd.audit.report import assemble, headline_metrics
from salun_sd.checkpoint import provenance
from salun_sd.cli import streams, tables
from salun_sd.runtime import escape

NAME = (
    "=cmd|' /C calc'!A0 \x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066\u200f\ufeff\u2028\x7f\r\nForged: line\n"
    "```\n# Forged\n| a | b |\n<script>alert(1)</script><img src=x>[a](javascript:b) https://x.yz `c` **d** &lt;"
)


def unseen(text: str) -> set[str]:
    """The control and format characters of a text, but the line breaks."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


def is_harmless(text: str) -> bool:
    """Whether a text has the name in it, and the name no effect on it."""
    return "Forged" in text and not unseen(text) and not re.search("^(Forged|#+ Forged)", text, re.MULTILINE)


@pytest.fixture
def report(erased, base):
    manifest = [line(row, **{"class": NAME, "prompt": NAME}) for row in erased.manifest]
    run, base = (dataclasses.replace(run, model=NAME, manifest=manifest) for run in (erased, base))
    made = assemble(run, base, prompts=NAME, settings={"note": NAME, "list": [NAME]}, concepts=[NAME])
    made["broken"] = {NAME: NAME}
    made["gate"] = [{"bound": NAME, "holds": False, "confident": False, "values": {NAME: None}}]
    return made, run, base


def record(report: dict) -> dict:
    """A record in which all texts are the name."""
    audit = headline_metrics(report) | {"sampling": {"samples": NAME, "steps": NAME}}
    names = ("steps", "batch_size", "lr", "retain_weight", "seed")
    return {
        "command": NAME, "concepts": [{"prompt": NAME, "synonyms": [NAME], "anchor": NAME}],
        "settings": dict.fromkeys(names, NAME) | {"format": "diffusers"},
        "images": {"forget": NAME, "retain": NAME}, "data": {"forget": NAME, "retain": NAME},
        "base": {"model": NAME, "family": NAME, "fingerprint": NAME, "license": {"license": NAME, "tags": [NAME]}},
        "erased": {"fingerprint": NAME}, "mask": {"kept": 1, "of": 2}, "changed": {"inside": 1, "outside": NAME},
        "audits": {NAME: audit},
    }  # fmt: skip


def compared() -> list[Table]:
    columns = [Column(NAME, NAME, NAME, False), Column(f"{NAME} 2", NAME, NAME, False)]
    rows = {NAME: [3, 4], "ra": [None, {"n": 1, "of": 2, "rate": 0.5, "ci95": [0.1, 0.9]}]}
    differs = {NAME: {NAME: [NAME], "x": [f"{NAME} 2"]}}
    return [Table(NAME, NAME, True, columns, rows, differs, {}, {f"{NAME} 2": NAME})]


def in_html(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text)


def test_markdown(report):
    for text in (markdown.page(report[0]), forms.as_markdown(compared()), provenance.model_card(record(report[0]))):
        body = text.rpartition("\n---\n")[2] if text.startswith("---") else text  # without the front matter
        assert is_harmless(re.sub("^(`{4,})\n.*?^\\1$", "", body, flags=re.DOTALL | re.MULTILINE))
        assert not unseen(text)
        html = in_html(body)
        assert not re.search("<(script|img|a|strong)\\b", html.replace("<strong>failed</strong>", "")), html
        assert not re.search("<h[1-6]>\\s*Forged", html)


def test_the_front_matter_of_a_card_has_no_keys_of_the_record(report):
    front = provenance.model_card(record(report[0])).split("\n---\n")[0]
    assert "alert" in front and not unseen(front) and "Forged: line" not in front.splitlines()
    assert [key for key in re.findall("^(\\w+):", front, re.MULTILINE) if key not in provenance.LICENSE] == [
        "library_name", "pipeline_tag", "tags"]  # fmt: skip


def test_a_page(report):
    made, run, base = report
    html = page.html(made, run, base)
    assert not unseen(html) and "<script" not in html and "<img src=x" not in html and "&lt;script" in html


def test_a_csv():
    rows = list(csv.reader(io.StringIO(forms.as_csv(compared()))))
    assert rows[1][0] == escape.in_csv(NAME) and rows[1][5] == "3"
    for cell in (cell for row in rows for cell in row):
        assert not unseen(cell) and "\n" not in cell and not cell.startswith(tuple("=+-@\t"))


def test_tables_and_lines_on_the_terminal(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    tables.show_audit(report[0])
    tables.show_compared(compared())
    streams.print_lines(f"Error: {NAME}")
    assert is_harmless(capsys.readouterr().out)


def test_failures_and_the_log(capsys, tmp_path):
    streams.listen()
    logging.getLogger("salun_sd.checkpoint").warning(f"The tensor {NAME} is odd.")
    assert is_harmless(capsys.readouterr().err)
    for argv in (["compare", tmp_path / NAME, tmp_path], ["mask", "pocket", "--plan", NAME],
                 ["evaluate", "pocket", "--prompts", NAME, "--out", tmp_path / "a"]):  # fmt: skip
        assert is_harmless(fails(argv, 2, capsys))
    plan = tmp_path / "plan.toml"
    plan.write_text('"\\u001b[31m\\nForged" = 3')
    assert is_harmless(fails(["erase", "pocket", "--plan", plan, "--out", tmp_path / "out"], 1, capsys))


def test_only_one_function_of_the_commands_prints():
    """So no name can pass by it. Tables have a printer of their own."""
    calls = [
        (file.name, node.lineno)
        for file in Path(cli.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert [name for name, _ in calls] == ["streams.py"], calls
