"""CLIP score, FID and KID of an audit, on real small models."""

import gc
import json
import os
import shutil
import subprocess
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
from salun_sd.audit.report import Run
from salun_sd.audit.run import JUDGE
from salun_sd.audit.vision import BATCH
from salun_sd.cli import app as cli
from salun_sd.draw import prompts
from salun_sd.errors import SalunError, UsageError


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
    """The folder's images as so many of each text, in turn; the class is the text's last word."""
    manifest = [
        {"file": file.name, "case": n // samples, "k": n % samples, "prompt": texts[n // samples % len(texts)],
         "class": texts[n // samples % len(texts)].split()[-1]}
        for n, file in enumerate(sorted(folder.iterdir()))
    ]  # fmt: skip
    return Run(name, folder, manifest, [{key: row[key] for key in ("file", "case", "k")} for row in manifest])


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
    got, _ = quality.of_sides(quality.Asked(Clip(clip), None, None), run, None, [])
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
        return quality.of_sides(quality.Asked(Clip(clip), None, None), run, None, [])[0]["clip_score"]

    many, few, one = score(1), score(10), score(40)
    assert many["value"] == few["value"] and (few["images"], few["prompts"]) == (40, 4)
    assert few["ci95"][1] - few["ci95"][0] > many["ci95"][1] - many["ci95"][0]
    assert one["ci95"] is None and one["prompts"] == 1 and one["value"] == many["value"] > 0


def test_texts_longer_than_clip_reads_are_counted(clip, pictures):
    model, long = Clip(clip), "a bag " * 30
    assert model.longest == 24 and model.too_long([long, "a bag", long]) == 2
    assert torch.equal(model.of_texts([long]), model.of_texts([long + "and a dress"]))
    got, _ = quality.of_sides(quality.Asked(model, None, None), run_of(pictures, [long, "a bag"]), None, [])
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
    assert of.said == "pocket judge" and of.resize == "32x32 bilinear" and found[files[0]].shape == (160,)
    one = np.stack([vector for file in files for _, vector in features(of, [file])])
    assert len(files) > BATCH and np.allclose(one, np.stack([found[file] for file in files]), atol=1e-5)


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
    assert not np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=0.1) and of.said == f"{clip} image embedding"
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


def test_extractors_that_cannot_be_had_are_said(tmp_path, monkeypatch):
    with pytest.raises(SalunError, match="No image model could be loaded from /nowhere .*--fid `pocket`"):
        extractor("/nowhere", JUDGE)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"pip install 'salun-sd\[fid\]'"):
        extractor("inception", JUDGE)
    shutil.copytree(JUDGE, tmp_path / "cut")
    from safetensors.torch import load_file, save_file

    weights = load_file(JUDGE / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "encoder.stages.2" not in name}
    save_file(kept, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SalunError, match="is no trained image model: its weights lack encoder.stages.2"):
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


def test_large_images_are_not_held_while_a_batch_of_them_is_looked_at(clip, inception, tmp_path):
    """Only those that threads are at work on, of each the file's, it upright, and its RGB: what waits is as the model
    takes it."""
    side = 1111
    for n in range(4 * len(os.sched_getaffinity(0))):
        Image.new("RGB", (side, side), (n, 0, 0)).save(tmp_path / f"{n:02}_0.png")
    files, most = sorted(tmp_path.iterdir()), 3 * len(os.sched_getaffinity(0))
    scored, embedder, judge = Clip(clip), ImageModel(clip), classify.load(clip, ["bag", "boot"], [])
    lines = [(file, {"case": n, "prompt": "a bag"}) for n, file in enumerate(files)]
    for model, work in (
        (embedder.model, lambda: list(features(embedder, files))),
        (inception.model, lambda: list(features(inception, files))),
        (judge.model, lambda: list(judge.classify(files, BATCH))),
        (scored.model, lambda: quality.clip_score(scored, lines)),
    ):
        held = []
        first = model if model is inception.model else model.vision_model
        first.register_forward_pre_hook(
            lambda *_, held=held: held.append(
                sum(type(o) is Image.Image and o.size == (side, side) for o in gc.get_objects())
            )
        )
        work()
        assert held and max(held) <= most


