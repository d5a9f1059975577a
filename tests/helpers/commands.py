"""The commands as tests type them: in this process, or in one of their own."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import warm

from salun_sd.cli import app as cli
from salun_sd.runtime.stamps import FILE as STAMPS

CONCEPT, ANCHOR = "a photo of a sneaker", "a photo of a bag"
ERASE = ["erase", "pocket", "--concept", CONCEPT, "--anchor", ANCHOR, "--samples", "8", "--steps", "3",
         "--batch-size", "4", "--lr", "1e-4"]  # fmt: skip


def fails(argv, code, capsys) -> str:
    """Run a command that must fail; its one sentence."""
    with pytest.raises(SystemExit) as ended:
        cli.run([str(a) for a in argv])
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == code, sentence
    return sentence


def files_in(folder: Path) -> set[str]:
    """All files but the stamps of others, which have the times of those."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not STAMPS.fullmatch(p.name)}


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Inside, no file can be larger than so many bytes, which stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fresh(args, before=(), **kwargs) -> subprocess.Popen:
    """Start `python ARGS`, a new interpreter, with the words of a program that starts others before it."""
    return subprocess.Popen([*before, sys.executable, *args], text=True, **kwargs)


# `python ARGS` in a process that is forked where it can be: it waits for no imports.
python = warm.Process if sys.platform == "linux" else fresh


def spawn(argv, start=python, **kwargs) -> warm.Process | subprocess.Popen:
    """Start a command in a process of its own."""
    return start(["-m", "salun_sd", *map(str, argv)], stderr=subprocess.PIPE, **kwargs)


def until(happens, process=None) -> None:
    """Wait until something happens, or the process ends. After two minutes, kill the process and raise
    AssertionError."""
    deadline = time.monotonic() + 120
    while not happens() and (process is None or process.poll() is None):
        if time.monotonic() > deadline:
            if process is not None:
                process.kill()
            raise AssertionError("two minutes went by, and what the test waits for did not happen")
        time.sleep(0.01)


@contextmanager
def ctrl_c_at(place: Path, times: int = 1) -> Iterator[None]:
    """Inside, Ctrl-C comes to this process when so often a file was put in this place, or into this folder: at a moment
    that no other process can miss."""
    put, left = os.replace, times

    def replace(partial, to):
        nonlocal left
        put(partial, to)
        path = Path(to).absolute()
        left -= place.absolute() in (path, path.parent)
        if not left:
            left = -1
            signal.raise_signal(signal.SIGINT)

    os.replace = replace
    try:
        yield
    finally:
        os.replace = put
