import io
import json
import os
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from skimage import data as photos

from salun_sd.draw.images import read_image
from salun_sd.edit import datasets as sources
from salun_sd.edit.datasets import Item, digest, items
from salun_sd.errors import SalunError, UsageError

NAMES = ["tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
         "gas pump", "golf ball", "parachute"]  # fmt: skip
LABELS = [4, 0, 6, 4, 9, 6, 1, 4]


def captioned(items, prompt):
    return [item.caption for item in sources.captioned(items, prompt)]


def encoded(shift: int, kind: str = "JPEG") -> bytes:
    """A file of its own for each number: a piece of the astronaut."""
    buffer = io.BytesIO()
    Image.fromarray(photos.astronaut()[100 + shift : 164 + shift, 200:264]).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three images and something that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (name, kind) in enumerate({"b.png": "PNG", "a.JPG": "JPEG", "c.d.webp": "WEBP"}.items()):
        (folder / name).write_bytes(encoded(i, kind))
    (folder / "notes.md").write_text("not looked at")
    return folder


def refused(spec, *named: str, kind=SalunError):
    """The sentence names all of these, is one line and comes with the right exit code."""
    with pytest.raises(SalunError) as caught:
        items(str(spec))
    sentence = str(caught.value)
    assert type(caught.value) is kind and "\n" not in sentence
    missing = [name for name in named if name not in sentence]
    assert not missing, f"{missing} not in: {sentence}"


def captions(spec) -> list[str | None]:
    return [item.caption for item in items(str(spec))]


# Folders


def test_a_folders_images_come_by_name_with_the_files_own_bytes(folder):
    found = items(str(folder))
    assert [i.name for i in found] == [str(folder / name) for name in ("a.JPG", "b.png", "c.d.webp")]
    assert [i.read() for i in found] == [(folder / name).read_bytes() for name in ("a.JPG", "b.png", "c.d.webp")]
    assert {(i.caption, i.label) for i in found} == {(None, None)}
    for item in found:
        assert read_image(item.read(), item.name).tobytes() == read_image(Path(item.name)).tobytes()


def test_a_folder_that_is_missing_or_empty_is_a_usage_error(tmp_path):
    refused(tmp_path / "nowhere", f"{tmp_path / 'nowhere'} ", kind=UsageError)
    refused("frgfm/imagenette:label", "frgfm/imagenette:label ", kind=UsageError)
    refused(f"{tmp_path}/nowhere:label=church", "nowhere:label=church ", kind=UsageError)
    refused(tmp_path, f"{tmp_path} ", "images", kind=UsageError)
    (tmp_path / "image.png").write_bytes(b"")
    refused(tmp_path / "image.png", "image.png is a file", f"{tmp_path}.", kind=UsageError)
    (tmp_path / "image.png").unlink()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jpg").write_bytes(encoded(0))
    refused(tmp_path, f"{tmp_path} ", "images", kind=UsageError)


def test_a_folder_with_colons_in_its_name_is_a_folder(folder):
    named = folder.rename(folder.parent / "frgfm:label=church")
    assert len(items(str(named))) == 3


def test_an_image_that_is_gone_or_broken_is_named(folder):
    found = items(str(folder))
    (folder / "b.png").unlink()
    with pytest.raises(SalunError, match=r"b\.png .*No such file"):
        found[1].read()
    for data, reason in ((b"text", "format"), (encoded(0)[:900], "truncated")):
        with pytest.raises(SalunError, match=rf"^frgfm/imagenette:train\[3\] .*{reason}"):
            read_image(data, "frgfm/imagenette:train[3]")
    with pytest.raises(SalunError, match="4 bytes"):
        read_image(b"text")


# Captions of a folder


