"""The commands of `demo`, and the settings with which the bundled checkpoint is erased."""

import sys
from pathlib import Path

from salun_sd.core.mask import keep_count
from salun_sd.draw import prompts
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import UsageError
from salun_sd.runtime.files import write_atomic

POCKET_TRAINING = "--steps 100 --batch-size 32 --lr 1e-4".split()  # all else is the default


def commands(concept: str, anchor: str, density: float, out: Path) -> list[list[str]]:
    """The mask, erase and evaluate commands for a class of the pocket checkpoint. Writes their prompt set into `out`.

    Raises UsageError for an unknown class or a density outside (0, 1], and where `out` holds a demo of another class.
    """
    rows = prompts.read("pocket")
    classes = list(dict.fromkeys(p.label for p in rows))
    for name in (concept, anchor):
        if name not in classes:
            raise UsageError(f"The pocket checkpoint knows no {name}; it knows {', '.join(classes)}.")
    if concept == anchor:
        raise UsageError(f"Concept and anchor are both {concept}: the anchor has to be something else.")
    keep_count(density, sys.maxsize)  # raises outside (0, 1]
    prompt_set = prompts.as_csv(audit_prompts(rows, concept))
    if (out / "prompts.csv").exists() and (out / "prompts.csv").read_bytes() != prompt_set.encode():
        raise UsageError(f"{out} holds a demo of another concept: choose another --out, or remove it.")
    write_atomic(out / "prompts.csv", prompt_set)
    mask, erased = str(out / f"mask-{density:g}.safetensors"), str(out / "erased")
    forget = ["--concept", photo_of(concept), "--samples", "200"]
    return [
        ["mask", "pocket", *forget, "--density", f"{density:g}", "--out", mask],
        ["erase", "pocket", *forget, "--anchor", photo_of(anchor), "--mask", mask, *POCKET_TRAINING, "--out", erased],
        ["evaluate", erased, "--prompts", str(out / "prompts.csv"), "--against", "pocket", "--out", str(out / "audit")],
    ]


def photo_of(name: str) -> str:
    """A prompt for a class: "a photo of a sneaker"."""
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def audit_prompts(rows: list[Prompt], concept: str) -> list[Prompt]:
    """The prompts of `pocket` that judge an erasure: all 100 of the concept, and 20 of each other class."""
    return [p for i, p in enumerate(rows) if p.label == concept or i % 5 == 0]
