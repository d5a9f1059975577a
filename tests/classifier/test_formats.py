"""The same images in every form give the same pixels and labels; what is broken is named."""

import gzip
import pickle
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.pictures import arrays
from PIL import Image
from pyarrow import parquet

from salun_sd.classifier import formats
from salun_sd.classifier.formats import read
from salun_sd.errors import SalunError, UsageError

COUNT, TEST, NAMES = 20, 8, ["ankle boot", "bag", "coat", "dress"]


def colours(count, seed):
    """uint8 [count, 3, 32, 32] and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count) % 4


PARTS = {"train": colours(COUNT, 1), "test": colours(TEST, 2)}


def write_folder(folder):
    for split, (pixels, labels) in PARTS.items():
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            place = folder / split / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{i:02}.png")
    return folder


def batches():
    """Name, pixels and labels of each of CIFAR's batches."""
    for i, (pixels, labels) in enumerate(zip(*(np.array_split(each, 5) for each in PARTS["train"]), strict=True), 1):
        yield f"data_batch_{i}", pixels, labels
    yield "test_batch", *PARTS["test"]


def write_binary(folder):
    folder.mkdir()
    for name, pixels, labels in batches():
        rows = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(len(pixels), -1)], 1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


def write_python(folder):
    folder.mkdir()
    for name, pixels, labels in batches():
        batch = {b"data": pixels.reshape(len(pixels), -1), b"labels": labels.tolist(), b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [n.encode() for n in NAMES]}, protocol=2))
    return folder


def write_data_set(folder):
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as Picture

    features = Features({"img": Picture(), "label": ClassLabel(names=NAMES)})
    splits = {
        split: Dataset.from_dict(
            {"img": [Image.fromarray(p.transpose(1, 2, 0)) for p in pixels], "label": labels.tolist()}, features
        )
        for split, (pixels, labels) in PARTS.items()
    }
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("write", [write_binary, write_python, write_data_set])
def test_every_form_of_arrays_gives_the_same_images(write, tmp_path):
    data = read(str(write(tmp_path / "data")))
    assert data.classes == NAMES and data.train.names[3] == "train[3]"
    for images, (pixels, labels) in zip((data.train, data.test), PARTS.values(), strict=True):
        assert torch.equal(images.pixels, torch.from_numpy(pixels)) and images.labels.tolist() == labels.tolist()


def test_a_folder_of_classes_gives_the_same_images_under_their_paths(tmp_path):
    data = read(str(write_folder(tmp_path / "data")))
    assert data.classes == NAMES and data.train.names[0] == "train/ankle boot/00.png"
    for images, (pixels, labels) in zip((data.train, data.test), PARTS.values(), strict=True):
        order = [int(re.search(r"(\d+)\.png", name)[1]) for name in images.names]
        assert sorted(order) == list(range(len(labels))) and images.labels.tolist() == labels[order].tolist()
        assert torch.equal(images.pixels, torch.from_numpy(pixels[order]))
    assert read(str(tmp_path / "data"), 16).train.pixels.shape == (COUNT, 3, 16, 16)


def test_idx_files_are_read_compressed_too(idx, tmp_path):
    plain = read(str(idx))
    for file in idx.iterdir():
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    pixels, labels = arrays(80, 1)
    for data in (plain, read(str(tmp_path))):
        assert torch.equal(data.train.pixels[:, 1], torch.from_numpy(pixels))
        assert data.train.labels.tolist() == labels.tolist() and data.classes == ["0", "1", "2", "3"]


def test_all_broken_images_of_a_part_are_named_at_once(tmp_path):
    folder = write_folder(tmp_path / "data")
    for name in ("train/bag/01.png", "train/coat/02.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    with pytest.raises(SalunError) as e:
        read(str(folder))
    assert "train/bag/01.png" in str(e.value) and "train/coat/02.png" in str(e.value)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def no_class(folder):
    (write_folder(folder) / "loose.png").write_bytes((folder / "test" / "bag" / "01.png").read_bytes())
    for split in ("train", "test"):
        for file in [*(folder / split).glob("*/*.png")]:
            file.rename(folder / split / f"{file.parent.name}-{file.name}")
            if not any(file.parent.iterdir()):
                file.parent.rmdir()


def loose(folder):
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")


def one_image(folder):
    for file in (write_folder(folder) / "train" / "coat").iterdir():
        if file.name != "02.png":
            file.unlink()


def no_test(folder):
    (write_folder(folder) / "test").rename(folder / "tests")


def other_test_class(folder):
    (write_folder(folder) / "test" / "bag").rename(folder / "test" / "hat")


def no_labels_in_data_set(folder):
    from datasets import Dataset, DatasetDict, Features
    from datasets import Image as Picture

    own = Dataset.from_dict({"img": [Image.new("RGB", (8, 8))] * 3}, Features({"img": Picture()}))
    DatasetDict(train=own, test=own).save_to_disk(folder)


def cut_idx(folder):
    folder.mkdir()
    for name in ("train", "t10k"):
        for kind, values in zip(("images-idx3", "labels-idx1"), arrays(8, 1), strict=True):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes()[:-1])


