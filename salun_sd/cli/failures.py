"""Failures and log lines for the person at the terminal: sentences on stderr, and an exit code."""

import logging
import os
import shutil
import sys

import typer
from typer.core import TyperGroup

from salun_sd.errors import SalunError
from salun_sd.runtime import ranks

RANK, _ = ranks.launched()


class Commands(TyperGroup):
    """The commands. A known failure prints one sentence on stderr; with SALUN_SD_DEBUG=1, the traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (SalunError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "out of memory" not in str(e) and "can't allocate memory" not in str(e):
                raise
            if os.environ.get("SALUN_SD_DEBUG"):
                raise
            text, code = in_words(e)
            line, stream = (text, sys.stderr) if RANK == 0 else (f"Process {RANK}: {text}", sys.__stderr__)
            print(line, file=stream)
            raise typer.Exit(code) from e


def in_words(e: BaseException) -> tuple[str, int]:
    """The sentence and the exit code of a failure."""
    if isinstance(e, SalunError):
        return f"Error: {e}", e.exit_code
    if isinstance(e, shutil.Error):  # of copytree: (from, to, reason) for each file
        return f"Error: cannot write {e.args[0][0][1]}: {e.args[0][0][2]}.", 1
    if isinstance(e, OSError):
        place = f" {e.filename}" if e.filename else ""
        return f"Error: cannot read or write{place}: {e.strerror or e}.", 1
    if not isinstance(e, KeyboardInterrupt):
        reason = str(e).partition(".")[0]
        return f"Error: out of memory ({reason}): with --dry-run, mask and erase name options that take less.", 1
    return str(e) or "Interrupted. Nothing is half-written; the same command resumes from what was saved.", 130


class ToStderr(logging.Handler):
    """Prints log lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Print what the library logs, from level INFO on. A second call changes nothing."""
    log = logging.getLogger("salun_sd")
    if not any(isinstance(handler, ToStderr) for handler in log.handlers):
        log.addHandler(ToStderr())
    log.setLevel(logging.INFO)
