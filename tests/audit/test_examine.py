"""The two passes over an audit's images: what is kept, and what is asked again."""

import hashlib
import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from salun_sd.audit.classify import Judge
from salun_sd.audit.detect import detector_name
from salun_sd.audit.detectors import Detectors
from salun_sd.audit.examine import examine
from salun_sd.audit.vision import BATCH
from salun_sd.errors import SalunError
from salun_sd.runtime import seals
from salun_sd.runtime.stamps import FILE as STAMPS
from salun_sd.runtime.stamps import Stamps, state_of

BOX = {"label": "FEET_COVERED", "score": 0.75, "box": [0, 0, 1, 1]}  # what no detector finds in these images


class Reds(Judge):
    """A classifier that answers with the red of an image's first pixel. `asked` has its batches."""

    digest = "reds"

    def __init__(self):
        self.asked = []

    def prepare(self, image: Image.Image) -> int:
        return image.getpixel((0, 0))[0]

    def answers(self, images: list[int]) -> list[dict]:
        self.asked.append(images)
        return [{"predicted": "bag", "score": 0.5, "concepts": {str(red): 0.5}} for red in images]


class Ending(Reds):
    """The same, which ends the run after so many answers; `left` is what stands on the disk then."""

    def __init__(self, after: int, partial: Path):
        super().__init__()
        self.after, self.partial = after, partial

    def classify(self, files, batch_size):
        yield from islice(super().classify(files, batch_size), self.after)
        self.left = self.partial.read_bytes()
        raise KeyboardInterrupt


def kill(manifest: list[dict], after: int, out: Path) -> Path:
    """Begin a run, and leave what kill -9 leaves after so many answers of the classifier; the only file there is."""
    judge = Ending(after, partial := out / ".detections.0.partial")
    with pytest.raises(KeyboardInterrupt):
        examine("m", manifest, judge, Detectors(), out)
    partial.write_bytes(judge.left)
    assert list(contents(out)) == [partial.name]
    return partial


def lines_of(file: Path) -> list[dict]:
    """The sealed lines of a file, without their digests."""
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert all(seals.KEY in line for line in lines)
    return [seals.unsealed(line, str(file)) for line in lines]


def written(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(map(seals.line, lines)))


def manifest_of(files: list[Path]) -> list[dict]:
    return [{"file": str(file), "case": n, "k": 0} for n, file in enumerate(files)]


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> list[dict]:
    """The manifest of three photographs of a face."""
    folder, photo = tmp_path_factory.mktemp("faces"), skimage.data.astronaut()
    for n in range(3):
        photo[0, 0] = n
        Image.fromarray(photo[: 300 - n, : 300 + n]).save(folder / f"{n}.png")
    return manifest_of(sorted(folder.iterdir()))


