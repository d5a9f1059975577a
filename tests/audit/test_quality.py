"""CLIP score, FID and KID of an audit, on real small models."""

import gc
import html
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from helpers.models import write_clip
from PIL import Image

from salun_sd.audit import classify, quality
from salun_sd.audit.clip import Clip
from salun_sd.audit.features import ImageModel, extractor, features
from salun_sd.audit.fidelity import frechet, kid, moments
from salun_sd.audit.report import NO_QUALITY, Run
from salun_sd.audit.run import JUDGE
from salun_sd.audit.vision import BATCH
from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.finite import NotFinite


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """40 crops of a photograph, of several sizes."""
    folder, face = tmp_path_factory.mktemp("pictures"), skimage.data.astronaut()
    for n in range(40):
        Image.fromarray(face[n * 5 : n * 5 + 64 + n, n * 7 : n * 7 + 80]).save(folder / f"{n:02}_0.png")
    return folder


def run_of(folder: Path, texts: list[str], samples: int = 1, name: str = "m") -> Run:
    """The folder's images as so many of each text, in turn; the class is the text's last word. Each differs from its
    twin."""
    manifest = [
        {"file": file.name, "case": n // samples, "k": n % samples, "prompt": texts[n // samples % len(texts)],
         "class": texts[n // samples % len(texts)].split()[-1], "seed": n}
        for n, file in enumerate(sorted(folder.iterdir()))
    ]  # fmt: skip
    found = {"detector": None, "change": {"pixels": 0.25, "ssim": 0.5}}
    return Run(name, folder, manifest, [{key: row[key] for key in ("file", "case", "k")} | found for row in manifest])


def measured(measures: quality.Measures, run: Run, base: Run | None, concepts: list[str]) -> tuple[dict, dict]:
    return quality.measure(quality.look(measures, run, base, concepts), run, base, concepts)


TEXTS = ["a photo of a bag", "a photo of a sneaker", "a dress"]


def test_clip_score_is_the_mean_cosine_of_each_image_and_its_own_text(clip, pictures):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    processor = AutoImageProcessor.from_pretrained(clip, backend="pil")
    run, cosines = run_of(pictures, TEXTS), []
    for row in run.manifest:
        pixels = processor(Image.open(pictures / row["file"]), return_tensors="pt")
        with torch.no_grad():
            out = model(**tokenizer(row["prompt"], return_tensors="pt"), **pixels)
        cosines.append(float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))
    assert min(cosines) < 0 < max(cosines)
    got, _ = measured(quality.Measures(Clip(clip), None, None), run, None, [])
    score = got["clip_score"]
    assert score["value"] == pytest.approx(np.maximum(cosines, 0).mean(), abs=1e-4)
    assert score["ci95"][0] < score["value"] < score["ci95"][1] and score["interval"] == "bootstrap over prompts"
    assert (score["images"], score["prompts"], score["truncated"]) == (40, 40, 0)
    assert score["name"] == f"clip_score[{clip}, shortest side 16 bicubic, crop 16x16, max(cos, 0)]"
    assert got["fid"] is None is got["kid"]


def test_images_of_one_prompt_are_drawn_together(clip, pictures):
    """The same 40 scores as 40 prompts' and as 4 prompts': one mean, and a wider interval."""

    def score(samples):
        run = run_of(pictures, ["a dress"], samples)
        return measured(quality.Measures(Clip(clip), None, None), run, None, [])[0]["clip_score"]

    many, few, one = score(1), score(10), score(40)
    assert many["value"] == few["value"] and (few["images"], few["prompts"]) == (40, 4)
    assert few["ci95"][1] - few["ci95"][0] > many["ci95"][1] - many["ci95"][0]
    assert one["ci95"] is None and one["prompts"] == 1 and one["value"] == many["value"] > 0


def test_texts_longer_than_clip_reads_are_counted(clip, pictures):
    model, long = Clip(clip), "a bag " * 30
    assert model.longest == 24 and model.too_long([long, "a bag", long]) == 2
    assert torch.equal(model.of_texts([long]), model.of_texts([long + "and a dress"]))
    got, _ = measured(quality.Measures(model, None, None), run_of(pictures, [long, "a bag"]), None, [])
    assert got["clip_score"]["truncated"] == 1


def test_the_pockets_features_are_what_its_classes_are_read_from(pictures):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    of, files = extractor("pocket", JUDGE), sorted(pictures.iterdir())
    found = dict(features(of, files))
    judge = AutoModelForImageClassification.from_pretrained(JUDGE, dtype=torch.float32).eval()
    images = [Image.open(file).convert("RGB") for file in files]
    pixels = AutoImageProcessor.from_pretrained(JUDGE, backend="pil")(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = judge.classifier(torch.from_numpy(np.stack([found[file] for file in files])))
        assert torch.allclose(logits, judge(**pixels).logits, atol=1e-4)
    assert of.name == "pocket judge" and of.resize == "32x32 bilinear" and found[files[0]].shape == (160,)


def test_what_a_model_says_of_an_image_does_not_depend_on_those_beside_it(clip, pictures):
    """To the last bit: so the shards of an audit find what the whole audit finds."""
    files, judge = sorted(pictures.iterdir()), classify.load(clip, ["bag", "boot"], [])
    of_clip, run = Clip(clip), run_of(pictures, TEXTS)
    lines = [(pictures / row["file"], row) for row in run.manifest]
    assert len(files) > BATCH
    for look in (
        lambda some: [vector.tolist() for _, vector in features(extractor("pocket", JUDGE), some)],
        lambda some: [vector.tolist() for _, vector in features(ImageModel(clip), some)],
        lambda some: list(judge.classify(some, BATCH)),
        lambda some: [score.cosine for score in quality._scored(of_clip, [line for line in lines if line[0] in some])],
    ):
        whole = look(files)
        assert [look([file])[0] for file in files[::13]] == whole[::13] and look(files[3:20]) == whole[3:20]


def test_any_image_model_gives_features(clip, tmp_path, pictures):
    """CLIP its image embedding, not made a unit vector; a ViT without a trained pooler the mean of its last states."""
    from transformers import (
        AutoImageProcessor,
        CLIPModel,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessorPil,
        ViTModel,
    )

    files = sorted(pictures.iterdir())[:3]
    images = [Image.open(file).convert("RGB") for file in files]
    of = ImageModel(clip)
    pixels = AutoImageProcessor.from_pretrained(clip, backend="pil")(images=images, return_tensors="pt")
    with torch.no_grad():
        embedded = CLIPModel.from_pretrained(clip).eval().get_image_features(**pixels).pooler_output.numpy()
    assert np.allclose(of([of.prepare(image) for image in images]), embedded, atol=1e-5) and embedded.shape == (3, 24)
    assert not np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=0.1) and of.name == f"{clip} image embedding"
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    for name, model in (("vit", ViTForImageClassification(config)), ("pooled", ViTModel(config))):
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / name)
    of = ImageModel(tmp_path / "vit")
    with torch.no_grad():
        hidden = of.model(pixel_values=of.processor(images=images, return_tensors="pt")["pixel_values"])
    prepared = [of.prepare(image) for image in images]
    assert np.allclose(of(prepared), hidden.last_hidden_state.mean(dim=1).numpy())
    assert np.array_equal(of(prepared), ImageModel(tmp_path / "vit")(prepared))
    pooled = ImageModel(tmp_path / "pooled")
    assert pooled.is_pooled and not of.is_pooled and pooled(prepared).shape == of(prepared).shape == (3, 16)


