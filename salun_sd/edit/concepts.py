"""Concepts and their anchors, typed or from plans: TOML files with concepts, what to retain, and settings."""

import logging
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from salun_sd.draw import prompts as prompt_sets
from salun_sd.draw.tables import read_text
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.ranges import RANGES
from salun_sd.runtime.texts import listed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

FOLDER = prompt_sets.FOLDER

# What a value may be, as the error says it.
TEXT = "a text in quotes, not an empty one"
TEXTS = "a list of texts in quotes"
PROMPTS = "a list of prompts, or the name or CSV file of a prompt set"
ANCHOR_FROM, RETAIN_TARGET = '"current" or "base"', '"base" or "noise"'
TABLE = "a table"
TABLES = "written [[concept]], in two brackets, once for each concept"

CHECKS: dict[str, Callable[[object], bool]] = {
    TEXT: lambda v: isinstance(v, str) and bool(v.strip()),
    TEXTS: lambda v: isinstance(v, list) and all(map(CHECKS[TEXT], v)),
    PROMPTS: lambda v: CHECKS[TEXT](v) or (CHECKS[TEXTS](v) and v != []),
    ANCHOR_FROM: lambda v: v in ("current", "base"),
    RETAIN_TARGET: lambda v: v in ("base", "noise"),
    TABLE: lambda v: isinstance(v, dict),
    TABLES: lambda v: isinstance(v, list) and all(map(CHECKS[TABLE], v)),
    **{numbers.words: numbers.holds for numbers in RANGES.values()},
}
FILE = {"concept": TABLES, "retain": TABLE, "settings": TABLE}
CONCEPT = {"prompt": TEXT, "anchor": TEXT, "synonyms": TEXTS, "images": TEXT}
RETAIN = {"prompts": PROMPTS, "images": TEXT, "caption": TEXT}
NUMBERS = (
    "samples", "density", "saliency_guidance", "lr", "steps", "batch_size", "retain_weight", "size", "seed",
    "probe_every", "until",
)  # fmt: skip
SETTINGS = {name: RANGES[name].words for name in NUMBERS} | {
    "anchor_from": ANCHOR_FROM, "retain_target": RETAIN_TARGET, "mask": TEXT, "method": TEXT, "recipe": TEXT,
    "setting": TABLE,
}  # fmt: skip
RENAMED = {"guidance": "saliency_guidance", "resolution": "size"}  # old names, which work for one more version


class Concept(NamedTuple):
    """What to erase, and the anchor that takes its place."""

    prompt: str  # c
    anchor: str | None  # c'; None for a mask, which needs none
    synonyms: tuple[str, ...] = ()  # more prompts of the same concept
    images: str | None = None  # forget images, a folder or a data set; None: the base draws them

    def prompts(self) -> tuple[str, ...]:
        """The concept's prompt, then its synonyms."""
        return (self.prompt, *self.synonyms)

    def record(self) -> dict:
        """As salun.json has it."""
        return self._asdict() | {"synonyms": list(self.synonyms)}


class Plan(NamedTuple):
    """What a plan file says. `settings` has only what the file sets."""

    concepts: tuple[Concept, ...]
    retain_prompts: tuple[str, ...] | str | None  # texts, or the name or path of a prompt set
    settings: dict[str, str | int | float]  # by the name of the command's parameter; `retain`, `retain_caption` too


