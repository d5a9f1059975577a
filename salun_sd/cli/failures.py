"""Failures for the person at the terminal: a sentence on stderr, and an exit code."""

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from salun_sd.cli.streams import listen
from salun_sd.errors import SalunError, is_bug, is_out_of_memory, reason
from salun_sd.runtime import ranks
from salun_sd.runtime.escape import visible

logger = logging.getLogger(__name__)


class Commands(TyperGroup):
    """The commands. A known failure prints one sentence on stderr; with SALUN_SD_DEBUG=1, the traceback."""

    def parse_args(self, ctx, args):
        """Let --quiet and --json stand anywhere in the line: they hold from its first word on."""
        words = ways(args)
        listen(quiet="--quiet" in words, as_json="--json" in words)
        with said() if args else nullcontext():  # without a word, typer prints the help
            return super().parse_args(ctx, [*words, *(word for word in args if word not in words)])

    def invoke(self, ctx):
        with said():
            result = super().invoke(ctx)
            sys.stdout.flush()  # what cannot be printed is a failure here, and no traceback at the end of Python
            return result


@contextmanager
def said() -> Iterator[None]:
    """Print a known failure inside the block, and exit with its code."""
    try:
        yield
    except BrokenPipeError:  # typer ends quietly where the reader of a pipe has gone, as `head` does
        raise
    except (Exception, KeyboardInterrupt) as e:
        is_known = isinstance(e, KeyboardInterrupt | TyperException) or not is_bug(e)
        if not is_known or os.environ.get("SALUN_SD_DEBUG"):
            raise
        text, code = in_words(e)
        logger.error(visible(text), extra={"fields": {"code": code}})
        raise typer.Exit(code) from e


def ways(args: list[str]) -> list[str]:
    """The words of a command line that say how a command speaks."""
    return [word for word in args if word in ("--quiet", "--json")]


def in_words(e: BaseException) -> tuple[str, int]:
    """The sentence and the exit code of a failure."""
    if isinstance(e, SalunError):
        return f"Error: {e}", e.exit_code
    if isinstance(e, TyperException):
        text = e.format_message()
        end = "" if text.endswith((".", "?")) else "."
        advice = f" See {e.ctx.command_path} --help." if getattr(e, "ctx", None) else ""
        return f"Error: {text}{end}{advice}", e.exit_code
    if isinstance(e, OSError | ImportError):
        return f"Error: {reason(e)}.", 1
    if is_out_of_memory(e):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(e))
        size = f" ({asked[1]} more were asked for)" if asked else ""
        return f"Error: out of memory{size}: with --dry-run, mask, erase and attack name options that take less.", 1
    return str(e) or "Interrupted. Nothing is half-written; the same command resumes from what was saved.", 130


def fail_on(gate: list[dict] | None) -> None:
    """Exit with code 3, and say why, where a bound of --fail-if does not hold."""
    from salun_sd.report.gate import reasons

    if broken := [entry for entry in gate or () if not entry["holds"]]:
        for entry in broken if ranks.is_main() else ():
            logger.error(f"Failed: {entry['bound']}: {reasons(entry)}.", extra={"fields": {"code": 3}})
        _end(3)


def stop_on(part: dict | None) -> None:
    """Exit with code 4, and say how to go on, where --limit-time ended an audit before all was drawn."""
    if part and part["missing"]:
        if ranks.is_main():
            logger.error(f"Stopped by --limit-time; missing prompts: {part['missing']:,}. Type the same command again "
                         "to go on.", extra={"fields": {"code": 4}})  # fmt: skip
        _end(4)


def _end(code: int) -> None:
    ranks.wait()  # else a process that ends first makes the launcher end the main one while it writes
    if ranks.count() > 1:  # once one has ended, the launcher ends the others: each is to end with its own code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise typer.Exit(code)