def test_features_that_are_not_numbers_are_an_error(clip, pictures):
    for of in (ImageModel(clip), extractor("pocket", JUDGE)):
        for parameter in of.model.parameters():
            parameter.data.fill_(float("nan"))
        with pytest.raises(NotFinite, match=f"--fid {of.name.split()[0]}"):
            list(features(of, sorted(pictures.iterdir())[:2]))


def test_extractors_that_cannot_be_had_are_said(tmp_path, monkeypatch):
    with pytest.raises(SalunError, match="/nowhere.*--fid"):
        extractor("/nowhere", JUDGE)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"pip install 'salun-sd\[fid\]'"):
        extractor("inception", JUDGE)
    shutil.copytree(JUDGE, tmp_path / "cut")
    from safetensors.torch import load_file, save_file

    weights = load_file(JUDGE / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "encoder.stages.2" not in name}
    save_file(kept, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SalunError, match="cut.*encoder.stages.2"):
        extractor(str(tmp_path / "cut"), JUDGE)


class StubInception(torch.nn.Module):
    """What torch-fidelity's extractor takes and gives: whole uint8 images => a tuple, here of 12 features."""

    def __init__(self, name: str, features_list: list[str]):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.spread = torch.nn.Parameter(torch.ones(3, 12))
        self.sizes = []

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] == 3
        self.sizes.append(tuple(x.shape))
        return ((x.double().mean(dim=(2, 3)).float() - 128) / 128 @ (self.spread * torch.arange(12)),)


