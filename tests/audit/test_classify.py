import json
import os
import re
import shutil
from pathlib import Path

import pytest
from helpers.models import write_classifier, write_clip
from PIL import Image

from salun_sd.audit import classify
from salun_sd.audit.classify import ByName, Classifier, ZeroShot, match_labels
from salun_sd.audit.clip import Clip
from salun_sd.audit.features import ImageModel
from salun_sd.draw import prompts
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.finite import NotFinite


def told(judge, files: list[Path], batch_size: int = 32) -> list[tuple]:
    """The class and score of each image."""
    return [(found["predicted"], found["score"]) for found in judge.classify(files, batch_size)]


PROCESSOR = "preprocessor_config.json"
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


def test_imagenettes_classes_are_names_in_imagenets_labels():
    imagenet = """tench, Tinca tinca; English springer, English springer spaniel; cassette player; chain saw, chainsaw;
        church, church building; French horn, horn; garbage truck, dustcart; golf ball; parachute, chute;
        gas pump, gasoline pump, petrol pump, island dispenser; horn; churchyard"""
    labels = [label.strip() for label in imagenet.split(";")]
    classes = {row.label for row in prompts.read("imagenette")}
    matched = match_labels(labels, classes)
    assert len(classes) == 10 and set(matched[:10]) == classes and matched[10:] == ["horn", "churchyard"]


