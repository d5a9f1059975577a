"""Files of tensors on disk: what a file is by its content, which tensors it holds, and the values of one of them."""

import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from salun_sd.errors import SalunError, some
from salun_sd.runtime.contents import gone
from salun_sd.runtime.documents import is_unicode

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
MAPPED = 128 * 2**20  # bytes that are read of a pickle before it is mapped anew
LEAST_VALUES = 64 * 2**20  # bytes of values that the smallest pickle may hold; a larger one, 4 times its own size
MOST_LEVELS = 8  # dictionaries called state_dict inside one another

Kind = tuple[torch.dtype, torch.Size]
Stamp = tuple[int, ...]  # differs between two states of a file


class Unusable(SalunError):
    """A file that is no file of tensors, or a damaged one: what is wrong with it, and what helps where it should be the
    weights of a model."""

    def __init__(self, what: str, advice: str = "give the model's .safetensors file"):
        super().__init__(f"{what}: {advice}.")
        self.what = what


@contextmanager
def meant_as(kind: str, advice: str) -> Iterator[None]:
    """Raise SalunError, with this advice, for a file in the block that should be of another kind than the weights of a
    model, such as a mask, and is none or a damaged one."""
    try:
        yield
    except Unusable as e:
        raise SalunError(f"{e.what}, so it is no {kind} that can be used: {advice[0].lower()}{advice[1:]}") from e


class Safetensors:
    """A .safetensors file. The library checks its header once, and again where the file was replaced since."""

    def __init__(self, file: Path):
        self.file = file
        self._index()

    def _index(self) -> None:
        try:
            self._stamp = _stamp(self.file.stat())
            with self.file.open("rb") as f:
                end = 8 + int.from_bytes(f.read(8), "little")
            with safe_open(self.file, "pt") as f:
                self.metadata: dict[str, str] = f.metadata() or {}
                slices = [(name, f.get_slice(name)) for name in f.offset_keys()]
        except SafetensorError as e:
            raise damaged(self.file, e) from e
        self.kinds: dict[str, Kind] = {}
        self._starts: dict[str, int] = {}
        for name, s in slices:  # in their order in the file, where they lie without a gap: the library checked it
            if s.get_dtype() not in DTYPES:
                raise _odd(self.file, name, f"of dtype {s.get_dtype()}")
            dtype, shape = self.kinds[name] = DTYPES[s.get_dtype()], torch.Size(s.get_shape())
            self._starts[name] = end
            end += shape.numel() * dtype.itemsize

    def read(self, name: str) -> torch.Tensor:
        """The values of one tensor, by an ordinary read: a mapped file would keep each page that was read in memory."""
        with self.file.open("rb") as f:
            if _stamp(os.fstat(f.fileno())) != self._stamp:
                before = self.kinds
                self._index()
                _check_same(self.file, before, self.kinds)
                return self.read(name)
            dtype, shape = self.kinds[name]
            values = torch.empty(shape, dtype=dtype)
            f.seek(self._starts[name])
            if f.readinto(values.reshape(-1).view(torch.uint8).numpy()) != values.nbytes:
                raise damaged(self.file, "it ends too early")
        return values