@pytest.fixture
def inception(monkeypatch):
    """`--fid inception` on a stand-in for torch-fidelity, which is not installed for the tests."""
    package = types.ModuleType("torch_fidelity")
    package.FeatureExtractorInceptionV3 = StubInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    return extractor("inception", JUDGE)


def test_inception_is_given_whole_images_in_order_of_any_size(inception, pictures):
    files = sorted(pictures.iterdir())[:5]
    Image.new("RGB", (9, 7), (255, 0, 0)).save(colour := pictures.parent / "red.png")
    found = dict(features(inception, [*files, colour]))
    assert list(found) == [*files, colour] and all(v.shape == (12,) and v.dtype == np.float32 for v in found.values())
    assert sorted(inception.model.sizes) == sorted((1, 3, *np.asarray(Image.open(f)).shape[:2]) for f in found)
    for file, vector in found.items():
        means = np.asarray(Image.open(file)).mean(axis=(0, 1))
        assert np.allclose(vector, ((means - 128) / 128).sum() * np.arange(12), atol=1e-4)
    how = quality.distances(inception, *[np.stack(list(found.values()))] * 2, "elsewhere")
    assert how["kid"]["name"] == "kid[inception, 12-d, 299x299 bilinear of TensorFlow 1]"
    assert how["fid"]["value"] == pytest.approx(0, abs=1e-6) and how["fid"]["sha256"] == inception.digest


def test_a_kid_that_rounds_to_zero_has_no_sign(inception):
    """As between features that are the same to rounding."""
    here = [np.random.default_rng(seed).normal(size=(10, 12)) for seed in range(20)]
    there = [x + 1e-9 * np.random.default_rng(99).normal(size=x.shape) for x in here]
    assert min(kid(x, y, paired=True) for x, y in zip(here, there, strict=True)) < 0
    rounded = [quality.distances(inception, x, y, quality.SAME_SEEDS) for x, y in zip(here, there, strict=True)]
    assert {str(distance["kid"]["value"]) for distance in rounded} == {"0.0"}


def test_pairs_of_two_folders_are_said_to_have_the_same_paths(inception, pictures):
    run = run_of(pictures, ["a cat"])
    folders = Run("m", pictures, [row | {"name": row["file"]} for row in run.manifest], run.detections)
    nothing = quality.Measures(None, None, None)
    names = [quality.look(nothing, side, side, []).reference for side in (run, folders)]
    assert names == ["the base's images of the same seeds", "the base's images of the same paths"]
    x = np.random.default_rng(0).normal(size=(10, 12))
    by_seeds, by_paths, apart = (quality.distances(inception, x, x + 0.1, name)["kid"] for name in (*names, "else"))
    assert by_seeds["value"] == by_paths["value"] != apart["value"] and by_paths["reference"] == names[1]


