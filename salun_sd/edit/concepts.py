"""Plans: TOML files that say what is erased, towards what, what stays, and with which settings."""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from salun_sd.draw import prompts as prompt_sets
from salun_sd.errors import SalunError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

FOLDER = prompt_sets.FOLDER

# What a value may be, in the words of the refusal.
TEXT = "a text in quotes, not an empty one"
TEXTS = "a list of texts in quotes"
PROMPTS = "a list of prompts, or the name or CSV file of a prompt set"
SHARE = "a number above 0, 1 at most"
RATE = "a number above 0"
NUMBER = "a number from 0 on"
COUNT = "a whole number from 1 on"
SEED = "a whole number from 0 to 2147483647"
ANCHOR_FROM = '"current" or "base"'
TABLE = "a table"
TABLES = "written [[concept]], in two brackets, once for each concept"

CHECKS: dict[str, Callable[[object], bool]] = {
    TEXT: lambda v: isinstance(v, str) and bool(v.strip()),
    TEXTS: lambda v: isinstance(v, list) and all(map(CHECKS[TEXT], v)),
    PROMPTS: lambda v: CHECKS[TEXT](v) or (CHECKS[TEXTS](v) and v != []),
    SHARE: lambda v: type(v) in (int, float) and 0 < v <= 1,
    RATE: lambda v: type(v) in (int, float) and 0 < v < 1e300,
    NUMBER: lambda v: type(v) in (int, float) and 0 <= v < 1e300,
    COUNT: lambda v: type(v) is int and 1 <= v < 2**31,
    SEED: lambda v: type(v) is int and 0 <= v < 2**31,
    ANCHOR_FROM: lambda v: v in ("current", "base"),
    TABLE: lambda v: isinstance(v, dict),
    TABLES: lambda v: isinstance(v, list) and all(map(CHECKS[TABLE], v)),
}
FILE = {"concept": TABLES, "retain": TABLE, "settings": TABLE}
CONCEPT = {"prompt": TEXT, "anchor": TEXT, "synonyms": TEXTS, "images": TEXT}
RETAIN = {"prompts": PROMPTS, "images": TEXT, "caption": TEXT}
SETTINGS = {
    "samples": COUNT, "density": SHARE, "saliency_guidance": NUMBER, "lr": RATE, "steps": COUNT, "batch_size": COUNT,
    "retain_weight": NUMBER, "size": COUNT, "seed": SEED, "anchor_from": ANCHOR_FROM,
}  # fmt: skip
RENAMED = {"guidance": "saliency_guidance", "resolution": "size"}  # old names, which go on working for one version


class Concept(NamedTuple):
    """What must go, and what stands in its place."""

    prompt: str  # c
    anchor: str | None  # c'; None for a mask, which has none
    synonyms: tuple[str, ...] = ()  # further prompts of the same concept
    images: str | None = None  # forget images, a folder or a data set; None: the base draws them

    def prompts(self) -> tuple[str, ...]:
        """The concept's prompt, then its synonyms."""
        return (self.prompt, *self.synonyms)

    def record(self) -> dict:
        """As JSON knows it."""
        return self._asdict() | {"synonyms": list(self.synonyms)}


class Plan(NamedTuple):
    """What a plan file says; what it leaves open is not in `settings`."""

    concepts: tuple[Concept, ...]
    retain_prompts: tuple[str, ...] | str | None  # texts, or the name or path of a prompt set
    settings: dict[str, str | int | float]  # by the name of the command's parameter; `retain`, `retain_caption` too