def no_labels_beside_idx(folder):
    cut_idx(folder)
    (folder / "train-labels-idx1-ubyte").unlink()


def evil_pickle(folder):
    (write_python(folder) / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))


def pickle_without_labels(folder):
    (write_python(folder) / "test_batch").write_bytes(pickle.dumps({b"data": PARTS["test"][0].reshape(TEST, -1)}))


def pickle_with_a_label_too_many(folder):
    batch = {b"data": PARTS["test"][0].reshape(TEST, -1), b"labels": [0] * (TEST + 1)}
    (write_python(folder) / "test_batch").write_bytes(pickle.dumps(batch))


def changed_pickle(name, **content):
    """A writer of CIFAR's pickles, of which one has other content under some keys."""

    def write(folder):
        file = write_python(folder) / name
        batch = pickle.loads(file.read_bytes()) | {key.encode(): value for key, value in content.items()}
        file.write_bytes(pickle.dumps(batch, protocol=2))

    return write


def latin_names(folder):
    (write_binary(folder) / "batches.meta.txt").write_bytes("\n".join(["café", *NAMES[1:]]).encode("latin-1"))


def bomb(folder):
    cut_idx(folder)
    (folder / "train-images-idx3-ubyte").write_bytes(gzip.compress(bytes(10**7)))


def parquet_of_a_device(folder):
    from datasets import ClassLabel, Features
    from datasets import Image as Picture

    folder.mkdir()
    schema = Features({"img": Picture(), "label": ClassLabel(names=NAMES)}).arrow_schema
    rows = [{"img": {"bytes": None, "path": "/dev/zero"}, "label": i % 4} for i in range(8)]
    for split in ("train", "test"):
        parquet.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}.parquet")


def idx_of_no_image(folder):
    cut_idx(folder)
    for name in ("train", "t10k"):
        for kind, shape in (("images-idx3", (0, 8, 8)), ("labels-idx1", (0,))):
            head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(head)


def label_without_a_name(folder):
    (write_binary(folder) / "batches.meta.txt").write_text("\n".join(NAMES[:3]))


def cut_binary(folder):
    file = write_binary(folder) / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])


REFUSED = {  # what is wrong => the kind of error, a word of it
    no_class: (UsageError, "train/CLASS"), loose: (UsageError, "labels"), one_image: (UsageError, "coat"),
    no_test: (UsageError, "test"), other_test_class: (UsageError, "hat"), no_labels_in_data_set: (UsageError, "labels"),
    cut_idx: (SalunError, "idx"), no_labels_beside_idx: (UsageError, "labels-idx1"),
    evil_pickle: (SalunError, "print"), cut_binary: (SalunError, "test_batch.bin"),
    label_without_a_name: (SalunError, "label 3"), pickle_without_labels: (SalunError, "test_batch"),
    changed_pickle("test_batch", labels=[-1] * TEST): (SalunError, "label -1"),
    changed_pickle("test_batch", labels=["cat"] * TEST): (SalunError, "test_batch"),
    changed_pickle("test_batch", labels=[[0, 1]] * (TEST - 1) + [[0]]): (SalunError, "test_batch"),
    changed_pickle("test_batch", labels=0): (SalunError, "test_batch"),
    changed_pickle("test_batch", data=np.zeros((TEST, 3072))): (SalunError, "test_batch"),
    changed_pickle("batches.meta", label_names=[0, 1, 2, 3]): (SalunError, "label_names"),
    latin_names: (SalunError, "batches.meta.txt"), bomb: (SalunError, "1,000,000 bytes"),
    parquet_of_a_device: (SalunError, "train[0] (it is no regular file)"),
    pickle_with_a_label_too_many: (SalunError, "test_batch"), idx_of_no_image: (SalunError, "train"),
    lambda folder: None: (UsageError, "data"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "kind", "named"), [(w, *e) for w, e in REFUSED.items()])
def test_what_is_no_labelled_data_is_refused_by_name(write, kind, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(formats, "MOST_BYTES", 10**6)
    write(tmp_path / "data")
    with pytest.raises(kind) as e:
        read(str(tmp_path / "data"))
    assert named in str(e.value) and "run" not in capsys.readouterr().out


def test_a_pickle_imports_no_module_that_only_ends_as_one_of_numpy(tmp_path, monkeypatch):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "multiarray.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n_reconstruct = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    (write_python(tmp_path / "data") / "test_batch").write_bytes(b"ccore.multiarray\n_reconstruct\n.")
    with pytest.raises(SalunError, match="it asks for core.multiarray._reconstruct"):
        read(str(tmp_path / "data"))
    assert not (tmp_path / "ran").exists()
