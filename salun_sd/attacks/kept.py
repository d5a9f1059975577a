"""What a search has found, on disk: a sealed file for each prompt, so that a run goes on where it was stopped."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from salun_sd.attacks.attack import Try
from salun_sd.checkpoint import tensors
from salun_sd.errors import SalunError
from salun_sd.runtime.documents import parse_json
from salun_sd.runtime.files import new_file, remove_stale

logger = logging.getLogger(__name__)

TENSORS = ("start", "condition")  # of a Try; the rest is JSON
TRIES = [{"text": str, "seed": int, "tokens": [int], "begins": int, "guidance": (float, None), "facts": dict}]


def save_tensors(file: Path, values: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file, many=True) as partial:
        kept = {name: tensors.in_memory(value.contiguous()) for name, value in values.items()}
        tensors.write(partial, kept, metadata or {}, sealed=True)


def is_whole(file: Path, read: Callable = tensors.read_sealed) -> bool:
    """Whether a file is there and can be read. A damaged one is searched for again, and a log line says so."""
    if not file.is_file():
        return False
    try:
        read(file)
    except SalunError:
        logger.warning(f"{file} is damaged: its search is done again.")
        return False
    return True


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a sealed file. Raises SalunError for a damaged one."""
    return {name: value.read() for name, value in tensors.read_sealed(file)[0].items()}


def file_of(out: Path, case: int) -> Path:
    """The file of a prompt, in the folder of a run."""
    return out / "found" / f"{case}.safetensors"


def remove_partial(out: Path) -> None:
    """Remove what killed searches left of their files, in the folder of a run."""
    for folder in (out, out / "found"):
        remove_stale(folder)


def count(file: Path) -> int | None:
    """The number of tries in the file of a prompt, from its header alone; None where it is absent or damaged."""
    try:
        return len(_lines(tensors.read(file)[1], file)) if file.is_file() else None
    except SalunError:
        return None


def _lines(metadata: dict[str, str], file: Path) -> list[dict]:
    """What the metadata of a prompt's file says of its tries. Raises SalunError where that is not of tries."""
    return parse_json(metadata.get("tries", ""), str(file), TRIES)


def save(file: Path, tries: list[Try]) -> None:
    """Write the tries of a prompt, in their order."""
    values, lines = {}, []
    for n, one in enumerate(tries):
        lines.append({key: value for key, value in one._asdict().items() if key not in TENSORS})
        if one.start is not None:
            values[f"{n}.start"] = one.start
        values |= {f"{n}.condition.{key}": value for key, value in (one.condition or {}).items()}
    save_tensors(file, values, {"tries": json.dumps(lines)})


def read(file: Path) -> list[Try]:
    """The tries that `save` wrote. Raises SalunError for a damaged file."""
    content, metadata = tensors.read_sealed(file)
    values = {name: value.read() for name, value in content.items()}
    tries = []
    for n, line in enumerate(_lines(metadata, file)):
        mark = f"{n}.condition."
        condition = {name.removeprefix(mark): value for name, value in values.items() if name.startswith(mark)}
        one = Try(**line | {"tokens": tuple(line["tokens"])})
        tries.append(one._replace(start=values.get(f"{n}.start"), condition=condition or None))
    return tries
