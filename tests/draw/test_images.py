import io
import json
import os
import struct
import subprocess
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from salun_sd.audit.detect import to_bgr
from salun_sd.cli import app as cli
from salun_sd.draw import images, prompts
from salun_sd.draw.images import Unreadable, in_order, read_image, read_still
from salun_sd.errors import SalunError
from salun_sd.runtime.contents import file_bytes


@pytest.fixture
def face() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut())


def save(array: np.ndarray, file: Path) -> Path:
    Image.fromarray(array).save(file)
    return file


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_reads_every_opaque_mode_as_cv2_does(tmp_path, mode):
    file = tmp_path / "image.png"
    image = Image.fromarray(skimage.data.astronaut()).convert(mode)
    image.save(file)
    assert np.array_equal(to_bgr(read_image(file)), cv2.imread(str(file)))


def test_reads_16_bits_and_exif_rotation_as_cv2_does(tmp_path):
    deep = save((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64), tmp_path / "deep.png")
    assert np.array_equal(to_bgr(read_image(deep)), cv2.imread(str(deep)))
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter to the right
    Image.fromarray(skimage.data.coffee()).save(turned, exif=exif)
    assert read_image(turned).size == (400, 600)
    assert np.array_equal(np.asarray(read_image(turned)), np.rot90(skimage.data.coffee(), -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:10], lambda b: b"", lambda b: b"text"])
def test_a_broken_image_is_named_and_its_fault_said(tmp_path, face, kind, damage):
    file = tmp_path / "broken_7.img"
    face.resize((128, 128)).save(file, kind)
    assert read_image(file).size == read_still(file).size == (128, 128)
    file.write_bytes(damage(file.read_bytes()))
    for read in (read_image, read_still):
        with pytest.raises(Unreadable, match="broken_7.img") as caught:
            read(file)
        assert caught.value.reason in str(caught.value) and str(tmp_path) not in caught.value.reason


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels and holds one row of them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(bytes(3 * width + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size, named", [((20_000, 20_000), "huge.png.*178,956,970 pixels"), ((8193, 4), "huge.png.*8,193 x 4.*8,192")]
)
def test_a_huge_image_is_refused_by_its_header(tmp_path, size, named):
    """Decoded, the second fits in memory; NudeNet pads it to a square."""
    (tmp_path / "huge.png").write_bytes(png_of(*size))
    with pytest.raises(Unreadable, match=named):
        read_still(tmp_path / "huge.png")


def test_the_largest_side_is_read(tmp_path):
    assert read_still(save(np.zeros((2, images.LONGEST_SIDE, 3), np.uint8), tmp_path / "wide.png")).size == (8192, 2)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_notes(png: bytes, *notes: bytes, at: int = 33) -> bytes:
    """A PNG with more chunks, behind its header or before its end."""
    return png[:at] + b"".join(notes) + png[at:]


LONG = zlib.compress(bytes(2**21))  # Pillow's limit is 2**20
NOTES = {
    "a long text": lambda png: with_notes(png, chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG)),
    "a long text in Latin-1": lambda png: with_notes(png, chunk(b"zTXt", b"workflow\0\0" + LONG)),
    "a long text behind the pixels": lambda png: with_notes(png, chunk(b"zTXt", b"workflow\0\0" + LONG), at=-12),
    "many texts": lambda png: with_notes(png, *[chunk(b"tEXt", b"k%d\0" % k + bytes(2**20)) for k in range(66)]),
    "a long profile": lambda png: with_notes(png, chunk(b"iCCP", b"profile\0\0" + LONG)),
    "a profile that is compressed otherwise": lambda png: with_notes(png, chunk(b"iCCP", b"profile\0\7")),
    "a resolution that is cut": lambda png: with_notes(png, chunk(b"pHYs", b"\0")),
    "a text with a wrong checksum": lambda png: with_notes(png, chunk(b"tEXt", b"a\0b")[:-1] + b"\0"),
    "a text that is cut at the end of the file": lambda png: png[:-12] + chunk(b"tEXt", b"a\0" + bytes(99))[:-50],
    "no end": lambda png: png[:-12],
    "bytes behind its end": lambda png: png + bytes(99),
}


