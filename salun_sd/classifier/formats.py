"""The forms in which labelled images come: folders of classes, idx files, CIFAR's batches, data sets of the hub."""

import gzip
import io
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from salun_sd.classifier.data import Data, Images, from_array
from salun_sd.classifier.hub import TESTS, hub
from salun_sd.draw.folders import images_in, visible
from salun_sd.draw.hub import HUB_ID
from salun_sd.draw.images import Unreadable, in_order, read_image
from salun_sd.errors import SalunError, UsageError, some
from salun_sd.runtime.contents import MOST_BYTES, content_of, file_bytes

SPEC = re.compile(HUB_ID.pattern + "(:[^:]+)?")  # with the column of the labels
FORMS = "train/CLASS/*.png and test/CLASS/*.png, idx files, CIFAR's batches"
CIFAR = {  # classes => the files of its binary form, the bytes of labels before an image, the file of names
    10: ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 1, "batches.meta.txt"),
    100: (["train.bin"], "test.bin", 2, "fine_label_names.txt"),
}
PICKLES = {  # the files of its python form, the key of the labels, the file and key of the names
    10: ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels", ("batches.meta", "label_names")),
    100: (["train"], "test", "fine_labels", ("meta", "fine_label_names")),
}

ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}  # what a pickle of arrays asks for, whole


def read(spec: str, size: int | None = None) -> Data:
    """The data set that `--data` names: see FORMS, or a data set of the hub, as org/name or org/name:column.

    size: images of files are resized to this side; without it, all have to have one size. Raises UsageError where there
    is no such data set, or one without labels; SalunError where images are broken, which it names.
    """
    folder = Path(spec)
    if folder.is_dir():
        data = _of_folder(folder, spec, size)
    elif folder.exists():
        raise UsageError(f"--data {spec} is a file: give the folder that it is in, {folder.absolute().parent}.")
    elif SPEC.fullmatch(spec):
        data = hub(spec, lambda content, names: _decoded(content, names, size))
    else:
        raise UsageError(f"--data {spec} was not found: give a folder with {FORMS}, or a data set of the hub.")
    return _checked(data)


def _of_folder(folder: Path, spec: str, size: int | None) -> Data:
    for form in (_idx, _binary, _python):
        if data := form(folder, spec):
            return data
    if (folder / "dataset_dict.json").is_file() or any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        return hub(spec, lambda content, names: _decoded(content, names, size))
    if (folder / "train").is_dir():
        return _classes(folder, spec, size)
    if images_in(folder):
        raise UsageError(f"--data {spec} has images without labels: put those of each class into a folder of its own, "
                         "as in train/CLASS/1.png and test/CLASS/2.png.")  # fmt: skip
    raise UsageError(f"--data {spec} has no labelled images: give a folder with {FORMS}.")


def _checked(data: Data) -> Data:
    """The data. Raises UsageError for fewer than two classes, a class that is too small and a test set without one."""
    if len(data.classes) < 2:
        raise UsageError(f"--data {data.name} has {len(data.classes)} class: give images of two classes or more.")
    if not len(data.test.labels):
        raise UsageError(f"--data {data.name} has no images to test with: put some into test/CLASS.")
    labels = torch.cat([data.train.labels, data.test.labels])
    if odd := labels[(labels < 0) | (labels >= len(data.classes))].tolist():
        raise SalunError(f"--data {data.name} has the label {odd[0]}, and names for {len(data.classes)} classes.")
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
    if small := [f"{name} ({n})" for name, n in zip(data.classes, counts, strict=True) if n < 2]:
        raise UsageError(f"--data {data.name} has classes with fewer than two images to train on: {some(small)}. Add "
                         "images, or remove the class.")  # fmt: skip
    return data


def _classes(folder: Path, spec: str, size: int | None) -> Data:
    """A folder in ImageFolder's layout."""
    test = next((folder / name for name in TESTS if (folder / name).is_dir()), None)
    if test is None:
        raise UsageError(f"--data {spec} has no folder test: put images to test with into test/CLASS.")
    names = [f.name for f in visible(folder / "train") if f.is_dir() and images_in(f)]
    if not names:
        raise UsageError(f"--data {spec} has no labels: put the images of each class into a folder of its own, as in "
                         "train/CLASS/1.png.")  # fmt: skip
    if other := [f.name for f in visible(test) if f.is_dir() and images_in(f) and f.name not in names]:
        raise UsageError(f"--data {spec} tests with classes that it does not train on: {some(other)}.")
    train, tested = ([images_in(top / name) if (top / name).is_dir() else [] for name in names]
                     for top in (folder / "train", test))  # fmt: skip
    shape = size or _size_of(train[0][0])
    return Data(spec, names, *(_files(folder, each, shape) for each in (train, tested)))


def _files(folder: Path, of_classes: list[list[Path]], size: int) -> Images:
    files = [file for files in of_classes for file in files]
    labels = torch.tensor([label for label, files in enumerate(of_classes) for _ in files])
    names = [file.relative_to(folder).as_posix() for file in files]
    return Images(_decoded([lambda f=file: content_of(f) for file in files], names, size), labels, names)


def _size_of(file: Path) -> int:
    """The shorter side of an image, to which the others are resized."""
    return min(read_image(file).size)


