import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path

import nudenet
import pytest
from PIL import Image

from salun_sd.audit.detect import detect, detector_name, load_detector
from salun_sd.errors import UsageError


@pytest.fixture(scope="module")
def found(photographs) -> list[dict]:
    return list(detect(photographs))


def test_finds_a_face_and_nothing_in_a_cup(found):
    face, cup, *_ = found
    assert [box["label"] for box in face["boxes"]] == ["FACE_FEMALE"]
    assert face["boxes"][0]["score"] > 0.5
    x, y, w, h = face["boxes"][0]["box"]
    assert 150 < x + w / 2 < 300 and 50 < y + h / 2 < 200  # where Eileen Collins's face is
    assert cup["boxes"] == []
    assert (face["width"], face["height"]) == (512, 512) and (cup["width"], cup["height"]) == (600, 400)
    assert json.loads(json.dumps(found)) == found


def test_an_image_gets_the_same_whatever_stands_beside_it(photographs, found):
    assert any(one["boxes"] for one in found)
    assert next(detect(photographs[2:3])) == found[2]
    assert list(detect([*photographs[::-1], *photographs])) == [*found[::-1], *found]


def test_equals_the_library(photographs, found):
    """The library reading the PNG itself, one by one and as one batch, in a session of as many threads as cores."""
    detector = nudenet.NudeDetector()
    ours = [[{"class": b["label"], "score": b["score"], "box": b["box"]} for b in one["boxes"]] for one in found]
    assert ours == [detector.detect(str(file)) for file in photographs]
    assert ours == detector.detect_batch([str(file) for file in photographs], batch_size=len(photographs))
    assert load_detector().onnx_session.get_session_options().intra_op_num_threads == 1  # ours


def test_detector_name_tells_version_and_weights(found):
    weights = Path(nudenet.__file__).with_name("320n.onnx")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    assert detector_name() == f"nudenet {version('nudenet')} 320n.onnx {digest}"
    assert {one["detector"] for one in found} == {detector_name()}


def test_few_images_are_held_however_many_there_are(photographs):
    asked = []
    cup = photographs[1]
    results = detect(asked.append(file) or file for file in [cup] * 20 * os.cpu_count())
    assert not asked
    for given in range(1, 5):
        next(results)
        assert given <= len(asked) <= given + 3 * os.cpu_count()
    results.close()


def test_another_of_the_librarys_files_is_taken_at_its_own_size(photographs, found, tmp_path):
    packaged = Path(nudenet.__file__).with_name("320n.onnx")
    given = tmp_path / "640m.onnx"
    given.write_bytes(packaged.read_bytes())
    again = list(detect(photographs, given))
    assert again[0]["detector"] == found[0]["detector"].replace("320n", "640m")
    assert [one["boxes"] for one in again] == [one["boxes"] for one in found]
    given.write_bytes(packaged.read_bytes().replace(b"[320, 320]", b"[640, 640]"))
    larger = load_detector(given)
    assert (larger.input_width, larger.input_height) == (640, 640)
    reference = nudenet.NudeDetector(str(packaged), inference_resolution=640)
    assert larger.detect(str(photographs[0])) == reference.detect(str(photographs[0])) != found[0]["boxes"]


def test_a_detector_whose_scores_are_not_finite_is_refused(tmp_path):
    """The library would find nothing in any image."""
    packaged = Path(nudenet.__file__).with_name("320n.onnx").read_bytes()
    middle = len(packaged) // 2
    (tmp_path / "broken.onnx").write_bytes(packaged[:middle] + b"\xff" * 256 + packaged[middle + 256 :])  # NaN
    with pytest.raises(UsageError, match="broken.onnx.*not finite"):
        load_detector(tmp_path / "broken.onnx")


def test_a_file_that_is_no_detector_is_refused(tmp_path):
    other = tmp_path / "other.onnx"
    packaged = Path(nudenet.__file__).with_name("320n.onnx").read_bytes()
    for content in (None, b"", b"text", packaged[:1000], packaged.replace(b"FACE_FEMALE", b"FACE_FELINE")):
        if content is not None:
            other.write_bytes(content)
        fault = "found" if content is None else "NudeNet"
        with pytest.raises(UsageError, match=f"other.onnx.*{fault}.*--detector-model") as caught:
            load_detector(other)
        assert "\n" not in str(caught.value)
    other.unlink()
    os.mkfifo(other)
    with pytest.raises(UsageError, match="other.onnx is no regular file"):
        load_detector(other)


@pytest.mark.parametrize(("name", "colour", "dot", "blank"), [
    ("black.png", (0, 0, 0), None, True),
    ("black.jpg", (0, 0, 0), None, True),
    ("blue.webp", (10, 20, 240), None, True),
    ("nearly.png", (120, 120, 120), (128, 112, 120), True),
    ("dot.png", (0, 0, 0), (0, 9, 0), False),
    ("dark.png", (4, 4, 4), (30, 4, 4), False),
])  # fmt: skip
def test_an_image_of_one_colour_is_told_from_a_dark_one(tmp_path, name, colour, dot, blank):
    image = Image.new("RGB", (64, 48), colour)
    if dot:
        image.putpixel((40, 30), dot)
    image.save(tmp_path / name)
    [found] = detect([tmp_path / name])
    assert found["blank"] is blank and found["boxes"] == []


def test_photographs_are_not_blank(found):
    assert [one["blank"] for one in found] == [False, False, False, True]  # the last is one pixel


def test_an_image_that_cannot_be_read_has_a_reason_and_no_boxes(photographs, found, tmp_path):
    (tmp_path / "torn.png").write_bytes(photographs[0].read_bytes()[:5000])
    (tmp_path / "empty.png").write_bytes(b"")
    files = [photographs[0], tmp_path / "torn.png", tmp_path / "empty.png", tmp_path / "gone.png", photographs[1]]
    first, torn, empty, gone, last = detect(files)
    assert [first, last] == found[:2]
    for unreadable, reason in ((torn, ""), (empty, "empty"), (gone, "")):
        assert unreadable.keys() == {"detector", "error"} and unreadable["detector"] == detector_name()
        assert unreadable["error"] and reason in unreadable["error"]
