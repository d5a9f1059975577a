"""The commands that show the whole on the bundled checkpoint, and the settings that it is erased with."""

from pathlib import Path

from salun_sd.draw import prompts
from salun_sd.draw.prompts import Prompt
from salun_sd.errors import UsageError
from salun_sd.runtime.files import write_atomic

POCKET_TRAINING = "--retain-prompts pocket --retain-weight 2 --steps 60 --batch-size 32 --lr 1e-4".split()


def commands(concept: str, anchor: str, density: float, out: Path) -> list[list[str]]:
    """mask, erase and evaluate for a class of the pocket checkpoint; writes the prompts that judge it into `out`.

    Raises UsageError for a class that it does not know, and where `out` holds a demo of another one.
    """
    rows = prompts.read("pocket")
    classes = list(dict.fromkeys(p.label for p in rows))
    for name in (concept, anchor):
        if name not in classes:
            raise UsageError(f"The pocket checkpoint knows no {name}; it knows {', '.join(classes)}.")
    if concept == anchor:
        raise UsageError(f"Concept and anchor are both {concept}: the anchor has to be something else.")
    asked = prompts.write(asked_for(rows, concept))
    if (out / "prompts.csv").exists() and (out / "prompts.csv").read_text() != asked:
        raise UsageError(f"{out} holds a demo of another concept: choose another --out, or remove it.")
    write_atomic(out / "prompts.csv", asked)
    mask, erased = str(out / f"mask-{density:g}.safetensors"), str(out / "erased")
    forget = ["--concept", photo_of(concept), "--samples", "200"]
    return [
        ["mask", "pocket", *forget, "--density", f"{density:g}", "--out", mask],
        ["erase", "pocket", *forget, "--anchor", photo_of(anchor), "--mask", mask, *POCKET_TRAINING, "--out", erased],
        ["evaluate", erased, "--prompts", str(out / "prompts.csv"), "--against", "pocket", "--out", str(out / "audit")],
    ]


def photo_of(name: str) -> str:
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def asked_for(rows: list[Prompt], concept: str) -> list[Prompt]:
    """The prompts of `pocket` that judge an erasure: all hundred of the concept, twenty of each other class."""
    return [p for i, p in enumerate(rows) if p.label == concept or i % 5 == 0]