def builtin() -> list[str]:
    """Names of the plans that ship with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def read(name_or_path: str) -> Plan:
    """A plan by name or from a TOML file; the types and ranges of its values are checked.

    Where `images` or a prompt set is a path that exists beside the file, the file's folder is put in front of it. A
    built-in prompt set, the id of a data set and any other path stay as they are written.

    Raises UsageError when there is no such plan, SalunError naming file and key when its content is wrong.
    """
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in builtin() else Path(name_or_path)
    if not path.is_file():
        raise UsageError(f"There is no plan or file {name_or_path}; built in are {', '.join(builtin())}.")
    try:
        content = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as e:  # of TOML, of a number with thousands of digits, of nesting
        raise SalunError(f"{path} is not a TOML file: {e}.") from e
    tables = _checked(content, FILE, str(path), "")
    retain = _checked(tables.get("retain", {}), RETAIN, str(path), "retain.")
    settings = _checked(_renamed(tables.get("settings", {}), str(path)), SETTINGS, str(path), "settings.")
    concepts = [_concept(table, n, path) for n, table in enumerate(tables.get("concept", []), 1)]
    if not concepts:
        raise SalunError(f"{path} has no concept: write a [[concept]] with a prompt and an anchor.")
    _check_texts(concepts, lambda n, key: f"{path}, concept {n + 1}: {key}", SalunError, needs_anchor=False)
    settings |= _retain_images(retain, path)
    return Plan(tuple(concepts), _retain_prompts(retain, concepts, path), settings)


def plan(name_or_path: str) -> dict[str, object]:
    """A plan, by name or file, as keyword arguments of `erase`. Raises as `read` does."""
    concepts, retain_prompts, settings = read(name_or_path)
    return {"concept": concepts, "retain_prompts": retain_prompts, **settings}


def concepts_of(
    concept: str | Concept | Sequence[str | Concept], anchor: str | Sequence[str] | None = None,
    forget: str | None = None, *, needs_anchor: bool,
) -> tuple[Concept, ...]:  # fmt: skip
    """Concepts from prompts and their anchors, n-th with n-th, or as they are given. `forget` is the images of the
    concept, where there is only one.

    Raises UsageError where these do not go together, where there is no concept or, with `needs_anchor`, no anchor, when
    a text is blank, when a concept is there twice, and when an anchor is one of the concepts, up to case and spaces.
    """
    given = [concept] if isinstance(concept, str | Concept) else list(concept)
    anchors = listed(anchor)
    if not given and not anchors:
        raise UsageError("There is nothing to erase: give --concept with --anchor, or --plan.")
    texts = [c for c in given if isinstance(c, str)]
    if texts and len(texts) < len(given):
        raise UsageError("Concepts of a plan and prompts cannot go together: give one or the other.")
    if anchors or (texts and needs_anchor):
        concepts = _of_pairs(texts, anchors)
    else:
        concepts = tuple(Concept(c, None) if isinstance(c, str) else c for c in given)
    if forget and len(concepts) > 1:
        raise UsageError("--forget is for one concept: in a plan, write images = ... under each [[concept]].")

    def name(n: int, key: str) -> str:
        return ("--anchor" if key == "anchor" else "--concept") + (f" {n + 1}" if len(concepts) > 1 else "")

    _check_texts(concepts, name, UsageError, needs_anchor)
    return tuple(c._replace(images=text_of(forget or c.images)) for c in concepts)


def text_of(path: str | Path | None) -> str | None:
    """A path as text; None where there is none."""
    return None if path is None else str(path)


def _of_pairs(concepts: list[str], anchors: list[str]) -> tuple[Concept, ...]:
    """The n-th --concept with the n-th --anchor. Raises UsageError when their counts differ."""
    if len(concepts) > len(anchors):
        raise UsageError(f"--concept {concepts[len(anchors)]!r} has no --anchor: give one for each --concept.")
    if len(anchors) > len(concepts):
        raise UsageError(f"--anchor {anchors[len(concepts)]!r} has no --concept: give one for each --anchor.")
    return tuple(map(Concept, concepts, anchors))


def _concept(table: dict, n: int, path: Path) -> Concept:
    """The n-th [[concept]] of a plan."""
    values = _checked(table, CONCEPT, f"{path}, concept {n}", "")
    if "prompt" not in values:
        raise SalunError(f"{path}, concept {n} has no prompt: write prompt = '...' under its [[concept]].")
    images = _beside(path, values["images"]) if "images" in values else None
    return Concept(values["prompt"], values.get("anchor"), tuple(values.get("synonyms", ())), images)


def _retain_images(retain: dict, path: Path) -> dict[str, str]:
    """The settings `retain` and `retain_caption` that the table [retain] holds."""
    if "images" in retain and "prompts" in retain:
        raise SalunError(f"{path}: retain.prompts and retain.images cannot go together: give one of them.")
    if "caption" in retain and "images" not in retain:
        raise SalunError(f"{path}: retain.caption is for retain.images, which is missing.")
    settings = {"retain": _beside(path, retain["images"])} if "images" in retain else {}
    return settings | ({"retain_caption": retain["caption"]} if "caption" in retain else {})


def _retain_prompts(retain: dict, concepts: Iterable[Concept], path: Path) -> tuple[str, ...] | str | None:
    """The prompts that the table [retain] holds: texts, or a prompt set."""
    prompts = retain.get("prompts")
    if prompts is None:
        return None
    if isinstance(prompts, str):
        return prompts if prompts in ("anchor", *prompt_sets.builtin()) else _beside(path, prompts)
    erased = {_plain(text) for concept in concepts for text in concept.prompts()}
    for text in prompts:
        if _plain(text) in erased:
            raise SalunError(f"{path}: retain.prompts has {text!r}, a concept: erase it or retain it, not both.")
    return tuple(prompts)


def _renamed(settings: dict, where: str) -> dict:
    """The settings of a plan with new names in place of old ones; a warning names each. Raises SalunError where both
    are given."""
    for old, new in RENAMED.items():
        if old in settings and new in settings:
            raise SalunError(f"{where}: settings.{old} and settings.{new} are one setting: give {new} alone.")
        if old in settings:
            logger.warning(f"{where}: settings.{old} is now called {new}: write that. The old name stops working in "
                           "the next version.")  # fmt: skip
    return {RENAMED.get(key, key): value for key, value in settings.items()}


def _checked(table: dict, kinds: dict[str, str], where: str, prefix: str) -> dict:
    """The table, with float for every number that is not a count or a seed. Raises SalunError at an unknown key and at
    a value that is not of its key's kind."""
    values = {}
    for key, value in table.items():
        if key not in kinds:
            known = ", ".join(f"{prefix}{k}" for k in kinds)
            raise SalunError(f"{where}: {prefix}{key} is not known; known are {known}.")
        if not CHECKS[kinds[key]](value):
            raise SalunError(f"{where}: {prefix}{key} has to be {kinds[key]}; it is {value!r}.")
        values[key] = float(value) if key in RANGES and not RANGES[key].is_whole else value
    return values