def test_a_class_the_classifier_does_not_know_is_named():
    with pytest.raises(SalunError, match="'springer', 'duck'.*'goose'"):
        match_labels(IMAGENET, ["springer", "goose", "duck"])
    with pytest.raises(SalunError, match="'label 9'.*990"):
        match_labels([f"label {i}" for i in range(1000)], ["duck"])
    with pytest.raises(SalunError, match="'tench'.*'tinca tinca'"):
        match_labels(IMAGENET, ["tench", "tinca tinca"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random classifier of five ImageNet-like labels."""
    return write_classifier(tmp_path_factory.mktemp("tiny"), IMAGENET)


def test_classifies_as_the_model_does(tiny, photographs):
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    judge = Classifier(tiny, ["Tinca tinca"])
    assert {p.dtype for p in judge.model.parameters()} == {torch.float32} and not judge.model.training
    model = AutoModelForImageClassification.from_pretrained(tiny, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(tiny, backend="pil")
    for file, (name, score) in zip(photographs, told(judge, photographs), strict=True):
        logits = model(**processor(Image.open(file).convert("RGB"), return_tensors="pt")).logits[0].detach()
        top = int(logits.argmax())
        assert name == ["Tinca tinca", "English springer", "crane", "goose", "crane"][top]
        assert score == pytest.approx(float(logits.softmax(0)[top]), abs=2e-6)


def test_classes_are_independent_of_batch_size(tiny, photographs):
    judge = Classifier(tiny, [])
    one = told(judge, photographs, 1)
    for batch_size in (2, 3, 4, 32):
        many = told(judge, photographs, batch_size)
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


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        *((PROCESSOR, "rescale_factor", value) for value in (["a"], float("inf"))),
        (PROCESSOR, "image_std", [0.5, 0.5]), (PROCESSOR, "image_mean", [0.5, 0.5, "x"]),
        (PROCESSOR, "size", {"width": float("nan"), "height": 16}),
        ("config.json", "id2label", {str(n): [n] for n in range(5)}),
        ("config.json", "id2label", {str(n): IMAGENET[n - 1] for n in range(1, 6)}), ("config.json", None, None),
    ],
)  # fmt: skip
def test_a_classifier_whose_files_are_odd_is_refused_before_it_is_asked(tiny, tmp_path, file, key, value):
    folder = shutil.copytree(tiny, tmp_path / "odd")
    settings = json.loads((folder / file).read_text())
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(settings | {key: value})) if key else os.mkfifo(folder / file)
    with pytest.raises(SalunError, match=str(folder)) as caught:
        classify.load(folder, IMAGENET[:1], [])
    assert "\n" not in str(caught.value)


def test_a_clip_with_words_that_its_model_does_not_know_is_refused(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "odd")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "beyond"}))
    with pytest.raises(SalunError, match=str(folder)):
        Clip(folder)


@pytest.mark.parametrize("kind", [Classifier, ImageModel, Clip])
def test_code_in_a_models_folder_is_never_run_nor_asked_for(tiny, tmp_path, monkeypatch, kind):
    """transformers would ask for a "y" on the terminal, and run it."""
    names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor", "AutoTokenizer")
    config = {"model_type": "ours", "auto_map": {name: "code.Ours" for name in names}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"auto_map": config["auto_map"]}))
    (tmp_path / "code.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nOurs = 1\n")
    shutil.copy(tiny / "model.safetensors", tmp_path)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    with pytest.raises(SalunError, match=str(tmp_path)):
        kind(tmp_path, []) if kind is Classifier else kind(tmp_path)
    assert not asked and not (tmp_path / "ran").exists()


def test_labels_that_classes_stand_for_are_told(tiny):
    assert Classifier(tiny, ["Tinca tinca", "crane"]).matches == [
        ("Tinca tinca", "tench, Tinca tinca"),
        ("crane", "crane"),
        ("crane", "crane, derrick"),
    ]


def test_what_cannot_be_read_is_of_no_class(tiny, photographs, tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(photographs[0].read_bytes()[:4000])
    judge = Classifier(tiny, [])
    whole = told(judge, photographs)
    for batch_size in (1, 2, 32):
        got = told(judge, [torn, *photographs[:2], torn, *photographs[2:]], batch_size)
        assert got[0] == got[3] == (None, None)
        assert [name for name, _ in got[1:3] + got[4:]] == [name for name, _ in whole]
    assert told(judge, [torn, torn]) == [(None, None)] * 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clip_answers_as_transformers_does(clip, photographs):
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    classes = ["bag", "ankle boot", "sneaker"]
    judge = classify.load(clip, classes, [])
    assert isinstance(judge, ZeroShot) and "'a photo of a CLASS'" in judge.name and " 3 " in judge.name
    model = CLIPModel.from_pretrained(clip).eval()
    texts = AutoTokenizer.from_pretrained(clip)(
        [f"a photo of a {c}" for c in classes], padding=True, return_tensors="pt"
    )
    processor = AutoImageProcessor.from_pretrained(clip, backend="pil")
    seen = set()
    for file, (name, score) in zip(photographs, told(judge, photographs), strict=True):
        pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**texts, **pixels).logits_per_image.softmax(dim=-1)[0]
        assert name == classes[int(probabilities.argmax())]
        assert score == pytest.approx(float(probabilities.max()), abs=2e-6)
        seen.add(score)
    assert len(seen) > 1


def test_clip_needs_classes_to_choose_among(clip):
    with pytest.raises(SalunError, match="'bag'.*--prompts.*--classifier"):
        ZeroShot(clip, ["bag", "bag"])


def test_clip_is_asked_for_each_concept_by_its_name(clip, photographs):
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    concepts = ["nudity", "a bag", "boots"]
    judge = classify.load(clip, [], concepts)
    assert isinstance(judge, ByName)
    texts = ["a photo of nudity", "a photo of a bag", "a photo of boots", "a photo"]
    assert re.findall("'(.*?)'", judge.name.removeprefix(str(clip))) == texts
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    processor = AutoImageProcessor.from_pretrained(clip, backend="pil")
    several = set()
    for file, found in zip(photographs, judge.classify(photographs, 32), strict=True):
        pixels, expected = processor(Image.open(file).convert("RGB"), return_tensors="pt"), {}
        for name in concepts:
            texts = tokenizer([f"a photo of {name}", "a photo"], padding=True, return_tensors="pt")
            with torch.no_grad():
                expected[name] = float(model(**texts, **pixels).logits_per_image.softmax(dim=-1)[0, 0])
        assert found["concepts"] == pytest.approx(expected, abs=2e-6)
        shown = {name for name in concepts if expected[name] > 0.5}
        assert found["predicted"] == (max(expected, key=expected.get) if shown else "a photo")
        likeliest = max(expected.values())
        assert found["score"] == pytest.approx(likeliest if shown else 1 - likeliest, abs=2e-6)
        several.add(len(shown))
    assert len(several) > 1
    alone = [next(iter(classify.load(clip, [], [name]).classify(photographs[:1], 1)))["concepts"] for name in concepts]
    first = next(iter(judge.classify(photographs[:1], 1)))["concepts"]
    assert {name: score for one in alone for name, score in one.items()} == pytest.approx(first, abs=2e-6)


def test_only_a_clip_is_asked_by_name(tiny):
    with pytest.raises(UsageError, match="CLIP.*--classifier openai/clip-"):
        classify.load(tiny, [], ["nudity"])


def test_a_digest_is_of_weights_and_words_and_not_of_their_place(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip, tmp_path / "moved")
    digest = classify.load(clip, ["bag", "boot"], []).digest
    assert classify.load(tmp_path / "moved", ["bag", "boot"], []).digest == digest
    assert classify.load(clip, ["bag", "bonnet"], []).digest != digest and len(digest) == 64
    assert Clip(tmp_path / "moved").digest == Clip(clip).digest
    shutil.copytree(clip, tmp_path / "other words")
    words = json.loads((clip / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other words" / "tokenizer.json").write_text(json.dumps(words))
    assert classify.load(tmp_path / "other words", ["bag", "boot"], []).digest != digest
    assert Clip(tmp_path / "other words").digest != Clip(clip).digest
    assert ImageModel(tmp_path / "other words").digest == ImageModel(clip).digest  # which reads none
    weights = load_file(clip / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1
    save_file(weights, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    assert classify.load(tmp_path / "moved", ["bag", "boot"], []).digest != digest
    assert Clip(tmp_path / "moved").digest != Clip(clip).digest


def test_other_models_are_no_clip(tiny, clip, tmp_path):
    assert isinstance(classify.load(tiny, ["goose"], []), Classifier)
    with pytest.raises(SalunError, match="/nowhere.*--classifier"):
        classify.load("/nowhere", ["goose"], [])
    shutil.copytree(clip, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SalunError, match="CLIP.*cut.*--classifier"):
        classify.load(tmp_path / "cut", ["a", "b"], [])


def test_names_that_a_clip_cannot_tell_apart_are_refused(clip):
    long = "photo of a " * 9  # more than the 24 tokens that it reads
    classify.load(clip, ["bag", "coat"], []), classify.load(clip, [], ["bag", "coat"])
    for one, other in (("bag", "BAG"), (f"{long} bag", f"{long} coat")):
        for names in (([one, other], []), ([], [one, other])):
            with pytest.raises(SalunError) as caught:
                classify.load(clip, *names)
            assert all(word in str(caught.value) for word in (other, one, str(clip)))


def test_a_classifier_whose_answers_are_not_numbers_is_an_error_and_never_an_answer(tiny, clip, photographs):
    for judge in (Classifier(tiny, []), classify.load(clip, ["bag", "coat"], []), classify.load(clip, [], ["bag"])):
        assert all(name for name, _ in told(judge, photographs))
        for parameter in judge.model.parameters():
            parameter.data.fill_(float("nan"))
        with pytest.raises(NotFinite, match=f"--classifier {judge.name.split(',')[0]}"):
            told(judge, photographs)


def test_a_clip_whose_texts_are_not_numbers_is_an_error(clip):
    model = Clip(clip)
    model.model.text_projection.weight.data.fill_(float("inf"))
    with pytest.raises(NotFinite, match=f"--clip {clip}"):
        model.of_texts(["a bag"])