@pytest.fixture
def made_here():
    """Objects that the garbage collector knows are those made during the test: fewer to look through."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_large_images_are_not_held_while_a_batch_of_them_is_looked_at(clip, inception, tmp_path, made_here):
    """Only those that threads are at work on, of each the file's, it upright, and its RGB: what waits is as the model
    takes it."""
    threads, side = len(os.sched_getaffinity(0)), 333
    for n in range(4 * threads):
        Image.new("RGB", (side, side), (n, 0, 0)).save(tmp_path / f"{n:02}_0.png")
    files = sorted(tmp_path.iterdir())
    scored, embedder, judge = Clip(clip), ImageModel(clip), classify.load(clip, ["bag", "boot"], [])
    run = run_of(tmp_path, ["a bag"])
    for model, work in (
        (embedder.model.vision_model, lambda: list(features(embedder, files))),
        (inception.model, lambda: list(features(inception, files))),
        (judge.model.vision_model, lambda: list(judge.classify(files, BATCH))),
        (scored.model.vision_model, lambda: quality.look(quality.Measures(scored, None, None), run, None, [])),
    ):
        held = []

        def count(*_, held=held):
            held.append(sum(type(o) is Image.Image and o.size == (side, side) for o in gc.get_objects()))

        model.register_forward_pre_hook(count)
        work()
        assert held and max(held) <= 3 * threads


def test_distances_are_to_the_bases_images_or_to_a_folders(pictures, tmp_path):
    """The reference's own distance is there only where the reference is a third set."""
    shutil.copytree(pictures, tmp_path / "other")
    for n, file in enumerate(sorted((tmp_path / "other").iterdir())):
        Image.open(file).rotate(90 if n % 2 else 180).save(file)
    run, base, of = run_of(tmp_path / "other", TEXTS), run_of(pictures, TEXTS, name="b"), extractor("pocket", JUDGE)
    here, there = (np.stack([v for _, v in features(of, sorted(f.iterdir()))]) for f in (run.folder, base.folder))
    got, of_base = measured(quality.Measures(None, of, None), run, base, [])
    assert of_base == NO_QUALITY
    assert got["fid"]["name"] == "fid[pocket judge, 160-d, 32x32 bilinear]" and got["fid"]["images"] == [40, 40]
    assert got["fid"]["value"] == pytest.approx(frechet(moments(here), moments(there)), rel=1e-4)
    assert got["kid"]["value"] == pytest.approx(kid(here, there, paired=True), rel=1e-3)
    assert "40" in got["fid"]["note"] and "160" in got["fid"]["note"]
    cosines = (here * there).sum(axis=1) / np.linalg.norm(here, axis=1) / np.linalg.norm(there, axis=1)
    assert got["change_features"]["value"] == pytest.approx(1 - cosines.mean(), abs=1e-6)
    assert got["change_features"]["sha256"] == of.digest and got["change"]["value"] == 0.25
    shuffled = Run("m", run.folder, run.manifest[::-1], run.detections)
    assert measured(quality.Measures(None, of, None), shuffled, base, [])[0] == got
    alike, _ = measured(quality.Measures(None, of, None), base, base, [])
    assert alike["fid"]["value"] == alike["kid"]["value"] == 0 < got["fid"]["value"]
    (tmp_path / "few").mkdir()
    for file in sorted(pictures.iterdir())[:9]:
        shutil.copy(file, tmp_path / "few")
    (tmp_path / "few" / "torn.png").write_bytes(b"")
    got, of_base = measured(quality.Measures(None, of, tmp_path / "few"), run, base, [])
    assert got["fid"]["images"] == [40, 9] and got["fid"]["reference"] == str(tmp_path / "few")
    assert got["kid"]["value"] == pytest.approx(kid(here, there[:9]), rel=1e-3)
    assert got["change_features"]["value"] == pytest.approx(1 - cosines.mean(), abs=1e-6)
    own = frechet(moments(there), moments(there[:9]))
    assert of_base["fid"]["value"] == pytest.approx(own, rel=1e-4) and of_base["fid"]["images"] == [40, 9]


def test_images_of_the_concept_and_broken_ones_are_not_compared(pictures, clip):
    run, base = run_of(pictures, TEXTS), run_of(pictures, TEXTS, name="b")
    run.detections[0]["error"] = base.detections[2]["error"] = "it is empty"
    asked = quality.Measures(Clip(clip), extractor("pocket", JUDGE), None)
    got, of_base = measured(asked, run, base, ["sneaker"])
    left = [row for row in run.manifest if row["class"] != "sneaker" and row["case"] not in (0, 2)]
    assert got["fid"]["images"] == [len(left)] * 2 and got["clip_score"]["images"] == len(left) == 25
    assert got["clip_score"] == of_base["clip_score"] and got["change"]["images"] == got["change_features"]["images"]


def as_typed(*argv) -> None:
    cli.run(["evaluate", *map(str, argv)])