def _check_texts(
    concepts: Iterable[Concept], name: Callable[[int, str], str], error: type[SalunError], needs_anchor: bool
) -> None:  # fmt: skip
    """Raise `error` where a text is blank, a concept has no anchor that it needs, the anchor is a concept, its own or
    another one, or a concept is there twice."""
    concepts, seen = list(concepts), set()
    place_of = {_plain(text): n for n, concept in enumerate(concepts) for text in concept.prompts()}
    for n, concept in enumerate(concepts):
        if concept.anchor is None and needs_anchor:
            raise error(f"{name(n, 'prompt')} {concept.prompt!r} has no anchor: give the prompt that takes its place.")
        if concept.anchor is not None and not concept.anchor.strip():
            raise error(f"{name(n, 'anchor')} is empty: give the prompt that takes the concept's place.")
        for i, text in enumerate(concept.prompts()):
            key = f"synonym {i}" if i else "prompt"
            if not text.strip():
                raise error(f"{name(n, key)} is empty: give the prompt to erase.")
            if _plain(text) == _plain(concept.anchor or ""):
                raise error(f"{name(n, key)} and the anchor are both {text!r}: the anchor has to be something else.")
            if _plain(text) in seen:
                raise error(f"{name(n, key)} is {text!r}, which is there already: give it once.")
            seen.add(_plain(text))
        if (other := place_of.get(_plain(concept.anchor or ""), n)) != n:
            raise error(f"{name(n, 'anchor')} is {concept.anchor!r}, and {name(other, 'prompt')} erases that: "
                        "give an anchor that stays.")  # fmt: skip


def _plain(text: str) -> str:
    """The text without differences of case, spaces and the spelling of accents, which do not make another concept."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def _beside(plan: Path, value: str) -> str:
    """A path, or the PATH of PATH:COLUMN=VALUE, with the plan's folder in front where it exists there."""
    for end in [len(value), *(i for i in reversed(range(1, len(value))) if value[i] == ":")]:
        if (place := plan.parent / value[:end]).exists():
            return f"{place}{value[end:]}"
    return value