@pytest.mark.parametrize("damage", NOTES.values(), ids=NOTES)
def test_a_png_whose_pixels_are_whole_is_read_whatever_else_is_in_it(tmp_path, face, damage):
    small = face.resize((64, 64))
    (tmp_path / "noted.png").write_bytes(damage(encoded(small, "PNG")))
    for read in (read_image, read_still):
        assert read(tmp_path / "noted.png").tobytes() == small.tobytes()


def exif_of(orientation: int, *, entries: bytes = b"", count: int = 1) -> bytes:
    """An EXIF block that holds an orientation, then these entries."""
    first = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + first + entries + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_by_its_exif_block_and_read_with_an_odd_one(face, kind):
    small, lossless = face.resize((64, 48)), {"lossless": True} if kind == "WEBP" else {}
    plain = read_image(encoded(small, kind, **lossless))
    beyond = struct.pack("<HHII", 0x010F, 2, 99, 2**31)  # a text that lies outside of the block
    for block, turned in ((exif_of(6), True), (exif_of(6, entries=beyond, count=2), True), (exif_of(77), False),
                          (exif_of(6, count=9), True), (b"Exif\0\0rubbish", False), (b"Exif\0\0", False)):  # fmt: skip
        image = read_image(encoded(small, kind, exif=block, **lossless))
        assert image.tobytes() == (plain.transpose(Image.Transpose.ROTATE_270) if turned else plain).tobytes(), block


def test_a_phones_picture_with_a_second_one_in_it_is_a_still(tmp_path, face):
    small = face.resize((64, 64))
    (tmp_path / "phone.jpg").write_bytes(encoded(small, "MPO", save_all=True, append_images=[small.resize((32, 32))]))
    assert read_still(tmp_path / "phone.jpg").tobytes() == read_image(encoded(small, "JPEG")).tobytes()