def refused(capsys, *argv) -> str:
    """What an audit that must fail says on stderr."""
    with pytest.raises(SystemExit) as caught:
        as_typed(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A prompt of each of four of the pocket's classes."""
    file = tmp_path_factory.mktemp("prompts") / "few.csv"
    file.write_text(prompts.as_csv(prompts.read("pocket")[::250]))
    return file


def test_an_audit_measures_quality_beside_its_base(tiny, clip, few, tmp_path, capsys):
    as_typed(tiny, "--prompts", few, "--denoising-steps", 1, "--out", tmp_path, "--against", tiny, "--classifier", clip,
             "--clip", clip, "--fid", "pocket")  # fmt: skip
    printed, report = capsys.readouterr(), json.loads((tmp_path / "report.json").read_text())
    assert report["quality"]["clip_score"] == report["against"]["quality"]["clip_score"]
    assert report["quality"]["fid"]["value"] == report["quality"]["kid"]["value"] == 0
    values = [report["quality"][name]["value"] for name in ("change", "change_ssim", "change_features")]
    assert values == [0, 1, 0] and report["against"]["quality"]["change"] is None and "change_ssim" in printed.out
    assert all(part in report["settings"]["classifier"] for part in ("4 classes", "'a photo of a CLASS'"))
    assert "'a photo of a sneaker'" in printed.err and "160" in printed.err  # too few for so many dimensions
    assert "clip_score" in printed.out and "fid" in printed.out
    assert report["quality"]["clip_score"]["sha256"] == Clip(clip).digest
    assert report["quality"]["fid"]["sha256"] == report["quality"]["kid"]["sha256"] == extractor("pocket", JUDGE).digest
    classes = list(dict.fromkeys(row.label for row in prompts.read(str(few))))
    assert report["settings"]["classifier_sha256"] == classify.load(clip, classes, []).digest
    page = html.unescape((tmp_path / "report.html").read_text())
    assert report["quality"]["fid"]["name"] in page and report["quality"]["fid"]["reference"] in page


def test_metrics_that_cannot_be_had_are_refused_with_the_option_to_give(clip, few, pictures, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    rows = prompts.read(str(few))
    for row, file in zip(rows, sorted(pictures.iterdir()), strict=False):
        shutil.copy(file, tmp_path / "images" / f"{row.case}_0.png")
    concepts = [part for name in {row.label for row in rows} for part in ("--concept-class", name)]
    for more, named in [
        (["--fid", "pocket"], ["--fid", "--against", "--reference"]),
        (["--reference", tmp_path], ["--reference", "--fid"]),
        (["--fid", "pocket", "--reference", tmp_path], ["--reference", str(tmp_path)]),
        (["--clip", clip, *concepts], ["--clip", "--prompts"]),
        (["--detector-model", few], [str(few), "NudeNet"]),
    ]:
        said = refused(capsys, "--images", tmp_path / "images", "--prompts", few, "--out", tmp_path / "out", *more)
        assert all(word in said for word in named), said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def crowd(pictures, tmp_path) -> list:
    """Ten images of prompts without classes, as `evaluate` takes them."""
    (tmp_path / "p.txt").write_text("".join(f"a picture of a crowd, number {n}\n" for n in range(10)))
    (tmp_path / "images").mkdir()
    for n, file in enumerate(sorted(pictures.iterdir())[:10]):
        shutil.copy(file, tmp_path / "images" / f"{n}_0.png")
    return ["--images", tmp_path / "images", "--prompts", tmp_path / "p.txt"]


def test_clip_is_asked_for_concepts_by_name_where_prompts_have_no_classes(clip, crowd, tmp_path, capsys):
    def audit(out, *concepts):
        of_class = [part for name in concepts for part in ("--concept-class", name)]
        as_typed(*crowd, "--out", tmp_path / out, "--classifier", clip, *of_class)
        lines = map(json.loads, (tmp_path / out / "detections.jsonl").read_text().splitlines())
        return json.loads((tmp_path / out / "report.json").read_text()), [line["concepts"] for line in lines]

    made, seen = audit("one", "a bag")
    shown = sum(scores["a bag"] > 0.5 for scores in seen)
    assert "'a photo of a bag'" in capsys.readouterr().err and 0 < shown < 10
    assert (made["metrics"]["ua"]["n"], made["metrics"]["ua"]["of"]) == (10 - shown, 10)
    assert made["metrics"]["ra"] is None and made["classes"] == {}
    assert made["concepts"] == {"a bag": {"ua": made["metrics"]["ua"]}}
    assert all(text in made["settings"]["classifier"] for text in ("'a photo of a bag'", "'a photo'"))
    assert f"{10 - shown} of 10 images" in (tmp_path / "one" / "report.md").read_text()
    page = (tmp_path / "one" / "report.html").read_text()
    assert "whose prompts ask for" not in page  # no prompt did
    assert len(re.findall("<strong>[^<]*<bdi>a bag</bdi>", page)) == shown
    both, seen = audit("two", "a bag", "boots")
    assert both["metrics"]["ua"]["n"] == sum(max(scores.values()) <= 0.5 for scores in seen)
    for name in ("a bag", "boots"):
        assert both["concepts"][name]["ua"]["n"] == sum(scores[name] <= 0.5 for scores in seen)
    assert both["concepts"]["a bag"]["ua"]["n"] == 10 - shown


def test_concepts_by_name_and_a_classifier_need_one_another(clip, crowd, tmp_path, capsys):
    for more, named in [
        (["--classifier", clip], ["--classifier", "--concept-class"]),
        (["--concept-class", "nudity"], ["--concept-class nudity", "--classifier"]),
        (["--concept-class", "nudity", "--classifier", JUDGE], [str(JUDGE), "CLIP"]),
        (["--concept-class", "nudity", "--classifier", clip, "--clip", clip], ["--clip", "--prompts"]),
    ]:
        said = refused(capsys, *crowd, "--out", tmp_path / "none", *more)
        assert all(word in said for word in named), said
    assert not (tmp_path / "none").exists()