class Pickle:
    """A pickle that needs nothing but tensors. One in a zip, as PyTorch writes them, stays on disk: it is mapped, and
    mapped anew after each MAPPED bytes, as a mapping keeps the pages that were read in memory."""

    def __init__(self, file: Path):
        self.file, self.metadata = file, {}
        self._map()

    def _map(self) -> None:
        self._tensors, self._left = _unpickled(self.file), MAPPED
        self.kinds: dict[str, Kind] = {name: (t.dtype, t.shape) for name, t in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """The values of one tensor, in memory of their own, whatever view into the file the tensor is."""
        if self._left < 0 and _is_zip(self.file):
            before = self.kinds
            self._map()
            _check_same(self.file, before, self.kinds)
        t = self._tensors[name]
        self._left -= t.nbytes
        return torch.empty(t.shape, dtype=t.dtype).copy_(t.detach())


def opened(file: Path) -> Safetensors | Pickle:
    """A file of tensors, by its content. Raises SalunError for any other, and says what it is and what helps."""
    head = _head(file)
    if not _is_pickle(head):
        return Safetensors(file)
    _check_archive(file)
    if file.suffix.lower() == ".safetensors":
        raise Unusable(f"{file} is a pickle of PyTorch with the name of a safetensors file",
                       f"if you trust it, rename it to {file.stem}.ckpt")  # fmt: skip
    return Pickle(file)


def _head(file: Path) -> bytes:
    """The first bytes of a file. Raises SalunError if they are those of something else than tensors."""
    try:
        is_regular = stat.S_ISREG(file.stat().st_mode)
    except FileNotFoundError as e:
        if sentence := gone(file):
            raise SalunError(sentence) from e
        raise
    if not is_regular:
        raise Unusable(f"{file} is no regular file, so it holds no tensors", "give a file or a folder on disk")
    with file.open("rb") as f:
        head = f.read(512)
    if not head:
        raise Unusable(f"{file} is empty", "download or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise Unusable(f"{file} is a Git LFS pointer, which only names the weights",
                       "run git lfs pull in its folder, or download the file itself")  # fmt: skip
    if head.startswith(b"GGUF"):
        raise Unusable(f"{file} is a GGUF file, whose weights are quantised")
    text = head.decode("utf-8", "ignore")
    if re.match(r"\s*<(!doctype|html|\?xml)", text, re.IGNORECASE):
        raise Unusable(f"{file} is a web page, not weights", "download the file again, from its own link (on the hub, "
                       "with /resolve/ in place of /blob/)")  # fmt: skip
    if all(c.isprintable() or c.isspace() for c in text) and len(text.encode()) > len(head) - 4:
        raise Unusable(f'{file} is a text, not weights; it begins "{" ".join(text.split())[:60]}"',
                       "download it again")  # fmt: skip
    return head


def _is_pickle(head: bytes) -> bool:
    """Whether a file that begins like this is a pickle, bare or in a zip; a header of safetensors begins with {."""
    return head.startswith((b"PK\3\4", b"\x80")) and head[8:9] != b"{"


def _is_zip(file: Path) -> bool:
    with file.open("rb") as f:
        return f.read(4) == b"PK\3\4"


def _check_archive(file: Path) -> None:
    """Raise SalunError for a zip without a pickle in it, and for one that is cut off."""
    if not _is_zip(file):
        return
    try:
        with zipfile.ZipFile(file) as z:
            names = z.namelist()
    except Exception as e:  # broken bytes raise many types
        raise damaged(file, e) from e
    if not any(name.endswith(".pkl") for name in names):  # data.pkl has the tensors' names
        raise Unusable(f"{file} is a zip archive with {some(names, 3)}",
                       "unpack it, and give the model's .safetensors file")  # fmt: skip


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle by name. Those of one in a zip are mapped: their values are read when they are used."""
    try:
        mapped = _is_zip(file)
        if mapped:
            _check_zip(file, _stamp(file.stat()))
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (SalunError, FileNotFoundError):
        raise
    except pickle.UnpicklingError as e:
        if needed := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise _closed(file, f"a pickle that could run code: it needs {needed[1]}") from e
        raise _closed(file, "a pickle of more than weights, or damaged") from e
    except Exception as e:  # broken bytes raise RuntimeError, EOFError, IndexError, struct.error and others
        raise damaged(file, e) from e
    for _ in range(MOST_LEVELS):
        inner = loaded.get("state_dict") if isinstance(loaded, dict) else None
        if not isinstance(inner, dict):
            break
        loaded = inner
    entries = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {name: t for name, t in entries if isinstance(name, str) and isinstance(t, torch.Tensor)}
    if not tensors:
        raise Unusable(f"{file} holds no weights by name")
    _check_plain(file, tensors)
    return tensors


@lru_cache(maxsize=4)  # each byte of a file is read here, once for each of its states
def _check_zip(file: Path, stamp: Stamp) -> None:
    """Raise SalunError for a zip that cannot be mapped as tensors, BadZipFile for one that is not as it was written."""
    with zipfile.ZipFile(file) as z:
        for record in z.infolist():
            if record.filename.endswith("/constants.pkl"):
                raise _closed(file, "a TorchScript program")
            if record.compress_type != zipfile.ZIP_STORED:
                raise Unusable(f"{file} is a compressed zip, whose tensors cannot be read one at a time",
                               "save it again with torch.save")  # fmt: skip
            if record.CRC:  # 0 where its writer left it out
                with z.open(record) as f:
                    while f.read(2**20):  # raises at the end of a record of another CRC
                        pass


def _check_plain(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raise SalunError for a tensor that is no plain array of numbers, and for more values than a file can hold: one
    number in a file can stand for any count of them."""
    for name, t in tensors.items():
        if not is_unicode(name):
            raise SalunError(f"{file} is damaged: the name {ascii(name)} is no valid Unicode.")
        for is_odd, what in (
            (t.is_nested, "nested"), (t.is_quantized, "quantised"), (t.layout != torch.strided, "sparse"),
            (t.is_meta, "without values"), (t.dtype not in DTYPES.values(), f"of {t.dtype}"),
        ):  # fmt: skip
            if is_odd:
                raise _odd(file, name, what)
    most, largest = 4 * max(file.stat().st_size, LEAST_VALUES), max(tensors, key=lambda name: tensors[name].nbytes)
    if sum(t.nbytes for t in tensors.values()) > most:
        raise SalunError(f"{file} claims more values than its size allows, most of them in {largest}: it is damaged or "
                         "hostile.")  # fmt: skip


def _check_same(file: Path, before: dict[str, Kind], now: dict[str, Kind]) -> None:
    """Raise SalunError if a file that is indexed again holds other tensors than it did."""
    if now != before:
        raise SalunError(f"{file} was replaced by another model while it was in use: run the command again.")


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _odd(file: Path, name: str, what: str) -> SalunError:
    return Unusable(f"{name} in {file} is {what}, which salun-sd does not read",
                    "give the model in float32, float16 or bfloat16")  # fmt: skip


def _closed(file: Path, what: str) -> SalunError:
    return Unusable(f"{file} is {what}, so it was not opened")


def damaged(file: Path, reason: Exception | str) -> SalunError:
    """The error for a file that is not whole, with the reason in another library's words."""
    words = str(reason).strip().partition("\n")[0].rstrip(".") or "it ends too early"
    return Unusable(f"{file} is truncated or damaged ({words})", "download or save it again")
