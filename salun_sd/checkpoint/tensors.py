"""Files of tensors, read and written one tensor at a time: a whole checkpoint is never in memory."""

import ctypes
import hashlib
import json
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from salun_sd.errors import SalunError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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

    Raises SalunError for a damaged file, and for a pickle that could run code; it names the object that this needs.
    """
    return (_pickled(file), {}) if file.suffix in PICKLES else _safetensors(file)


def _safetensors(file: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(file, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.offset_keys()}
            return {
                name: Lazy(DTYPES[s.get_dtype()], torch.Size(s.get_shape()), partial(_tensor, file, name))
                for name, s in slices.items()
            }, f.metadata() or {}
    except SafetensorError as e:
        raise _damaged(file, e) from e
    except KeyError as e:
        raise SalunError(f"{file} has tensors of dtype {e.args[0]}, which salun-sd does not read.") from e


def _tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a file, which is opened each time: an open file keeps every page that was read in memory."""
    try:
        with safe_open(file, "pt") as f:
            return f.get_tensor(name)
    except SafetensorError as e:
        raise _damaged(file, e) from e


def _damaged(file: Path, e: Exception) -> SalunError:
    reason = str(e).strip().partition("\n")[0].rstrip(".") or "it ends too early"
    return SalunError(f"{file} is truncated or damaged ({reason}): download or save it again.")


def _pickled(file: Path) -> Tensors:
    file.open("rb").close()  # so that an absent or unreadable file raises OSError
    mapped = zipfile.is_zipfile(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as e:
        if needed := re.search(r"GLOBAL ([\w.]+)", str(e)):
            reason = f"is a pickle that could run code: it needs {needed[1]}"
        else:
            reason = "is a pickle of more than weights, or damaged"
        raise SalunError(f"{file} {reason}, so it was not opened. Use the model's .safetensors file.") from e
    except Exception as e:  # broken bytes raise RuntimeError, EOFError, IndexError, struct.error and others
        raise _damaged(file, e) from e
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    entries = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {
        name: Lazy(t.dtype, t.shape, partial(_copy, t) if mapped else t.contiguous)
        for name, t in entries if isinstance(name, str) and isinstance(t, torch.Tensor)
    }  # fmt: skip
    if not tensors:
        raise SalunError(f"{file} holds no weights by name.")
    return tensors


def _copy(t: torch.Tensor) -> torch.Tensor:
    """The values of a tensor that is mapped from a file. The pages that it was read from are released again."""
    values = t.clone(memory_format=torch.contiguous_format)
    if hasattr(mmap, "MADV_DONTNEED"):
        start = t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = t.data_ptr() + t.untyped_storage().nbytes() - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
    return values


def write(file: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write a .safetensors file, one tensor at a time; the same input gives the same bytes.

    The library's own writer holds all tensors at once and orders the metadata at random. As there, tensors of larger
    elements come first, so that all are aligned; tensors of one element size keep their order.

    Raises ValueError if a tensor has another dtype or shape than its Lazy says.
    """
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, t in order:
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.bytes]}
        end += t.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, t in order:
            values = t.read()
            if values.dtype != t.dtype or values.shape != t.shape:
                raise ValueError(f"{name} is {values.dtype} {values.shape}, not {t.dtype} {t.shape}")
            f.write(raw(values))


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
    for name in sorted(tensors):
        t = tensors[name].read()
        whole.update(name.encode() + b" ")
        whole.update(hashlib.sha256(f"{t.dtype} {list(t.shape)} ".encode() + raw(t)).digest())
    return whole.hexdigest()
