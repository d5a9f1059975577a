"""Short runs on small pipelines: what they are given, what they leave, and command lines that must fail."""

import shlex
from pathlib import Path

from helpers.commands import ANCHOR, CONCEPT, fails
from PIL import Image
from skimage import data

from salun_sd.checkpoint import provenance
from salun_sd.draw import prompts

PAIR = ["--concept", CONCEPT, "--anchor", ANCHOR]
SHORT = ["--steps", "2", "--batch-size", "4", "--lr", "1e-4"]


def write_photographs(folder: Path, count: int = 3) -> Path:
    """0.png, 1.png, ...: pieces of one photograph, each another one."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(data.astronaut()[50 * i : 50 * i + 64, 200:264]).save(folder / f"{i}.png")
    return folder


def write_prompts(file: Path, every: int, limit: int | None = None) -> Path:
    """A prompt set of every n-th row of `pocket`, which has a hundred for each class."""
    file.write_text(prompts.as_csv(prompts.read("pocket")[::every][:limit]))
    return file


def record_of(folder: Path) -> dict:
    """The record in a folder, without its digest."""
    return provenance.read(folder)


def erased_fingerprint(folder: Path) -> str:
    """The SHA-256 of the UNet that an erasure made."""
    return record_of(folder)["erased"]["fingerprint"]


def typed(line: str, places: dict) -> list[str]:
    """A command line in words; {name} stands for a place."""
    return [word.format_map(places) for word in shlex.split(line)]


def fails_with(line: str, places: dict, code: int, named: str, capsys) -> None:
    """A command line ends with an exit code and one sentence that has each of these words, some of them in quotes."""
    sentence = fails(typed(line, places), code, capsys)
    missing = [word for word in typed(named, places) if word not in sentence]
    assert not missing, f"{missing} not in: {sentence}"
