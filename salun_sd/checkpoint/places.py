"""Places of this machine, which no file that people publish may name: of an absolute path stays its last part alone."""

import re
import shlex
from pathlib import Path
from typing import Any

from salun_sd.checkpoint.model import BUNDLED

TEXTS = {"prompt", "anchor", "synonyms", "retain_caption", "header"}  # of a record: they are no paths
# An absolute path in JSON, under a key such as _name_or_path or tokenizer_file
PLACE = re.compile(rb'("(?:\w*_)?(?:path|file|dir)"\s*:\s*")~?/(?:(?:[^"\\]|\\.)*/)?((?:[^"\\/]|\\.)+)/*"')


def without_places(record: dict) -> dict:
    """The record as it is written, for people publish it: of each absolute path the last part alone. Its digests tell
    what was read."""
    texts = {text for c in record["concepts"] for text in (c["prompt"], c["anchor"], *c["synonyms"])}
    data = {kind: "".join(map(last, re.split(r"(; | from )", text))) for kind, text in record["data"].items()}
    clean = last_parts(record) | {"command": _with_last_parts(record["command"], texts), "data": data}
    if earlier := record.get("base", {}).get("record"):  # of a base that was erased before
        clean["base"]["record"] = without_places(earlier)
    return clean


def last_parts(value: Any) -> Any:
    """What is inside a record, where each text that begins with an absolute path has its last part instead. Prompts and
    the base's own header stay as they are."""
    if isinstance(value, list):  # its texts are prompts
        return [v if isinstance(v, str) else last_parts(v) for v in value]
    if isinstance(value, dict):
        return {last(key): v if key in TEXTS else last_parts(v) for key, v in value.items()}
    return last(value) if isinstance(value, str) else value


def last(text: str) -> str:
    """A text without the folders of an absolute path that it begins with. Behind the path may be what prompts were
    chosen from it. A model in a folder named "pocket" is not the bundled one: it is "./pocket"."""
    if not text.startswith(("/", "~/")):
        return text
    path, *chosen = re.split(r"(?= where |, the first )", text, maxsplit=1)
    name = Path(path).name
    return (f"./{name}" if name in BUNDLED else name) + "".join(chosen)


def _with_last_parts(command: str, texts: set[str | None]) -> str:
    """A command with the last part of each absolute path among its words, but for the texts of prompts."""
    try:
        words = shlex.split(command)
    except ValueError:  # it is not of a shell
        return command
    split = [re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups("") for word in words]
    named = [option + (word if word in texts else last(word)) for option, word in split]
    return command if named == words else shlex.join(named)


def in_configs(folder: Path) -> dict[Path, bytes]:
    """The configs in a pipeline folder that name absolute paths, such as the folder that a part was loaded from, each
    as it is with the last parts alone. No program opens these paths: they say where a file was."""
    configs = [*folder.glob("model_index.json"), *sorted(folder.glob("[!.]*/[!.]*.json"))]
    files = {file: file.read_bytes() for file in configs}
    clean = {file: PLACE.sub(rb'\1\2"', content) for file, content in files.items()}
    return {file: content for file, content in clean.items() if content != files[file]}
