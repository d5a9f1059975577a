"""What a command says: results on stdout; on stderr lines for a person or, with --json, events for a program."""

import json
import logging
import os
import shutil
import sys
import textwrap
import warnings
from typing import TextIO

from salun_sd.runtime import bar, escape, ranks
from salun_sd.runtime.bar import Bar

logger = logging.getLogger(__name__)


def print_lines(text: str, stream: TextIO | None = None, wraps: bool = True) -> None:
    """Print a text on a stream, or on stdout. A control character in it, a line break too, is printed as a visible one,
    for names and messages from files are no commands for a terminal; on a terminal, lines break between words."""
    stream, text = stream or sys.stdout, escape.line(text)
    if wraps and stream.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print(text, file=stream, flush=True)


class ToStderr(logging.Handler):
    """Prints log records on stderr. An event has the record's `fields`, if it has any, beside its text."""

    def __init__(self, quiet: bool = False, as_json: bool = False):
        super().__init__()
        self.quiet, self.as_json = quiet, as_json

    def emit(self, record: logging.LogRecord) -> None:
        text, stream, kind = self.format(record), sys.stderr, record.levelname.lower()
        if kind == "error" and not ranks.is_main():  # all that another process than the main one prints: see `mute`
            text, stream = f"Process {ranks.rank()}: {text}", sys.__stderr__
        event = {"event": kind, "time": round(record.created, 3), "text": text} | getattr(record, "fields", {})
        if self.quiet and event["event"] not in ("error", "result"):
            return
        with Bar.external_write_mode(stream):  # a bar that is drawn moves down
            if self.as_json:
                print_lines(json.dumps(event), stream, wraps=False)
            elif text:
                print_lines(text, stream)


def listen(*, quiet: bool = False, as_json: bool = False) -> None:
    """Print what the library logs, from level INFO on: for one command, in place of the last one's way."""
    handler = ToStderr(quiet, as_json)
    for name in ("salun_sd", "py.warnings"):
        log = logging.getLogger(name)
        log.handlers = [*(h for h in log.handlers if not isinstance(h, ToStderr)), handler]
    logging.getLogger("salun_sd").setLevel(logging.INFO)
    logging.captureWarnings(quiet or as_json)  # Python's own, of the libraries
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd notes in images whose pixels are whole
    bar.show(bars=not (quiet or as_json), seconds=1.0 if as_json else 60.0)
    if not bar.is_drawn():  # downloads have bars of their own
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def loading() -> None:
    """Say, once, what a command waits for before its first line: the libraries take seconds to load."""
    if "torch" not in sys.modules:
        logger.info("Loading PyTorch and diffusers.")


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