def builtin() -> list[str]:
    """Names of the plans that ship with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def read(name_or_path: str) -> Plan:
    """A plan by name or from a TOML file; numbers are of the right type and in their range.

    `images` and a prompt set that lie beside the file come back with its folder in front; a built-in prompt set, the id
    of a data set or any other path is left as it stands.

    Raises UsageError when the plan is not there, SalunError naming file and key when its content is wrong.
    """
    path = FOLDER / f"{name_or_path}.toml" if name_or_path in builtin() else Path(name_or_path)
    if not path.is_file():
        raise UsageError(f"There is no plan or file {name_or_path}; built in are {', '.join(builtin())}.")
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:  # of UTF-8, of TOML, of a number with thousands of digits, of nesting
        raise SalunError(f"{path} is no TOML file: {e}.") from e
    tables = _known(content, FILE, str(path), "")
    retain = _known(tables.get("retain", {}), RETAIN, str(path), "retain.")
    settings = _known(_renamed(tables.get("settings", {}), str(path)), SETTINGS, str(path), "settings.")

    concepts = []
    for n, table in enumerate(tables.get("concept", []), 1):
        values = _known(table, CONCEPT, f"{path}, concept {n}", "")
        for key in ("prompt", "anchor"):
            if key not in values:
                said = f" ({values['prompt']!r})" if "prompt" in values else ""
                raise SalunError(f"{path}, concept {n}{said} has no {key}: write {key} = '...' under its [[concept]].")
        images = _beside(path, values["images"]) if "images" in values else None
        concepts.append(Concept(values["prompt"], values["anchor"], tuple(values.get("synonyms", ())), images))
    if not concepts:
        raise SalunError(f"{path} has no concept: write a [[concept]] with a prompt and an anchor.")
    _check(concepts, lambda n, key: f"{path}, concept {n + 1}: {key}", SalunError)

    if "images" in retain and "prompts" in retain:
        raise SalunError(f"{path}: retain.prompts and retain.images cannot go together: give one of them.")
    if "caption" in retain and "images" not in retain:
        raise SalunError(f"{path}: retain.caption is for retain.images, which is not there.")
    if "images" in retain:
        settings["retain"] = _beside(path, retain["images"])
    if "caption" in retain:
        settings["retain_caption"] = retain["caption"]
    kept = retain.get("prompts")
    if isinstance(kept, str):
        kept = kept if kept in prompt_sets.builtin() else _beside(path, kept)
    elif kept:
        gone = {_plain(text) for concept in concepts for text in concept.prompts()}
        for text in kept:
            if _plain(text) in gone:
                raise SalunError(f"{path}: retain.prompts has {text!r}, a concept: it cannot both go and stay.")
        kept = tuple(kept)
    return Plan(tuple(concepts), kept, settings)


def of_options(
    plan: str | None, concepts: list[str] | None, anchors: list[str] | None
) -> dict[str, object]:  # fmt: skip
    """The keyword arguments `concept`, `anchor` and `retain_prompts` of `erase`, from a plan or from typed prompts.

    Raises UsageError where both are given, or none.
    """
    if plan and (concepts or anchors):
        raise UsageError("--plan and --concept cannot go together: write the concepts into the plan.")
    if plan:
        found = read(plan)
        return {"concept": found.concepts, "anchor": None, "retain_prompts": found.retain_prompts}
    return {"concept": concepts or [], "anchor": anchors, "retain_prompts": None}


def plan(name_or_path: str) -> dict[str, object]:
    """A plan, by name or file, as keyword arguments of `erase`. Raises as `read` does."""
    found = read(name_or_path)
    return {"concept": found.concepts, "retain_prompts": found.retain_prompts, **found.settings}


def concepts_of(
    concept: str | Concept | Sequence[str | Concept], anchor: str | Sequence[str] | None = None,
    forget: str | None = None,
) -> tuple[Concept, ...]:  # fmt: skip
    """What must go: prompts with their anchors, n-th with n-th, or concepts as a plan has them. `forget` names the
    images of the only one. Raises UsageError where they do not go together, or say nothing.

    None as `anchor` is for a mask, which has no anchors.
    """
    given = [concept] if isinstance(concept, str | Concept) else list(concept)
    if not given and not anchor:
        raise UsageError("There is nothing to erase: give --concept with --anchor, or --plan.")
    texts, anchors = [c for c in given if isinstance(c, str)], [anchor] if isinstance(anchor, str) else anchor
    found = of_pairs(texts, anchors) if texts or anchors else tuple(given)
    if len(found) < len(given):
        raise UsageError("Concepts of a plan and prompts cannot go together: give one or the other.")
    if forget and len(found) > 1:
        raise UsageError("--forget is for one concept: in a plan, write images = ... under each [[concept]].")
    return (found[0]._replace(images=forget),) if forget else found


def of_pairs(concepts: list[str], anchors: list[str] | None) -> tuple[Concept, ...]:
    """The n-th --concept with the n-th --anchor; none of both is no concept. A mask has no anchors: None.

    Raises UsageError when their counts differ, when one is blank or a concept is given twice, and when concept and
    anchor are the same up to case and spaces.
    """
    if anchors is None:
        anchors = [None] * len(concepts)
    if len(concepts) > len(anchors):
        raise UsageError(f"--concept {concepts[len(anchors)]!r} has no --anchor: give one for each --concept.")
    if len(anchors) > len(concepts):
        raise UsageError(f"--anchor {anchors[len(concepts)]!r} has no --concept: give one for each --anchor.")
    pairs = [Concept(concept, anchor) for concept, anchor in zip(concepts, anchors, strict=True)]
    several = len(pairs) > 1
    _check(pairs, lambda n, key: ("--anchor" if key == "anchor" else "--concept") + f" {n + 1}" * several, UsageError)
    return tuple(pairs)


def _renamed(settings: dict, where: str) -> dict:
    """The settings of a plan with the names of today in place of old ones, which are logged."""
    for old, new in RENAMED.items():
        if old in settings:
            logger.warning(f"{where}: settings.{old} is now called {new}: write that. The old name stops working in "
                           "the next version.")  # fmt: skip
    return {RENAMED.get(key, key): value for key, value in settings.items()}


def _known(table: dict, kinds: dict[str, str], where: str, prefix: str) -> dict:
    """The table with its numbers as floats. Raises SalunError at a key that has no kind or a value of another kind."""
    values = {}
    for key, value in table.items():
        if key not in kinds:
            known = ", ".join(f"{prefix}{k}" for k in kinds)
            raise SalunError(f"{where}: {prefix}{key} is not known; known are {known}.")
        if not CHECKS[kinds[key]](value):
            raise SalunError(f"{where}: {prefix}{key} has to be {kinds[key]}; it is {value!r}.")
        values[key] = float(value) if kinds[key] in (SHARE, RATE, NUMBER) else value
    return values


def _check(concepts: Iterable[Concept], name: Callable[[int, str], str], error: type[SalunError]) -> None:
    """Raises `error` unless every text says something, no concept is its own anchor and none is there twice."""
    seen = set()
    for n, concept in enumerate(concepts):
        if concept.anchor is not None and not concept.anchor.strip():
            raise error(f"{name(n, 'anchor')} is empty: say what stands in the concept's place, as a prompt.")
        for i, text in enumerate(concept.prompts()):
            key = f"synonym {i}" if i else "prompt"
            if not text.strip():
                raise error(f"{name(n, key)} is empty: say what must go, as a prompt.")
            if _plain(text) == _plain(concept.anchor or ""):
                raise error(f"{name(n, key)} and the anchor are both {text!r}: the anchor has to be something else.")
            if _plain(text) in seen:
                raise error(f"{name(n, key)} is {text!r}, which is there already: give it once.")
            seen.add(_plain(text))


def _plain(text: str) -> str:
    """Case and spaces do not make another concept."""
    return " ".join(text.casefold().split())


def _beside(plan: Path, value: str) -> str:
    """A path, or the path that PATH:COLUMN=VALUE begins with, from the plan's folder where it exists there."""
    for end in [len(value), *(i for i in reversed(range(1, len(value))) if value[i] == ":")]:
        if (place := plan.parent / value[:end]).exists():
            return f"{place}{value[end:]}"
    return value
