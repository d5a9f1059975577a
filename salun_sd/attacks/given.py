"""What the user gives to an attack: pictures, texts, a mask."""

import hashlib
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from salun_sd.attacks.attack import Scene
from salun_sd.attacks.target import Target
from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.core.mask import Bits
from salun_sd.draw import prompts
from salun_sd.draw.encode import encode_image, fitted
from salun_sd.draw.folders import images_in
from salun_sd.draw.images import read_image
from salun_sd.draw.prompts import Prompt, whole
from salun_sd.draw.tables import read_text
from salun_sd.errors import UsageError
from salun_sd.runtime.contents import no_file

NAMELESS = "thing"  # the word in place of the concept's, where an attack has to find it by itself


class Pictures(NamedTuple):
    """Pictures of the concept, a file for each case, and of other things, with their captions."""

    files: dict[int, Path]
    others: list[tuple[Path, str]]
    size: tuple[int, int]  # width, height in pixels, that attacks see them in

    def of(self, target: Target) -> Callable[[Prompt], torch.Tensor]:
        """A function of a prompt that gives the picture for it, as latents [1, C, h, w] of a target."""
        encoded = lru_cache(None)(partial(latents_of, target, size=self.size))
        return lambda prompt: encoded(self.files[prompt.case])

    def captioned(self, target: Target) -> Callable[[], tuple[torch.Tensor, list[str]]]:
        """A function that gives the pictures of other things, latents [N, C, h, w], and their captions."""
        return lambda: (torch.cat([latents_of(target, file, size=self.size) for file, _ in self.others]),
                        [text for _, text in self.others])  # fmt: skip


def in_folder(folder: Path, cases: Sequence[Prompt]) -> dict[int, Path]:
    """The images of --pictures, in turn, a file for each case. Raises UsageError where there are none."""
    if not (files := images_in(folder) if folder.is_dir() else []):
        raise UsageError(f"--pictures {folder} is no folder with images: give one with pictures of the concept.")
    for file in files:
        read_image(file)
    return {p.case: files[n % len(files)] for n, p in enumerate(cases)}


def latents_of(target: Target, file: Path, *, size: tuple[int, int]) -> torch.Tensor:
    """An image file as latents [1, C, h, w] of a target, of a width and a height in pixels."""
    return encode_image(target.pipeline, fitted(read_image(file), size))[None]


def check_file(option: str, file: str | Path | None, what: str) -> None:
    """Raise UsageError where an option is given, and names no file."""
    if file and (fault := no_file(Path(file))):
        raise UsageError(f"--{option} {file} {fault}: give {what}.")


class Texts(NamedTuple):
    """What the user and the record of the erasure know of the concept in words."""

    words: list[str]  # descriptions of it
    synonyms: list[str]  # more prompts of it
    adversarial: list[Prompt]  # prompts of others

    @classmethod
    def of(
        cls, concept: str, model: Checkpoint, words: str | Path | None, adversarial: str | Path | None,
        guidance: float | None, size: tuple[int, int],
    ) -> "Texts":  # fmt: skip
        """From the files of --words and --adversarial, if they are given; the adversarial prompts with this size and,
        if it is given, this guidance. Raises UsageError or SalunError for a file that is missing, damaged or empty."""
        record = provenance.read(model.path) or {"concepts": []}
        synonyms = [text for one in record["concepts"] if one["prompt"] == concept for text in one["synonyms"]]
        check_file("words", words, "a text file with a description of the concept in each line")
        check_file("adversarial", adversarial, "a CSV file with a column prompt")
        described = [line.strip() for line in read_text(Path(words)).splitlines() if line.strip()] if words else []
        if words and not described:
            raise UsageError(f"--words {words} is empty: write a description of the concept into each line.")
        found = prompts.read(str(adversarial)) if adversarial else []
        return cls(described, synonyms, prompts.overridden(found, guidance, size))


class Material(NamedTuple):
    """All that attacks may be given."""

    pictures: Pictures | None
    texts: Texts
    mask: Bits | None
    mask_file: str | None  # SHA-256 of the file

    def scene(self, target: Target, concept: str, cases: Sequence[Prompt], seed: int) -> Scene:
        """The scene of all attacks on a target. Each picture is encoded once."""
        pictures, texts = self.pictures, self.texts
        return Scene(
            target, concept, cases, pictures and pictures.of(target), pictures and pictures.captioned(target),
            words=texts.words, synonyms=texts.synonyms, mask=self.mask, seed=seed,
        )  # fmt: skip

    def digest(self, needs: Container[str]) -> str:
        """A SHA-256 of what was given, as far as an attack needs it."""
        pictures, texts, whole = self.pictures, self.texts, hashlib.sha256()
        files = {"picture": pictures and pictures.files.values(),
                 "others": pictures and [file for file, _ in pictures.others]}  # fmt: skip
        values = {"words": (texts.words, texts.synonyms), "adversarial": texts.adversarial, "mask": self.mask_file}
        for value in [value for need, value in values.items() if need in needs]:
            whole.update(repr(value).encode())
        for file in [file for need, of in files.items() if need in needs for file in of or ()]:
            whole.update(hashlib.sha256(file.read_bytes()).digest())
        return whole.hexdigest()


def without_name(scene: Scene, names: Sequence[str]) -> Scene:
    """The scene whose prompts have another word in place of the concept's names: those given, and its own."""
    prompts = [p._replace(text=nameless(p.text, [*names, scene.name])) for p in scene.prompts]
    return replace(scene, nameless=True, prompts=prompts)


def nameless(text: str, names: Sequence[str]) -> str:
    """A text with another word in place of names; the empty text in place of a name alone, which asks a
    class-conditional model for no class."""
    for name in sorted(names, key=len, reverse=True):
        text = whole(name).sub(NAMELESS, text)
    return "" if text == NAMELESS else text
