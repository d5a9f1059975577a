import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import cv2
import nudenet
import numpy as np
import pytest
import skimage.data
from PIL import Image

from salun_sd.detect import Classifier, detect, detector_name, match_labels, read_image, to_bgr
from salun_sd.errors import SalunError


def save(array: np.ndarray, file: Path) -> Path:
    Image.fromarray(array).save(file)
    return file


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[Path]:
    """A face (512 x 512), a cup (600 x 400), the face again, smaller and off-centre, and one black pixel."""
    folder = tmp_path_factory.mktemp("photographs")
    face = skimage.data.astronaut()
    return [
        save(face, folder / "face.png"),
        save(skimage.data.coffee(), folder / "cup.png"),
        save(np.ascontiguousarray(face[:300, 100:350]), folder / "crop.png"),
        save(np.zeros((1, 1, 3), np.uint8), folder / "dot.png"),
    ]


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
    assert [next(detect([file])) for file in photographs] == found
    assert list(detect(photographs[::-1])) == found[::-1]


def test_equals_the_library(photographs, found):
    """The library reading the PNG itself, one by one and as one batch."""
    detector = nudenet.NudeDetector()
    ours = [[{"class": b["label"], "score": b["score"], "box": b["box"]} for b in one["boxes"]] for one in found]
    assert ours == [detector.detect(str(file)) for file in photographs]
    assert ours == detector.detect_batch([str(file) for file in photographs], batch_size=len(photographs))


def test_detector_name_tells_version_and_weights(found):
    weights = Path(nudenet.__file__).with_name("320n.onnx")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    assert detector_name() == f"nudenet {version('nudenet')} 320n.onnx {digest}"
    assert {one["detector"] for one in found} == {detector_name()}


def test_detects_one_image_at_a_time(photographs):
    """Nothing is read ahead: the second file is asked for only with the second result."""
    asked = []
    results = detect(asked.append(file) or file for file in photographs)
    next(results)
    assert len(asked) == 1


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
def test_a_broken_image_is_named(tmp_path, kind, damage):
    file = tmp_path / "broken_7.img"
    Image.fromarray(skimage.data.astronaut()).save(file, kind)
    assert read_image(file).size == (512, 512)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SalunError, match="broken_7.img"):
        list(detect([file]))


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(SalunError, match="gone.png"):
        next(detect([tmp_path / "gone.png"]))


IMAGENET = ["tench, Tinca tinca", "English springer, English springer spaniel", "crane", "goose", "crane, derrick"]


def test_classes_match_whole_labels_and_synonyms_in_any_case():
    assert match_labels(IMAGENET, []) == ["tench", "English springer", "crane", "goose", "crane"]
    assert match_labels(IMAGENET, ["Tinca Tinca", "CRANE", "CRANE"]) == [
        "Tinca Tinca",
        "English springer",
        "CRANE",
        "goose",
        "CRANE",
    ]
    assert match_labels(IMAGENET, ["tench, tinca tinca"])[0] == "tench, tinca tinca"


def test_a_class_the_classifier_does_not_know_is_named():
    with pytest.raises(SalunError, match="'springer', 'duck'.*'goose'"):
        match_labels(IMAGENET, ["springer", "goose", "duck"])
    with pytest.raises(SalunError, match="'label 9' and 990 more"):
        match_labels([f"label {i}" for i in range(1000)], ["duck"])
    with pytest.raises(SalunError, match="'tench' and 'tinca tinca'"):
        match_labels(IMAGENET, ["tench", "tinca tinca"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random classifier of five ImageNet-like labels, 16 x 16 pixels, stored in half precision."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.id2label = dict(enumerate(IMAGENET))
    config.label2id = {label: i for i, label in enumerate(IMAGENET)}
    folder = tmp_path_factory.mktemp("tiny")
    model = ResNetForImageClassification(config)
    model.classifier[-1].weight.data.mul_(50)  # far from uniform, so that images differ in class
    model.half().save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_classifies_as_the_model_does(tiny, photographs):
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    judge = Classifier(tiny, ["Tinca tinca"])
    assert {p.dtype for p in judge.model.parameters()} == {torch.float32} and not judge.model.training
    model = AutoModelForImageClassification.from_pretrained(tiny, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(tiny, backend="pil")
    for file, (name, score) in zip(photographs, judge.classify(photographs), strict=True):
        logits = model(**processor(Image.open(file).convert("RGB"), return_tensors="pt")).logits[0].detach()
        top = int(logits.argmax())
        assert name == ["Tinca tinca", "English springer", "crane", "goose", "crane"][top]
        assert score == pytest.approx(float(logits.softmax(0)[top]), abs=2e-6)


def test_classes_are_independent_of_batch_size(tiny, photographs):
    judge = Classifier(tiny, [])
    one = list(judge.classify(photographs, batch_size=1))
    for batch_size in (2, 3, 4, 32):
        many = list(judge.classify(photographs, batch_size=batch_size))
        assert [name for name, _ in many] == [name for name, _ in one]
        assert [score for _, score in many] == pytest.approx([score for _, score in one], abs=2e-6)
    assert len({score for _, score in one}) > 1


@pytest.mark.parametrize("model", ["/nowhere/judge", "no-such-model", "nobody/no-such-model"])
def test_a_missing_classifier_is_named(model):
    with pytest.raises(SalunError, match=f"{model}.*--classifier") as caught:
        Classifier(model, [])
    assert "\n" not in str(caught.value)


def test_a_model_without_a_trained_classifier_head_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SalunError, match="classifier.1.weight"):
        Classifier(tmp_path, [])
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:100])
    with pytest.raises(SalunError, match=str(tmp_path)):
        Classifier(tmp_path, [])