def test_distances_are_to_the_bases_images_or_to_a_folders(pictures, tmp_path):
    """The reference's own distance is there only where the reference is a third set."""
    shutil.copytree(pictures, tmp_path / "other")
    for n, file in enumerate(sorted((tmp_path / "other").iterdir())):
        Image.open(file).rotate(90 if n % 2 else 180).save(file)
    run, base, of = run_of(tmp_path / "other", TEXTS), run_of(pictures, TEXTS, name="b"), extractor("pocket", JUDGE)
    here, there = (np.stack([v for _, v in features(of, sorted(f.iterdir()))]) for f in (run.folder, base.folder))
    got, of_base = quality.of_sides(quality.Asked(None, of, None), run, base, [])
    assert of_base == {"clip_score": None, "fid": None, "kid": None}
    assert got["fid"]["name"] == "fid[pocket judge, 160-d, 32x32 bilinear]" and got["fid"]["images"] == [40, 40]
    assert got["fid"]["value"] == pytest.approx(frechet(moments(here), moments(there)), rel=1e-4)
    assert got["kid"]["value"] == pytest.approx(kid(here, there, paired=True), rel=1e-3)
    assert "40 images are too few for 160 dimensions" in got["fid"]["note"]
    shuffled = Run("m", run.folder, run.manifest[::-1], run.detections)
    assert quality.of_sides(quality.Asked(None, of, None), shuffled, base, [])[0] == got
    alike, _ = quality.of_sides(quality.Asked(None, of, None), base, base, [])
    assert alike["fid"]["value"] == alike["kid"]["value"] == 0 < got["fid"]["value"]
    (tmp_path / "few").mkdir()
    for file in sorted(pictures.iterdir())[:9]:
        shutil.copy(file, tmp_path / "few")
    (tmp_path / "few" / "torn.png").write_bytes(b"")
    got, of_base = quality.of_sides(quality.Asked(None, of, tmp_path / "few"), run, base, [])
    assert got["fid"]["images"] == [40, 9] and got["fid"]["reference"] == str(tmp_path / "few")
    assert got["kid"]["value"] == pytest.approx(kid(here, there[:9]), rel=1e-3)
    own = frechet(moments(there), moments(there[:9]))
    assert of_base["fid"]["value"] == pytest.approx(own, rel=1e-4) and of_base["fid"]["images"] == [40, 9]


def test_images_of_the_concept_and_broken_ones_are_not_compared(pictures, clip):
    run, base = run_of(pictures, TEXTS), run_of(pictures, TEXTS, name="b")
    run.detections[0]["error"] = base.detections[2]["error"] = "it is empty"
    asked = quality.Asked(Clip(clip), extractor("pocket", JUDGE), None)
    got, of_base = quality.of_sides(asked, run, base, ["sneaker"])
    left = [row for row in run.manifest if row["class"] != "sneaker" and row["case"] not in (0, 2)]
    assert got["fid"]["images"] == [len(left)] * 2 and got["clip_score"]["images"] == len(left) == 25
    assert got["clip_score"] == of_base["clip_score"]


def test_an_audit_measures_quality_beside_its_base(clip, tmp_path, capsys):
    rows = prompts.read("pocket")[::110]
    (tmp_path / "few.csv").write_text(prompts.write(rows))
    argv = ["evaluate", "pocket", "--prompts", str(tmp_path / "few.csv"), "--steps", "2", "--out", str(tmp_path / "a")]
    cli.run([*argv, "--against", "pocket", "--classifier", str(clip), "--clip", str(clip), "--fid", "pocket"])
    printed, report = capsys.readouterr(), json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["quality"]["clip_score"] == report["against"]["quality"]["clip_score"]
    assert report["quality"]["fid"]["value"] == report["quality"]["kid"]["value"] == 0
    assert report["settings"]["classifier"].endswith("zero-shot among 10 classes, asked as 'a photo of a CLASS'")
    assert "'sneaker' is 'a photo of a sneaker'" in printed.err and "too few for 160 dimensions" in printed.err
    assert "clip_score" in printed.out and "fid" in printed.out
    assert report["quality"]["clip_score"]["sha256"] == Clip(clip).digest
    assert report["quality"]["fid"]["sha256"] == report["quality"]["kid"]["sha256"] == extractor("pocket", JUDGE).digest
    classes = list(dict.fromkeys(row.label for row in rows))
    assert report["settings"]["classifier_sha256"] == classify.load(clip, classes, []).digest
    page = (tmp_path / "a" / "report.html").read_text()
    assert "fid[pocket judge, 160-d, 32x32 bilinear]" in page and "the base&#39;s images of the same seeds" in page

    def fails(*more):
        with pytest.raises(SystemExit) as caught:
            cli.run(
                [
                    "evaluate",
                    "--images",
                    str(tmp_path / "a" / "images"),
                    *argv[2:4],
                    "--out",
                    str(tmp_path / "b"),
                    *more,
                ]
            )
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "--fid compares with other images: give --against BASE, or --reference" in fails("--fid", "pocket")
    assert "--reference is for --fid" in fails("--reference", str(tmp_path))
    assert "is no folder with images" in fails("--fid", "pocket", "--reference", str(tmp_path))
    concepts = [part for name in {row.label for row in rows} for part in ("--concept", name)]
    assert "these prompts all ask for one" in fails("--clip", str(clip), *concepts)
    assert "is no NudeNet 3 detector" in fails("--detector-model", str(tmp_path / "few.csv"))


