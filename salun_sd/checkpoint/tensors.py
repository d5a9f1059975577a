"""Files of tensors, read and written one tensor at a time: a whole checkpoint is never in memory."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from salun_sd.checkpoint import sources
from salun_sd.runtime.bar import Bar

logger = logging.getLogger(__name__)

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
NAMES = {dtype: name for name, dtype in sources.DTYPES.items()}
SEAL, NO_DIGEST = b'{"__metadata__":{"digest":"', b"0" * 64  # the start of a sealed file's header; its digest follows


class Lazy(NamedTuple):
    """A tensor that each call of `read` reads again; nothing is kept in memory."""

    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


Tensors = dict[str, Lazy]  # in the order of the file


class PlainTensors(Mapping):
    """Lazy tensors as a mapping of plain ones: each access reads its tensor again."""

    def __init__(self, tensors: Mapping[str, Lazy]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read(file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a .safetensors file, or of a pickle that needs nothing but tensors.

    Raises SalunError for a file that is damaged, is something else or holds tensors that are no plain numbers, and for
    a pickle that could run code; it names the tensor or the object. Raises FileNotFoundError if there is no file.
    """
    source = sources.opened(file)
    tensors = {name: Lazy(*kind, partial(source.read, name)) for name, kind in source.kinds.items()}
    return tensors, source.metadata


def write(file: Path, tensors: Tensors, metadata: dict[str, str], sealed: bool = False) -> None:
    """Write a .safetensors file, one tensor at a time; the same input gives the same bytes.

    The library's own writer holds all tensors at once and orders the metadata at random. As there, tensors of larger
    elements come first, so that all are aligned; tensors of one element size keep their order. A `sealed` file has its
    own SHA-256 as the first key of the metadata, "digest": of all its bytes, with zeros in place of the digest.

    Raises ValueError if a tensor has another dtype or shape than its Lazy says.
    """
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    metadata = ({"digest": NO_DIGEST.decode()} if sealed else {}) | metadata
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, t in order:
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.bytes]}
        end += t.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        start = len(text).to_bytes(8, "little") + text
        f.write(start)
        whole = hashlib.sha256(start)
        for name, t in Bar(order, desc="write", unit="tensor", leave=None):
            values = t.read()
            if values.dtype != t.dtype or values.shape != t.shape:
                raise ValueError(f"{name} is {values.dtype} {values.shape}, not {t.dtype} {t.shape}")
            content = raw(values)
            f.write(content)
            if sealed:
                whole.update(content)
        if sealed:
            f.seek(8 + len(SEAL))
            f.write(whole.hexdigest().encode())


def read_sealed(file: Path) -> tuple[Tensors, dict[str, str]]:
    """As `read`, for a file that was sealed. Raises SalunError if any byte of it was changed since.

    A file without a digest is read too: see `warn_without_digest`.
    """
    content, metadata = read(file)
    with file.open("rb") as f:
        start, digest = f.read(8 + len(SEAL)), f.read(len(NO_DIGEST))
        if not start.endswith(SEAL) and "digest" not in metadata:
            return content, metadata
        whole = hashlib.sha256(start + NO_DIGEST)
        while chunk := f.read(2**20):
            whole.update(chunk)
    if digest != whole.hexdigest().encode():
        raise sources.damaged(file, "it was changed since it was written")
    return content, metadata


def warn_without_digest(file: Path, metadata: Mapping[str, str]) -> None:
    """Log a warning for a mask, a patch or a state without a digest: an earlier version wrote it."""
    if "digest" not in metadata:
        logger.warning(f"{file} is of an earlier version and has no digest: it may be damaged.")


def raw(t: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().data


def in_memory(t: torch.Tensor) -> Lazy:
    """A tensor in memory as a Lazy."""
    return Lazy(t.dtype, t.shape, lambda: t)


def size(tensors: Tensors) -> int:
    """Bytes of all values."""
    return sum(t.bytes for t in tensors.values())


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 over the name, dtype, shape and bytes of each tensor, in the order of names."""
    whole = hashlib.sha256()
    for name in Bar(sorted(tensors), desc="hash", unit="tensor", leave=None):
        t = tensors[name].read()
        whole.update(name.encode() + b" ")
        whole.update(hashlib.sha256(f"{t.dtype} {list(t.shape)} ".encode() + raw(t)).digest())
    return whole.hexdigest()
