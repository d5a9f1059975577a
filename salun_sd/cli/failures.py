"""Failures and log lines for the person at the terminal: sentences on stderr, and an exit code."""

import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import warnings
from typing import TextIO

import typer
from typer.core import TyperGroup

from salun_sd.errors import SalunError, first_line
from salun_sd.runtime import escape, ranks


class Commands(TyperGroup):
    """The commands. A known failure prints one sentence on stderr; with SALUN_SD_DEBUG=1, the traceback."""

    def invoke(self, ctx):
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # what cannot be printed is a failure here, and no traceback at the end of Python
            return result
        except BrokenPipeError:  # typer ends quietly where the reader of a pipe has gone, as `head` does
            raise
        except (SalunError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "out of memory" not in str(e) and "can't allocate memory" not in str(e):
                raise
            if os.environ.get("SALUN_SD_DEBUG"):
                raise
            text, code = in_words(e)
            if ranks.is_main():
                print_lines(text, sys.stderr)
            else:
                print_lines(f"Process {ranks.rank()}: {text}", sys.__stderr__)
            raise typer.Exit(code) from e


def in_words(e: BaseException) -> tuple[str, int]:
    """The sentence and the exit code of a failure."""
    if isinstance(e, SalunError):
        return f"Error: {e}", e.exit_code
    if isinstance(e, OSError):
        name = e.filename2 or e.filename  # of a copy or a move, the second is the one that is written
        place = f" {name}" if name else ""
        return f"Error: cannot read or write{place}: {e.strerror or first_line(e)}.", 1
    if not isinstance(e, KeyboardInterrupt):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(e))
        size = f" ({asked[1]} more were asked for)" if asked else ""
        return f"Error: out of memory{size}: with --dry-run, mask and erase name options that take less.", 1
    return str(e) or "Interrupted. Nothing is half-written; the same command resumes from what was saved.", 130


def print_lines(text: str, stream: TextIO | None = None) -> None:
    """Print a text on a stream, or on stdout. A control character in it, a line break too, is printed as a visible one,
    for names and messages from files are no commands for a terminal; on a terminal, lines break between words."""
    stream, text = stream or sys.stdout, escape.line(text)
    if stream.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print(text, file=stream, flush=True)


class ToStderr(logging.Handler):
    """Prints log lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print_lines(self.format(record), sys.stderr)


def mute() -> None:
    """Print nothing more: of several processes, only the main one prints. A failure of another is printed all the
    same."""
    sys.stdout = sys.stderr = open(os.devnull, "w")


def repair_streams() -> None:
    """Let nothing that is printed fail: on a closed stream it is lost, and a character that the terminal cannot show is
    escaped. No file gets the number of a closed stream, to which C libraries write their warnings."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def show_log() -> None:
    """Print what the library logs, from level INFO on. A second call changes nothing."""
    log = logging.getLogger("salun_sd")
    if not any(isinstance(handler, ToStderr) for handler in log.handlers):
        log.addHandler(ToStderr())
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd notes in images whose pixels are whole


def loading() -> None:
    """Say, once, what a command waits for before its first line: the libraries take seconds to load."""
    if "torch" not in sys.modules:
        print_lines("Loading PyTorch and diffusers.", sys.stderr)


def fail_on(gate: list[dict] | None) -> None:
    """Exit with code 3, and say why, where a bound of --fail-if does not hold."""
    from salun_sd.report.gate import reasons

    if broken := [entry for entry in gate or () if not entry["holds"]]:
        for entry in broken:
            print_lines(f"Failed: {entry['bound']}: {reasons(entry)}.", sys.stderr)
        ranks.wait()  # else a process that ends first makes the launcher end the main one while it writes
        if ranks.count() > 1:  # once one has ended, the launcher ends the others: each is to end with its own code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise typer.Exit(3)