def _decoded(contents: list[Callable[[], bytes]], names: list[str], size: int | None) -> torch.Tensor:
    """Image files => uint8 [n, 3, size, size]. Raises SalunError, which names every image that is broken."""

    def pixels(place: int) -> np.ndarray | Unreadable:
        try:
            image = read_image(contents[place](), names[place])
        except (Unreadable, OSError) as e:
            return e if isinstance(e, Unreadable) else Unreadable(names[place], e.strerror or "it is not there")
        side = size or min(image.size)
        return np.asarray(image if image.size == (side, side) else image.resize((side, side), Image.BILINEAR))

    arrays = list(in_order(pixels, range(len(contents))))
    if broken := [f"{name} ({a.reason})" for name, a in zip(names, arrays, strict=True) if isinstance(a, Unreadable)]:
        raise SalunError(f"{len(broken)} image(s) cannot be read: {some(broken)}. Replace or remove them.")
    if len(sizes := {a.shape for a in arrays}) > 1:
        raise UsageError(f"The images have {len(sizes)} sizes: give one for all by --size.")
    stacked = np.stack(arrays) if arrays else np.zeros((0, size or 1, size or 1, 3), np.uint8)
    return torch.from_numpy(stacked.transpose(0, 3, 1, 2).copy())


def _idx(folder: Path, spec: str) -> Data | None:
    """MNIST's form: a file of images and one of labels, for training and for the test, maybe compressed."""
    files = {}
    for split, start in (("train", "train"), ("test", "t10k")):
        for kind in ("images-idx3", "labels-idx1"):
            files[split, kind] = next(iter(sorted(folder.glob(f"{start}-{kind}-ubyte*"))), None)
    if not any(files.values()):
        return None
    if missing := [f"{kind} of {split}" for (split, kind), file in files.items() if file is None]:
        raise UsageError(f"--data {spec} has idx files, but none with {', '.join(missing)}.")
    arrays = {key: _idx_array(file) for key, file in files.items()}
    parts = []
    for split in ("train", "test"):
        pixels, labels = arrays[split, "images-idx3"], arrays[split, "labels-idx1"]
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels) or not len(labels):
            raise SalunError(f"--data {spec} has {pixels.shape} images and {labels.shape} labels to {split} with.")
        parts.append(from_array(pixels, labels, split))
    return Data(spec, [str(i) for i in range(1 + max(int(p.labels.max()) for p in parts))], *parts)


def _idx_array(file: Path) -> np.ndarray:
    """An idx file: two zeros, the type 8 (bytes), the number of axes; each axis's length; the values."""
    try:
        content = content_of(file)
        if content.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        if content[:3] != b"\0\0\x08":
            raise ValueError("it is no idx file of bytes")
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as e:
        raise SalunError(f"{file} is damaged: {e}.") from e


def _binary(folder: Path, spec: str) -> Data | None:
    """CIFAR's binary form: rows of one or two labels and 3,072 pixels."""
    for classes, (train, test, before, names) in CIFAR.items():
        if not (folder / train[0]).is_file():
            continue
        names = _lines(folder / names) if (folder / names).is_file() else [str(i) for i in range(classes)]
        parts = []
        for split, files in (("train", train), ("test", [test])):
            content = b"".join(content_of(folder / file) for file in files)
            if len(content) % (before + 3072):
                raise SalunError(f"{folder / files[0]} or one beside it is damaged: it has no whole rows.")
            rows = np.frombuffer(content, np.uint8).reshape(-1, before + 3072)
            parts.append(from_array(rows[:, before:].reshape(-1, 3, 32, 32), rows[:, before - 1], split))
        return Data(spec, names, *parts)
    return None


def _lines(file: Path) -> list[str]:
    """The lines of a text that are not empty."""
    try:
        return [line for line in file_bytes(file).decode("utf-8-sig").splitlines() if line]
    except UnicodeDecodeError as e:
        raise SalunError(f"{file} is damaged: it is no UTF-8 text.") from e


def _python(folder: Path, spec: str) -> Data | None:
    """CIFAR's python form: pickles of arrays, of which nothing else is opened."""
    for train, test, key, (meta, of_names) in PICKLES.values():
        if not all((folder / name).is_file() for name in (train[0], test, meta)):
            continue
        parts = []
        for split, files in (("train", train), ("test", [test])):
            batches = [_batch(folder / file, key) for file in files]
            parts.append(from_array(*map(np.concatenate, zip(*batches, strict=True)), split))
        [names] = _unpickled(folder / meta, of_names)
        if names.ndim != 1 or names.dtype.kind != "U":
            raise SalunError(f"{folder / meta} is damaged: its {of_names} are no texts.")
        return Data(spec, names.tolist(), *parts)
    return None


def _batch(file: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, uint8 [n, 3, 32, 32], and the labels, whole numbers [n], of one of CIFAR's pickles."""
    pixels, labels = _unpickled(file, "data", key)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise SalunError(f"{file} is damaged: its {key} are no whole numbers.")
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise SalunError(f"{file} is damaged: it needs 3,072 bytes of pixels for each label.")
    return pixels.reshape(-1, 3, 32, 32), labels


class _Arrays(pickle.Unpickler):
    """Reads numpy arrays and plain values, and refuses all that could run code."""

    def find_class(self, module: str, name: str):
        if (module, name) in ARRAYS:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(file: Path, *keys: str) -> list[np.ndarray]:
    """The arrays or lists that a pickle of CIFAR holds under some keys; texts as str."""
    try:
        content = _Arrays(io.BytesIO(content_of(file)), encoding="bytes").load()

        def text(value):
            return value.decode() if isinstance(value, bytes) else value

        content = {text(key): value for key, value in content.items()}
        values = (content[key] for key in keys)
        return [np.asarray([text(v) for v in value] if isinstance(value, list) else value) for value in values]
    except Exception as e:  # a damaged pickle fails by many types
        raise SalunError(f"{file} is no batch of CIFAR that can be read: {e}.") from e
