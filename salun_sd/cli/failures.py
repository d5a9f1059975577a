"""How failures and notes reach the person: one sentence on stderr, and an exit code."""

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
    """Known failures end in one sentence on stderr; SALUN_SD_DEBUG=1 shows the traceback."""

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
    """A failure as a sentence and its exit code."""
    if isinstance(e, SalunError):
        return f"Error: {e}", e.exit_code
    if isinstance(e, shutil.Error):  # of copytree: (from, to, reason) for each file
        return f"Error: cannot write {e.args[0][0][1]}: {e.args[0][0][2]}.", 1
    if isinstance(e, OSError):
        place = f" {e.filename}" if e.filename else ""
        return f"Error: cannot read or write{place}: {e.strerror or e}.", 1
    if not isinstance(e, KeyboardInterrupt):
        reason = str(e).partition(".")[0]
        return f"Error: out of memory ({reason}): mask and erase say with --dry-run what takes less.", 1
    return str(e) or "Interrupted. Nothing is half-written; the same command resumes from what is kept.", 130


class ToStderr(logging.Handler):
    """What the library logs, as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Show the person what the library logs. Calling it again changes nothing."""
    log = logging.getLogger("salun_sd")
    if not any(isinstance(handler, ToStderr) for handler in log.handlers):
        log.addHandler(ToStderr())
    log.setLevel(logging.INFO)
