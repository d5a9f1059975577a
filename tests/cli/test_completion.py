"""Shells complete commands, options and values; colours are for terminals alone."""

import io
import os
import shlex
import subprocess
import sys

import pytest
from helpers.commands import fresh

from salun_sd.cli import tables


def answer(**variables) -> str:
    """What salun-sd tells a shell that completes a line, on a narrow terminal."""
    return subprocess.run([sys.executable, "-m", "salun_sd"], env=os.environ | variables | {"COLUMNS": "20"},
                          capture_output=True, text=True, check=True).stdout  # fmt: skip


def test_zsh_and_fish_get_a_line_for_each_option():
    line = "salun-sd evaluate --fi"
    fish = answer(_SALUN_SD_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args", _TYPER_COMPLETE_ARGS=line)
    name, _, about = fish.strip().partition("\t")
    assert name == "--fid" and "inception" in about and len(fish.splitlines()) == 1
    zsh = answer(_SALUN_SD_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    assert zsh.count("\n") == 1 and '"--fid":' in zsh and "inception" in zsh


def test_bash_installs_its_completion_and_completes(tmp_path):
    program = tmp_path / "bin" / "salun-sd"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m salun_sd "$@"\n')
    program.chmod(0o755)
    script = """
        salun-sd --install-completion || exit 1
        . ~/.bash_completions/salun-sd.sh
        COMP_WORDS=(salun-sd erase pocket --format ''); COMP_CWORD=4
        _salun_sd_completion salun-sd; echo "${COMPREPLY[@]}"
    """
    variables = os.environ | {"HOME": str(tmp_path), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["diffusers single-file patch"], run.stderr
    assert "salun-sd.sh" in (tmp_path / ".bashrc").read_text()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "variables", "styled"), [
    (Terminal, {}, True), (Terminal, {"NO_COLOR": "1"}, False), (Terminal, {"TERM": "dumb"}, False),
    (io.StringIO, {}, False),
])  # fmt: skip
def test_only_a_terminal_that_wants_it_gets_bold_letters(stream, variables, styled, monkeypatch):
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream())
    table = tables.Table("metric", "value", box=None)
    table.add_row("ua", "1")
    tables.show(table)
    assert ("\x1b[" in sys.stdout.getvalue()) == styled and "ua" in sys.stdout.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pseudo-terminal")
def test_an_error_on_a_terminal_has_no_colours():
    import pty

    ours, theirs = pty.openpty()
    process = fresh(["-m", "salun_sd", "mask", "pocket", "--nowhere"], stderr=theirs, stdin=theirs, stdout=theirs)
    assert process.wait() == 2
    assert b"--nowhere" in (shown := os.read(ours, 10_000)) and b"\x1b" not in shown