def test_captions_come_from_metadata_as_in_imagefolder(folder):
    rows = [{"file_name": "c.d.webp", "text": "  a \n shoe"}, {"file_name": "./a.JPG", "caption": "no", "text": "ä"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for bom, end in (("", "\n"), ("\ufeff", "\r\n")):
        (folder / "metadata.jsonl").write_bytes((bom + end.join([*lines, "", ""])).encode())
        assert captions(folder) == ["ä", None, "a shoe"]
    (folder / "metadata.jsonl").unlink()
    (folder / "Metadata.CSV").write_bytes('\ufefffile_name,caption\r\na.JPG,"one, two"\r\nb.png,ü\r\n'.encode())
    assert captions(folder) == ["one, two", "ü", None]


def test_captions_come_from_text_files_with_the_images_stems(folder):
    (folder / "c.d.txt").write_bytes("\ufeffé shoe\r\n".encode())
    assert captions(folder) == [None, None, "é shoe"]
    (folder / "b.bmp").write_bytes(encoded(3, "BMP"))
    (folder / "b.txt").write_text("both of them")
    assert captions(folder) == [None, "both of them", "both of them", "é shoe"]


def test_text_files_fill_what_metadata_leaves_open(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.JPG", "text": "one"}\n')
    (folder / "b.txt").write_text("two")
    assert captions(folder) == ["one", "two", None]


def test_captions_come_from_kohyas_files_and_from_a_table_of_any_form(folder):
    (folder / "b.caption").write_text("two")
    (folder / "metadata.csv").write_bytes("sep=;\r\nFile Name;Text\r\na.JPG;one, two\r\n".encode("utf-16"))
    assert captions(folder) == ["one, two", "two", None]
    (folder / "b.txt").write_text("the same image")
    refused(folder, "b.png", "b.caption", "b.txt")


def test_captions_come_from_parquet_as_in_imagefolder(folder):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = arrow.table({"file_name": ["a.JPG", "c.d.webp"], "text": ["one", "ü"], "x": [1, 2]})
    parquet.write_table(table, folder / "metadata.parquet")
    assert captions(folder) == ["one", None, "ü"]
    parquet.write_table(table.drop(["file_name"]), folder / "metadata.parquet")
    refused(folder, "metadata.parquet", "file_name", "text, x")
    (folder / "metadata.parquet").write_bytes(b"PAR1 rubbish")
    refused(folder, "metadata.parquet", "Parquet")


def test_parquet_without_its_library_says_what_to_install(folder, monkeypatch):
    (folder / "metadata.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(folder, "metadata.parquet", "salun-sd[datasets]")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_found_in_composed_and_decomposed_form(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    for stem in ("café", "ärger"):
        (tmp_path / unicodedata.normalize(form, f"{stem}.png")).write_bytes(encoded(0, "PNG"))
    row = {"file_name": unicodedata.normalize(other, "café.png"), "text": "one"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (tmp_path / unicodedata.normalize(other, "ärger.txt")).write_text("two")
    assert sorted(captions(tmp_path)) == ["one", "two"]


def test_what_is_found_and_what_is_left_out_is_said(folder, caplog):
    (folder / "b.txt").write_text("a shoe")
    (folder / "._b.txt").write_bytes(b"\0\5\x16\7\xff")
    (folder / "10_shoe").mkdir()
    (folder / "10_shoe" / "d.png").write_bytes(encoded(3, "PNG"))
    for name in ("e.jxl", "f"):
        (folder / name).write_bytes(encoded(4))
    (folder / "e.txt").write_text("of an image that is left out with its caption")
    with caplog.at_level("INFO", logger="salun_sd"):
        assert captions(folder) == [None, "a shoe", None]
    words = (str(folder), "3 image", "1 of them", "10_shoe", "kohya", "e.jxl, f, notes.md")
    assert [word for word in words if word not in caplog.text] == []
    assert "b.txt" not in caplog.text and "e.txt" not in caplog.text


def test_a_folder_without_an_image_says_what_it_has(tmp_path):
    (tmp_path / "10_shoe").mkdir()
    (tmp_path / "10_shoe" / "a.png").write_bytes(encoded(0, "PNG"))
    (tmp_path / "b.jxl").write_bytes(b"")
    refused(tmp_path, "10_shoe", "kohya", "b.jxl", kind=UsageError)


@pytest.mark.parametrize("name", ["a.txt", "d.png", "metadata.jsonl"])
def test_a_pipe_is_no_caption_and_no_image(folder, caplog, name):
    os.mkfifo(folder / name)
    assert captions(folder) == [None] * 3 and name in caplog.text


def test_an_image_whose_name_is_no_unicode_is_read(folder):
    os.rename(os.fsencode(folder / "b.png"), os.fsencode(folder) + b"/caf\xe9.png")
    assert len(digest(sources.captioned(items(str(folder)), "a shoe"))) == 64


GOOD = '{"file_name": "a.JPG", "text": "one"}\n'


UNCLEAR = {  # files, and what the refusal names
    "two files of captions": (
        {"metadata.jsonl": GOOD, "metadata.csv": "file_name,text\n"}, ["metadata.csv", "metadata.jsonl"]),
    "a line of text": ({"metadata.jsonl": GOOD + "a shoe\n"}, ["metadata.jsonl, line 2", "Expecting value"]),
    "a list": ({"metadata.jsonl": GOOD + '\n["a.JPG"]'}, ["metadata.jsonl, line 3", "object"]),
    "no file name": ({"metadata.jsonl": '{"image": "a.JPG", "text": "x"}'}, ["line 1", "file_name", "image, text"]),
    "a list of names": ({"metadata.jsonl": '{"file_name": ["a.JPG"], "text": "x"}'}, ["line 1", "file_name that"]),
    "a list of captions": ({"metadata.jsonl": GOOD.replace('"one"', '["one"]')}, ["line 1", "no text", "a.JPG"]),
    "no caption": ({"metadata.jsonl": '{"file_name": "a.JPG", "prompt": "x"}'}, ["caption", "file_name, prompt"]),
    "no file name in a table": ({"metadata.csv": "file,text\na.JPG,x\n"}, ["metadata.csv", "file_name", "file, text"]),
    "no caption in a table": ({"metadata.csv": "file_name\na.JPG\n"}, ["csv, line 2", "text", "caption", "file_name"]),
    "a comma without quotes": ({"metadata.csv": "file_name,text\na.JPG,one, two\n"}, ["csv, line 2", "quotes"]),
    "a quote without an end": ({"metadata.csv": 'file_name,text\na.JPG,"one\n'}, ["metadata.csv", "line 2 ", "CSV"]),
    "bytes": ({"metadata.jsonl": b"\xff\xfe{"}, ["metadata.jsonl", "UTF-8"]),
    "bytes in a text": ({"a.txt": b"caf\xe9"}, ["a.txt", "UTF-8"]),
    "no such image": ({"metadata.jsonl": GOOD.replace("a.", "x.")}, ["metadata.jsonl, line 1", "x.JPG"]),
    "a text of no image": ({"README.txt": "hello"}, ["README.txt", "README.*"]),
    "several of no image": ({"x.txt": "1", "y.txt": "2", "b.txt": "3", "z.txt": "4"}, ["x.txt", "x.*", "2"]),
    "an image twice": ({"metadata.jsonl": GOOD + GOOD}, ["a.JPG", "metadata.jsonl, line 1", "metadata.jsonl, line 2"]),
    "an image in two places": ({"metadata.jsonl": GOOD, "a.txt": "one"}, ["a.JPG", "metadata.jsonl, line 1", "a.txt"]),
    "a blank text": ({"a.txt": "\n"}, ["a.txt", "a.JPG"]),
    "a blank cell": ({"metadata.csv": "file_name,text\na.JPG,\n"}, ["metadata.csv, line 2", "a.JPG"]),
    "half a pair": ({"metadata.jsonl": GOOD.replace("one", "\\ud800")}, ["metadata.jsonl, line 1", "Unicode"]),
    "half a pair in a name": ({"metadata.jsonl": GOOD.replace("a.J", "\\udce9.J")}, ["jsonl, line 1", "Unicode"]),
    "a deep list": ({"metadata.jsonl": '{"file_name": "a.JPG", "text": ' + "[" * 99_999}, ["jsonl, line 1", "nested"]),
    "a line of code": ({"metadata.jsonl": '{"file_name": "a.JPG", "text": NaN}'}, ["metadata.jsonl, line 1", "a.JPG"]),
    "null": ({"metadata.jsonl": GOOD.replace('"one"', "null")}, ["metadata.jsonl, line 1", "a.JPG"]),
}  # fmt: skip


@pytest.mark.parametrize(("files", "named"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_cannot_be_what_was_meant_is_refused(folder, files, named):
    assert captions(folder) == [None] * 3
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, *named)


def test_the_second_place_and_the_number_of_others_are_said(folder):
    (folder / "metadata.jsonl").write_text(GOOD)
    (folder / "a.txt").write_text("two")
    refused(folder, f"{folder / 'metadata.jsonl'}, line 1", f"{folder / 'a.txt'}")
    for name in "xyz":
        (folder / f"{name}.txt").write_text("three")
    refused(folder, str(folder / "x.txt"), " 2 more")


# Captions and digests of items


def item(caption=None, label=None, data=b"") -> Item:
    return Item("here", caption, label, lambda: data)


def test_an_own_caption_wins_over_the_prompt_and_the_prompt_takes_the_label():
    three = [item("own {label}", "church"), item(None, "church"), item(None, "gas pump")]
    assert captioned(three, "a {label}, {label}") == ["own {label}", "a church, church", "a gas pump, gas pump"]
    assert captioned([item(), item("own")], "a shoe") == ["a shoe", "own"]
    assert captioned([item("own")], "a {label}") == ["own"]
    with pytest.raises(UsageError, match=r"'a \{label\}' .*here"):
        captioned([item(None, "church"), item()], "a {label}")


def test_the_digest_is_of_bytes_and_captions_in_order_and_reads_each_file_once(folder):
    a, b = item("a", data=b"1"), item("b", data=b"2")
    different = [[a, b], [b, a], [a], [], [a._replace(caption=None), b], [a._replace(caption=""), b],
                 [a._replace(read=lambda: b"3"), b], [a._replace(caption="b"), b._replace(caption="a")]]  # fmt: skip
    assert len({digest(d) for d in different}) == len(different)
    assert digest([a._replace(name="there", label="x"), b]) == digest([a, b])
    read = []
    digest([i._replace(read=lambda i=i: read.append(i.name) or i.read()) for i in items(str(folder))])
    assert read == [i.name for i in items(str(folder))]


# Data sets


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The datasets library, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield datasets


def table(library, n=8, **columns):
    """A data set of n images, labelled as frgfm/imagenette is, and of more columns: name = (values, type)."""
    columns = {"image": ([{"bytes": encoded(i), "path": f"{i}.JPEG"} for i in range(n)], library.Image()),
               "label": (LABELS[:n], library.ClassLabel(names=NAMES))} | columns  # fmt: skip
    columns = {c: given for c, given in columns.items() if given}
    kinds = {c: library.Value(kind) if isinstance(kind, str) else kind for c, (_, kind) in columns.items()}
    return library.Dataset.from_dict({c: v for c, (v, _) in columns.items()}, features=library.Features(kinds))


@pytest.fixture(scope="module")
def imagenette(library, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenette")
    table(library).to_parquet(folder / "train-00000-of-00001.parquet")
    table(library, 3).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


def rows(spec) -> list[int]:
    return [int(re.search(r":train\[(\d+)\]$", item.name)[1]) for item in items(str(spec))]


def test_a_data_set_gives_its_training_rows_with_the_files_own_bytes(imagenette, monkeypatch):
    files = [encoded(n) for n in range(8)]
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded
    found = items(str(imagenette))
    assert [i.name for i in found] == [f"{imagenette}:train[{n}]" for n in range(8)]
    assert [i.read() for i in found] == files
    assert [i.label for i in found] == [NAMES[n] for n in LABELS]
    assert {i.caption for i in found} == {None}
    assert captioned(found, "an image of {label}")[2] == "an image of garbage truck"
    assert digest(found) == digest(items(str(imagenette)))


@pytest.mark.parametrize(
    "condition, kept",
    [
        ("label=church", [0, 3, 7]),
        ("label!=church", [1, 2, 4, 5, 6]),
        ("label=garbage truck", [2, 5]),
        ("label = Garbage Truck", [2, 5]),
        ("label!=CHURCH", [1, 2, 4, 5, 6]),
        ("label=6", [2, 5]),
        ("label!=4", [1, 2, 4, 5, 6]),
    ],
)
def test_a_class_is_taken_or_left_by_name_or_number(imagenette, condition, kept):
    found = items(f"{imagenette}:{condition}")
    assert rows(f"{imagenette}:{condition}") == kept
    assert [(i.read(), i.label) for i in found] == [(encoded(n), NAMES[LABELS[n]]) for n in kept]


def test_an_exact_class_name_comes_before_one_in_another_case_and_before_a_number(library, tmp_path):
    digits = library.ClassLabel(names=["b", "1", "0", "B"])
    table(library, 4, label=([0, 1, 2, 3], digits)).to_parquet(tmp_path / "train.parquet")
    assert [rows(f"{tmp_path}:label={value}") for value in ("0", "1", "3", "B", "b")] == [[2], [1], [3], [3], [0]]


def test_text_and_number_columns_filter_by_value(library, tmp_path):
    more = {"text": (["a  dog", None, " ", "a cat"], "string"), "style": (["ink", "oil: wet", "Ink", None], "string"),
            "year": ([7, 12, None, 7], "int64"), "score": ([0.5] * 4, "float32")}  # fmt: skip
    table(library, 4, label=([4, -1, None, 6], library.ClassLabel(names=NAMES)), **more).to_parquet(
        tmp_path / "train.parquet"
    )
    assert rows(f"{tmp_path}:style=ink") == [0] and rows(f"{tmp_path}:style!=ink") == [1, 2, 3]
    assert [i.label for i in items(f"{tmp_path}:style=oil: wet")] == ["oil: wet"]
    assert rows(f"{tmp_path}:year=7") == [0, 3]
    assert {i.label for i in items(f"{tmp_path}:year=7")} == {None}
    assert captions(tmp_path) == ["a dog", None, None, "a cat"]
    assert [i.label for i in items(str(tmp_path))] == ["church", None, None, "garbage truck"]
    assert rows(f"{tmp_path}:label!=church") == [1, 2, 3]
    refused(f"{tmp_path}:style=INK", "style 'INK'", "Ink, ink, oil: wet", kind=UsageError)
    refused(f"{tmp_path}:year=8", "year '8'", "7, 12", kind=UsageError)
    refused(f"{tmp_path}:score=0.5", "score", "float32", kind=UsageError)


def test_a_condition_that_names_nothing_is_refused(library, imagenette, tmp_path):
    refused(f"{imagenette}:class=church", str(imagenette), "class", "image, label", kind=UsageError)
    refused(f"{imagenette}:label!=chruch", "label 'chruch'", ", ".join(NAMES), kind=UsageError)
    refused(f"{imagenette}:label=10", "label '10'", kind=UsageError)
    refused(f"{imagenette}:label=gas pump", "label=gas pump", kind=UsageError)
    many = library.ClassLabel(names=[f"n{i:02}" for i in range(21)])
    table(library, 2, label=([0, 0], many)).to_parquet(tmp_path / "train.parquet")
    refused(f"{tmp_path}:label=x", "n18, n19 and 1 more", kind=UsageError)
    refused(f"{tmp_path}:label!=n00", "label!=n00", kind=UsageError)


def test_the_column_of_images_is_the_only_one_or_the_one_called_image(library, tmp_path):
    image = ([{"bytes": encoded(9), "path": None}] * 2, library.Image())
    specs = {name: tmp_path / name for name in ("one", "image", "none", "two")}
    for name, columns in {
        "one": {"image": None, "picture": image},
        "image": {"picture": image},
        "none": {"image": None, "size": ([1, 2], "int32")},
        "two": {"image": None, "left": image, "right": image},
    }.items():
        specs[name].mkdir()
        table(library, 2, **columns).to_parquet(specs[name] / "train.parquet")
    assert items(str(specs["one"]))[1].read() == encoded(9)
    assert items(str(specs["image"]))[1].read() == encoded(1)
    refused(specs["none"], "label (ClassLabel), size (int32)")
    refused(specs["two"], "label (ClassLabel), left (Image), right (Image)")


def test_the_only_split_will_do_and_of_several_one_has_to_be_train(library, tmp_path):
    table(library, 2).to_parquet(tmp_path / "test.parquet")
    assert [i.name for i in items(str(tmp_path))] == [f"{tmp_path}:test[{n}]" for n in range(2)]
    table(library, 3).to_parquet(tmp_path / "validation.parquet")
    refused(tmp_path, "train", "validation, test")


def test_a_data_set_saved_to_disk_is_read_as_one(library, tmp_path):
    table(library).save_to_disk(tmp_path / "saved")
    library.DatasetDict(train=table(library), test=table(library, 2)).save_to_disk(tmp_path / "splits")
    for name in ("saved", "splits"):
        assert rows(f"{tmp_path / name}:label=church") == [0, 3, 7]
        assert items(str(tmp_path / name))[3].read() == encoded(3)


def test_a_folder_is_no_format_of_the_library_by_its_name(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("csv").mkdir()
    table(library, 2).to_parquet("csv/train.parquet")
    library.enable_progress_bars()
    assert [i.name for i in items("csv")] == ["csv:train[0]", "csv:train[1]"]
    assert library.are_progress_bars_disabled()


def test_a_folder_of_class_folders_is_read_when_a_class_is_asked_for(library, tmp_path):
    for i, name in enumerate(("church", "church", "golf ball")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{i}.jpg").write_bytes(encoded(i))
    assert [i.read() for i in items(f"{tmp_path}:label=golf ball")] == [encoded(2)]


def test_texts_of_a_data_set_that_are_no_unicode_are_refused(library, tmp_path):
    import pyarrow

    (tmp_path / "names").mkdir()
    table(library, 2, label=([0, 1], library.ClassLabel(names=["a", "\ud800"]))).to_parquet(
        tmp_path / "names/t.parquet"
    )
    refused(tmp_path / "names", "Unicode", "train[1]")
    texts = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xe9"))
    rows = table(library, 1, text=(["x"], "string")).data.table
    broken = rows.set_column(rows.column_names.index("text"), "text", texts)
    (tmp_path / "texts").mkdir()
    pyarrow.parquet.write_table(broken, tmp_path / "texts/t.parquet")
    refused(tmp_path / "texts", "texts", "UTF-8")


def test_a_row_without_an_image_is_named(library, tmp_path):
    table(library, 1, image=([None], library.Image())).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SalunError, match=r":train\[0\] "):
        items(str(tmp_path))[0].read()


def test_what_the_library_cannot_load_is_refused_with_its_reason(library, tmp_path, imagenette, monkeypatch):
    refused("nobody/nothing", "nobody/nothing ", "Couldn't reach")
    refused("nobody/nothing/320px:label=church", "nobody/nothing/320px ")
    (tmp_path / "train.parquet").write_bytes(b"rubbish")
    refused(tmp_path, f"{tmp_path} ", "Parquet")
    refused(f"{tmp_path / 'train.parquet'}", f"{tmp_path / 'train.parquet'} ", kind=UsageError)
    whole = (imagenette / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:4] + b"\xff" * 2000 + whole[2004:])
    with pytest.raises(SalunError, match=f"^{tmp_path} (?!.*An error occurred while generating)"):  # that is no reason
        items(str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(imagenette, "pip install 'salun-sd[datasets]'")


def test_configurations_are_listed_when_one_has_to_be_chosen(library, tmp_path):
    card = "---\nconfigs:\n"
    for name in ("full_size", "320px"):
        (tmp_path / name).mkdir()
        table(library, 2).to_parquet(tmp_path / name / "train.parquet")
        card += f"- config_name: {name}\n  data_files: {name}/*.parquet\n"
    (tmp_path / "README.md").write_text(card + "---\n")
    refused(tmp_path, "full_size, 320px", kind=UsageError)
    assert len(items(str(tmp_path / "320px"))) == 2


def test_a_hub_id_goes_to_the_library_with_its_configuration(library, imagenette, monkeypatch):
    asked = []
    local = library.load_dataset
    monkeypatch.setattr(library, "load_dataset", lambda *place: asked.append(place) or local(str(imagenette)))
    assert rows("frgfm/imagenette:label=church") == rows("frgfm/imagenette/320px:label=church") == [0, 3, 7]
    assert items("frgfm/imagenette/320px")[7].name == "frgfm/imagenette/320px:train[7]"
    assert asked[:2] == [("frgfm/imagenette",), ("frgfm/imagenette", "320px")]