@pytest.fixture(scope="module")
def whole(faces, tmp_path_factory) -> dict[str, bytes]:
    """Name => bytes of the files that a run writes which nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    examine("m", faces, Reds(), Detectors(), out)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    """All but the stamps, which have the times of files."""
    return {file.name: file.read_bytes() for file in out.iterdir() if not STAMPS.fullmatch(file.name)}


def test_a_line_has_the_image_who_looked_and_what_was_found(faces, whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert sorted(whole) == ["detections.jsonl", "manifest.jsonl"]
    assert lines_of(tmp_path / "manifest.jsonl") == faces
    for n, line in enumerate(lines_of(tmp_path / "detections.jsonl")):
        assert list(line) == ["file", "case", "k", "sha256", "detector", "classifier", "width", "height", "blank",
                              "boxes", "predicted", "score", "concepts"]  # fmt: skip
        assert (line["case"], line["width"], line["height"]) == (n, 300 + n, 300 - n)
        assert (line["detector"], line["classifier"]) == (detector_name(), Reds.digest)
        assert [box["label"] for box in line["boxes"]] == ["FACE_FEMALE"] and line["concepts"] == {str(n): 0.5}


def test_a_run_killed_in_either_pass_goes_on_to_the_same_bytes(faces, whole, tmp_path):
    """Between two lines of the second pass, again and again; then within a line of the first."""
    text = kill(faces, 0, tmp_path).read_text()
    for after in (1, 1):
        kill(faces, after, tmp_path)
    examine("m", faces, Reds(), Detectors(), tmp_path)
    assert contents(tmp_path) == whole
    (tmp_path / "detections.jsonl").unlink()
    (tmp_path / ".detections.0.partial").write_text(text[: text.index("FACE", text.index("FACE") + 1)])
    examine("m", faces, Reds(), Detectors(), tmp_path)
    assert contents(tmp_path) == whole


def test_what_a_killed_run_wrote_down_is_not_looked_at_again(faces, tmp_path):
    (tmp_path / ".detections.0.partial").write_text('{"sha256": "0123')  # a line of an earlier kill
    partial = kill(faces, 2, tmp_path)
    partial.write_text(partial.read_text().removeprefix('{"sha256": "0123\n'))
    written(partial, [line | ({"boxes": [BOX]} if "boxes" in line else {"score": 0.25}) for line in lines_of(partial)])
    run = examine("m", faces, Reds(), Detectors(), tmp_path)
    assert [line["boxes"] for line in run.detections] == [[BOX]] * 3
    assert [line["score"] for line in run.detections] == [0.25, 0.25, 0.5]


def test_boxes_hang_on_the_detector_alone_and_classes_on_the_classifier_alone(faces, whole, tmp_path):
    file = tmp_path / "detections.jsonl"
    file.write_bytes(whole["detections.jsonl"])
    plain = lines_of(file)
    marks = {"boxes": [BOX], "predicted": "coat"}
    for other, kept in (("classifier", "boxes"), ("detector", "predicted")):
        written(file, [line | marks | {other: "another"} for line in plain])
        examine("m", faces, Reds(), Detectors(), tmp_path)
        assert lines_of(file) == [line | {kept: marks[kept]} for line in plain]


def test_an_image_that_could_not_be_read_is_looked_at_again(faces, whole, tmp_path):
    """It may have been the machine: what it says of the file is not kept."""
    (tmp_path / "detections.jsonl").write_bytes(whole["detections.jsonl"])
    failed, *others = lines_of(tmp_path / "detections.jsonl")
    for key in ("width", "height", "blank", "boxes", "concepts"):
        del failed[key]
    failed |= {"error": "Too many open files", "predicted": None, "score": None}
    written(tmp_path / "detections.jsonl", [failed, *others])
    examine("m", faces, Reds(), Detectors(), tmp_path)
    assert contents(tmp_path) == whole


def test_a_line_that_does_not_say_whether_its_image_is_blank_is_not_kept(faces, whole, tmp_path):
    (tmp_path / "detections.jsonl").write_bytes(whole["detections.jsonl"])
    lines = [line | {"boxes": [BOX]} for line in lines_of(tmp_path / "detections.jsonl")]
    del lines[1]["blank"]
    written(tmp_path / "detections.jsonl", lines)
    boxes = [line["boxes"] for line in examine("m", faces, Reds(), Detectors(), tmp_path).detections]
    assert boxes[0] == boxes[2] == [BOX] != boxes[1]


def test_a_line_that_was_altered_is_not_used_and_its_image_looked_at_again(faces, whole, tmp_path, caplog):
    text = whole["detections.jsonl"].decode()
    (tmp_path / "detections.jsonl").write_text(text.replace("FACE_FEMALE", "FACE_FEMALF", 1))
    examine("m", faces, Reds(), Detectors(), tmp_path)
    assert contents(tmp_path) == whole and str(tmp_path / "detections.jsonl") in caplog.text


@pytest.mark.parametrize("change", [{"boxes": [7]}, {"blank": "x"}, {"predicted": 7}, {"change": {"pixels": 0}}])
def test_a_line_with_a_value_of_another_type_is_not_used_either(faces, whole, tmp_path, caplog, change):
    (tmp_path / "detections.jsonl").write_bytes(whole["detections.jsonl"])
    first, *others = lines_of(tmp_path / "detections.jsonl")
    written(tmp_path / "detections.jsonl", [first | change, *others])
    examine("m", faces, Reds(), Detectors(), tmp_path)
    assert contents(tmp_path) == whole and "detections.jsonl has damaged lines" in caplog.text


def test_another_image_of_the_same_name_is_looked_at(faces, whole, tmp_path):
    other = tmp_path / "1.png"
    Image.new("RGB", (40, 30)).save(other)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.jsonl").write_bytes(whole["detections.jsonl"])
    changed = [faces[0], faces[1] | {"file": str(other)}, faces[2]]
    first, second, third = examine("m", changed, None, Detectors(), tmp_path / "out").detections
    assert first["boxes"] and third["boxes"] and second["boxes"] == [] and second["width"] == 40
    assert {line["predicted"] for line in (first, second, third)} == {None}  # without a judge nothing is taken over


def test_the_bytes_of_an_image_are_not_read_again_while_its_file_is_as_it_was(faces, whole, tmp_path):
    """A stamp is believed: here it says of another image that it is the first."""
    for n in range(3):
        shutil.copyfile(faces[n]["file"], tmp_path / f"{n}.png")
    manifest = [line | {"file": f"{n}.png"} for n, line in enumerate(faces)]
    first = examine("m", manifest, Reds(), Detectors(), tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
    Stamps(tmp_path).add("1.png", state_of(tmp_path / "1.png"), first.detections[1]["sha256"])
    assert examine("m", manifest, Reds(), Detectors(), tmp_path).detections == first.detections
    os.utime(tmp_path / "1.png")
    assert examine("m", manifest, Reds(), Detectors(), tmp_path).detections[1]["width"] == 40


@pytest.fixture
def seen(tmp_path) -> tuple[list[dict], Path]:
    """The manifest of three blocks of small images, the last of 6; and a folder where all were detected before."""
    (tmp_path / "small").mkdir()
    for n in range(2 * BATCH + 6):
        image = Image.new("RGB", (4, 4), (n, 0, 0))
        image.putpixel((1, 1), (255, 255, 255))
        image.save(tmp_path / "small" / f"{n:02}.png")
    manifest = manifest_of(sorted((tmp_path / "small").iterdir()))
    boxes = {"detector": detector_name(), "width": 4, "height": 4, "blank": False, "boxes": [BOX]}
    (tmp_path / "out").mkdir()
    digests = [hashlib.sha256(Path(line["file"]).read_bytes()).hexdigest() for line in manifest]
    written(tmp_path / "out" / "detections.jsonl", [boxes | {"sha256": digest} for digest in digests])
    return manifest, tmp_path / "out"


def test_the_judge_is_asked_in_blocks_and_of_new_images_alone(seen):
    manifest, out = seen
    judge, again = Reds(), Reds()
    run = examine("m", manifest, judge, Detectors(), out)
    assert list(map(len, judge.asked)) == [BATCH, BATCH, 6] and sum(judge.asked, []) == list(range(len(manifest)))
    assert [line["concepts"] for line in run.detections] == [{str(n): 0.5} for n in range(len(manifest))]
    known = [line for line in run.detections if line["case"] not in (5, 2 * BATCH + 1)]
    keys = ("sha256", "detector", "width", "height", "blank", "boxes")
    boxes = [{key: line[key] for key in keys} for line in run.detections]
    written(out / "detections.jsonl", [*boxes, *known])
    assert examine("m", manifest, again, Detectors(), out).detections == run.detections
    assert again.asked == [[5, 2 * BATCH + 1]]
    assert examine("m", manifest, again, Detectors(), out).detections == run.detections and len(again.asked) == 1


def test_a_line_of_the_manifest_with_an_error_is_not_looked_at(seen):
    manifest, out = seen
    manifest[3]["error"] = "two files are this image"
    judge = Reds()
    found = examine("m", manifest, judge, Detectors(), out).detections
    assert found[3] == {"file": manifest[3]["file"], "case": 3, "k": 0, "sha256": None, "detector": detector_name(),
                        "classifier": Reds.digest, "error": manifest[3]["error"], "predicted": None,
                        "score": None}  # fmt: skip
    assert found[2]["concepts"] == {"2": 0.5} and 3 not in judge.asked[0]


def test_of_images_of_which_none_can_be_read_nothing_is_reported(tmp_path):
    files = [tmp_path / "0.png", tmp_path / "gone.png"]
    files[0].write_bytes(b"")
    with pytest.raises(SalunError, match="2 images.*0.png"):
        examine("m", manifest_of(files), Reds(), Detectors(), tmp_path / "out")
    lines = lines_of(tmp_path / "out" / "detections.jsonl")
    assert all(line["error"] and line["predicted"] is None and "boxes" not in line for line in lines)
    assert lines[0]["sha256"] and lines[1]["sha256"] is None