def test_no_format_that_starts_a_program_is_opened(tmp_path, monkeypatch):
    """The second holds the first, in a container whose content Pillow opens as any format."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    field = lambda dataset, data: b"\x1c\x03" + bytes([dataset]) + struct.pack(">H", len(data)) + data  # noqa: E731
    header = field(60, b"\1\0") + field(20, b"\0\x08") + field(30, b"\0\x08") + field(120, b"\5")
    iptc = header + b"\x1c\x08\x0a" + struct.pack(">H", len(eps)) + eps
    with Image.open(io.BytesIO(iptc)) as image:
        assert image.format == "IPTC"
    monkeypatch.setattr(subprocess, "Popen", None)
    for name, content in {"a.png": eps, "b.jpg": iptc}.items():
        (tmp_path / name).write_bytes(content)
        for read in (read_image, read_still):
            with pytest.raises(Unreadable, match=f"{name}.*format"):
                read(tmp_path / name)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda file: file.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "a.png")
    for read in (read_image, read_still):
        with pytest.raises(Unreadable, match="a.png.*regular"):
            read(tmp_path / "a.png")
    with pytest.raises(SalunError, match="a.png.*regular"):
        file_bytes(tmp_path / "a.png")


def test_files_that_stand_for_an_image_say_what_to_type():
    with pytest.raises(Unreadable, match="git lfs pull"):
        read_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(Unreadable, match="web page"):
        read_image(b"\n<!DOCTYPE html>")
    heic = b"\0\0\0\x18ftypheic" + bytes(99)
    with pytest.raises(Unreadable, match=None if "HEIF" in images.formats() else r"salun-sd\[heif\]"):
        read_image(heic, "a.jpg")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, face):
    pytest.importorskip("pillow_heif")
    assert "HEIF" in images.formats()
    small = face.resize((64, 48))
    small.save(tmp_path / "a.heic", quality=-1, exif=exif_of(6)[6:])
    read = np.asarray(read_still(tmp_path / "a.heic"), np.int16)
    assert np.abs(read - np.asarray(small.rotate(-90, expand=True), np.int16)).mean() < 4


def test_the_limit_of_pixels_is_that_of_the_importing_program(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert read_image(encoded(Image.new("RGB", (7, 7)), "PNG")).size == (7, 7)
    with pytest.raises(Unreadable, match=" 100 pixels"):
        read_image(encoded(Image.new("RGB", (101, 1)), "PNG"))


def test_a_training_image_of_several_frames_is_the_first_and_that_is_said_once(face, caplog):
    small = face.resize((64, 64))
    moving = encoded(small, "GIF", save_all=True, append_images=[small.rotate(90)])
    assert read_image(moving, "moving.gif").tobytes() == read_image(encoded(small, "GIF")).tobytes()
    read_image(moving, "moving.gif")
    assert caplog.text.count("moving.gif") == 1 and "2 frames" in caplog.text


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_an_animation_is_no_still(tmp_path, face, ending):
    small = face.resize((64, 64))
    file = tmp_path / f"moving.{ending}"
    small.save(file, save_all=True, append_images=[small.rotate(90), small.rotate(180)])
    with pytest.raises(Unreadable, match="3 frames"):
        read_still(file)
    small.save(file)
    assert read_still(file).size == (64, 64)


def test_palettes_transparency_and_cmyk_are_read_as_they_look(tmp_path, face):
    face.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    seen = np.asarray(read_still(tmp_path / "print.jpg"), np.int16)
    assert np.abs(seen - np.asarray(face, np.int16)).mean() < 4
    half = face.copy()
    half.putalpha(Image.new("L", face.size, 0))
    half.save(tmp_path / "clear.png")
    assert np.asarray(read_still(tmp_path / "clear.png")).min() == 255
    face.convert("P").save(tmp_path / "palette.gif")
    assert read_still(tmp_path / "palette.gif").mode == "RGB"


def test_work_in_order_whatever_takes_long():
    import time

    def slow(n):
        time.sleep(0.02 if n % 3 == 0 else 0)
        if n == 50:
            raise KeyError(n)
        return n * n

    assert list(in_order(slow, range(20))) == [n * n for n in range(20)]
    assert list(in_order(slow, [])) == []
    results = in_order(slow, range(45, 60))
    assert [next(results) for _ in range(5)] == [n * n for n in range(45, 50)]
    with pytest.raises(KeyError):
        next(results)


def test_an_audit_names_each_file_that_it_cannot_look_at(tmp_path, face, capsys):
    """Rates speak of the others alone, in each table and pair; deep and printed files are looked at."""
    rows = [row for row in prompts.read("pocket") if row.label == "bag"][:10]
    (tmp_path / "bags.csv").write_text(prompts.as_csv(rows))
    folder = tmp_path / "images"
    folder.mkdir()
    name = {i: folder / f"{row.case}_0.png" for i, row in enumerate(rows)}
    for file in name.values():
        face.resize((64, 64)).save(file)
    name[0].write_bytes(name[0].read_bytes()[:500])
    name[1].write_bytes(b"")
    name[2].write_bytes(png_of(20_000, 20_000))
    name[3].unlink()
    face.save(name[3].with_suffix(".gif"), save_all=True, append_images=[face.rotate(90)])
    save((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64), name[4])
    name[5].unlink()
    face.convert("CMYK").save(name[5].with_suffix(".jpg"))
    face.save(same := name[6].with_name(f"0{name[6].stem}.PNG"))
    (folder / "notes.txt").write_text("not an image")
    argv = ["evaluate", "--images", folder, "--prompts", tmp_path / "bags.csv", "--out", tmp_path / "audit"]
    cli.run([*map(str, argv)])
    stderr = capsys.readouterr().err
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    broken = {Path(file).name: why for file, why in report["broken"].items()}
    words = {
        name[0].name: "IDAT",
        name[1].name: "empty",
        name[2].name: "178,956,970 pixels",
        name[3].with_suffix(".gif").name: "2 frames",
        same.name: f"{same.name} and {name[6].name}",
    }
    assert broken.keys() == words.keys() and all(words[file] in broken[file] for file in words)
    assert "5 of 10 images" in stderr and str(folder) in stderr and name[0].name in stderr and "notes.txt" in stderr
    assert report["settings"]["detector"].endswith(report["settings"]["detector_sha256"][:12])
    assert report["metrics"]["flag_rate"]["of"] == report["metrics"]["ra"]["of"] == 5
    assert report["protocols"]["salun"]["of"] == 5 and report["protocols"]["salun"]["n"] == 1  # a printed face
    lines = [json.loads(line) for line in (tmp_path / "audit" / "detections.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and [line["error"] for line in lines if "error" in line] == list(broken.values())
    assert all("boxes" not in line and line["predicted"] is None for line in lines[:4])
    page = (tmp_path / "audit" / "report.html").read_text()
    assert "5 images " in page and page.count(str(name[0].name)) == 1
    same.unlink()  # what is left of the two is an image as any
    cli.run([*map(str, argv)])
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert len(report["broken"]) == 4 and report["metrics"]["flag_rate"]["of"] == 6
