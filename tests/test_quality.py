"""CLIP score, FID and KID of an audit, on real small models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from models import write_clip
from PIL import Image

from salun_sd import cli, prompts, quality
from salun_sd.audit import JUDGE
from salun_sd.clip import Clip
from salun_sd.errors import SalunError, UsageError
from salun_sd.features import BATCH, Transformers, extractor, features
from salun_sd.fidelity import frechet, kid, moments
from salun_sd.report import Run


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
    got, _ = quality.measure(quality.Asked(Clip(clip), None, None), run, None, [])
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
        return quality.measure(quality.Asked(Clip(clip), None, None), run, None, [])[0]["clip_score"]

    many, few, one = score(1), score(10), score(40)
    assert many["value"] == few["value"] and (few["images"], few["prompts"]) == (40, 4)
    assert few["ci95"][1] - few["ci95"][0] > many["ci95"][1] - many["ci95"][0]
    assert one["ci95"] is None and one["prompts"] == 1 and one["value"] == many["value"] > 0


def test_texts_longer_than_clip_reads_are_counted(clip, pictures):
    model, long = Clip(clip), "a bag " * 30
    assert model.longest == 24 and model.too_long([long, "a bag", long]) == 2
    assert torch.equal(model.of_texts([long]), model.of_texts([long + "and a dress"]))
    got, _ = quality.measure(quality.Asked(model, None, None), run_of(pictures, [long, "a bag"]), None, [])
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
    """CLIP its image embedding; a ViT without a trained pooler the mean of its last states."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

    files = sorted(pictures.iterdir())[:3]
    embedded = Transformers(clip)([Image.open(file) for file in files])
    assert embedded.shape == (3, 24) and np.allclose(np.linalg.norm(embedded, axis=1), 1)
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    for name, model in (("vit", ViTForImageClassification(config)), ("pooled", ViTModel(config))):
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / name)
    of = Transformers(tmp_path / "vit")
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        hidden = of.model(pixel_values=of.processor(images=images, return_tensors="pt")["pixel_values"])
    assert np.allclose(of(images), hidden.last_hidden_state.mean(dim=1).numpy())
    assert np.array_equal(of(images), Transformers(tmp_path / "vit")(images))
    pooled = Transformers(tmp_path / "pooled")
    assert pooled.is_pooled and not of.is_pooled and pooled(images).shape == of(images).shape == (3, 16)


def test_extractors_that_cannot_be_had_are_said(tmp_path, pictures):
    with pytest.raises(SalunError, match="No image model could be loaded from /nowhere .*--fid `pocket`"):
        extractor("/nowhere", JUDGE)
    if not list(Path(sys.prefix).rglob("torch_fidelity")):
        with pytest.raises(UsageError, match=r"pip install 'salun-sd\[fid\]'"):
            extractor("inception", JUDGE)
    shutil.copytree(JUDGE, tmp_path / "cut")
    from safetensors.torch import load_file, save_file

    weights = load_file(JUDGE / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "encoder.stages.2" not in name}
    save_file(kept, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SalunError, match="is no whole image model: its weights lack encoder.stages.2"):
        extractor(str(tmp_path / "cut"), JUDGE)


def test_distances_are_to_the_bases_images_or_to_a_folders(pictures, tmp_path):
    """The reference's own distance is there only where the reference is a third set."""
    shutil.copytree(pictures, tmp_path / "other")
    for n, file in enumerate(sorted((tmp_path / "other").iterdir())):
        Image.open(file).rotate(90 if n % 2 else 180).save(file)
    run, base, of = run_of(tmp_path / "other", TEXTS), run_of(pictures, TEXTS, name="b"), extractor("pocket", JUDGE)
    here, there = (np.stack([v for _, v in features(of, sorted(f.iterdir()))]) for f in (run.folder, base.folder))
    got, of_base = quality.measure(quality.Asked(None, of, None), run, base, [])
    assert of_base == {"clip_score": None, "fid": None, "kid": None}
    assert got["fid"]["name"] == "fid[pocket judge, 160-d, 32x32 bilinear]" and got["fid"]["images"] == [40, 40]
    assert got["fid"]["value"] == pytest.approx(frechet(moments([here]), moments([there])), rel=1e-4)
    assert got["kid"]["value"] == pytest.approx(kid(here, there, paired=True), rel=1e-3)
    assert "40 images are too few for 160 dimensions" in got["fid"]["note"]
    shuffled = Run("m", run.folder, run.manifest[::-1], run.detections)
    assert quality.measure(quality.Asked(None, of, None), shuffled, base, [])[0] == got
    alike, _ = quality.measure(quality.Asked(None, of, None), base, base, [])
    assert alike["fid"]["value"] == alike["kid"]["value"] == 0 < got["fid"]["value"]
    (tmp_path / "few").mkdir()
    for file in sorted(pictures.iterdir())[:9]:
        shutil.copy(file, tmp_path / "few")
    (tmp_path / "few" / "torn.png").write_bytes(b"")
    got, of_base = quality.measure(quality.Asked(None, of, tmp_path / "few"), run, base, [])
    assert got["fid"]["images"] == [40, 9] and got["fid"]["reference"] == str(tmp_path / "few")
    assert got["kid"]["value"] == pytest.approx(kid(here, there[:9]), rel=1e-3)
    own = frechet(moments([there]), moments([there[:9]]))
    assert of_base["fid"]["value"] == pytest.approx(own, rel=1e-4) and of_base["fid"]["images"] == [40, 9]


def test_images_of_the_concept_and_broken_ones_are_not_compared(pictures, clip):
    run, base = run_of(pictures, TEXTS), run_of(pictures, TEXTS, name="b")
    run.detections[0]["error"] = base.detections[2]["error"] = "it is empty"
    asked = quality.Asked(Clip(clip), extractor("pocket", JUDGE), None)
    got, of_base = quality.measure(asked, run, base, ["sneaker"])
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
    assert "class 'sneaker' <- 'a photo of a sneaker'" in printed.err and "too few for 160 dimensions" in printed.err
    assert "clip_score" in printed.out and "fid" in printed.out
    page = (tmp_path / "a" / "report.html").read_text()
    assert "fid[pocket judge, 160-d, 32x32 bilinear]" in page and "the base&#39;s images of the same seeds" in page

    def fails(*more):
        with pytest.raises(SystemExit) as caught:
            cli.run(["evaluate", "--images", str(tmp_path / "a" / "images"), *argv[2:4], *argv[6:], *more])
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "--fid compares with other images: give --against BASE, or --reference" in fails("--fid", "pocket")
    assert "--reference is for --fid" in fails("--reference", str(tmp_path))
    assert "is no folder with images" in fails("--fid", "pocket", "--reference", str(tmp_path))
    concepts = [part for name in {row.label for row in rows} for part in ("--concept", name)]
    assert "these prompts all ask for one" in fails("--clip", str(clip), *concepts)
    assert "is no NudeNet 3 detector" in fails("--detector-model", str(tmp_path / "few.csv"))


def test_the_pure_part_needs_no_torch():
    code = "import sys; import salun_sd.fidelity, salun_sd.classify, salun_sd.quality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