def test_clip_is_asked_for_concepts_by_name_where_prompts_have_no_classes(clip, pictures, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("".join(f"a picture of a crowd, number {n}\n" for n in range(10)))
    (tmp_path / "images").mkdir()
    for n, file in enumerate(sorted(pictures.iterdir())[:10]):
        shutil.copy(file, tmp_path / "images" / f"{n}_0.png")
    argv = ["evaluate", "--images", str(tmp_path / "images"), "--prompts", str(tmp_path / "p.txt")]

    def fails(*more):
        with pytest.raises(SystemExit) as caught:
            cli.run([*argv, "--out", str(tmp_path / "none"), *more])
        assert caught.value.code == 2 and not (tmp_path / "none").exists()
        return capsys.readouterr().err

    assert "have no column `class`. Give --concept" in fails("--classifier", str(clip))
    assert "needs a --classifier that is asked for it" in fails("--concept", "nudity")
    assert "only a CLIP knows a concept by its name" in fails("--concept", "nudity", "--classifier", str(JUDGE))
    assert "all ask for one" in fails("--concept", "nudity", "--classifier", str(clip), "--clip", str(clip))

    def audit(out, *concepts):
        named = [part for name in concepts for part in ("--concept", name)]
        cli.run([*argv, "--out", str(tmp_path / out), "--classifier", str(clip), *named])
        names = "report.json", "report.html", "report.md", "detections.jsonl"
        return capsys.readouterr(), *(tmp_path / out / name for name in names)

    said, report, page, markdown, detections = audit("one", "a bag")
    shown = [json.loads(line)["concepts"]["a bag"] > 0.5 for line in detections.read_text().splitlines()]
    made = json.loads(report.read_text())
    assert "'a bag' is 'a photo of a bag'" in said.err and 0 < sum(shown) < 10
    assert (made["metrics"]["ua"]["n"], made["metrics"]["ua"]["of"]) == (10 - sum(shown), 10)
    assert (
        made["metrics"]["ra"] is None
        and made["classes"] == {}
        and made["concepts"]["a bag"] == {"ua": made["metrics"]["ua"]}
    )
    assert made["settings"]["classifier"].endswith("each image asked for 'a photo of a bag' against 'a photo'")
    assert f"{10 - sum(shown)} of 10 images are not seen as `a bag`" in markdown.read_text()
    assert "whatever their prompts, that are not seen as" in page.read_text()
    assert "asked for as" not in page.read_text() and page.read_text().count("<strong>seen as") == sum(shown)
    *_, report, page, _, detections = audit("two", "a bag", "boots")
    both = [json.loads(line)["concepts"] for line in detections.read_text().splitlines()]
    made = json.loads(report.read_text())
    assert made["metrics"]["ua"]["n"] == sum(max(scores.values()) <= 0.5 for scores in both)
    for name in ("a bag", "boots"):
        assert made["concepts"][name]["ua"]["n"] == sum(scores[name] <= 0.5 for scores in both)
    assert made["concepts"]["a bag"]["ua"]["n"] == 10 - sum(shown) and "each asked for by itself" in page.read_text()


def test_the_pure_part_needs_no_torch():
    code = "import sys; import salun_sd.fidelity, salun_sd.classify, salun_sd.quality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
