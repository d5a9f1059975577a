"""The bundled checkpoint keeps what its card promises, and the script that trained it can be killed."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import BUNDLED, POCKET
from salun_sd.checkpoint.provenance import license_of
from salun_sd.cli import app as cli
from salun_sd.pocket import train
from salun_sd.pocket.stage import Stage

DDPM = BUNDLED["pocket-ddpm"]
# The figure of the card was measured on the files with this digest. Who changes one of them measures again, with
# SALUN_SD_THOUSAND=1 pytest -n 0 -m slow tests/test_pocket.py, and writes the figure and the digest anew.
FIGURE, DIGEST = 989, "3542f8ce03a7214413dd07d4ee38612d4d0e98d537a303a53a4676ff60ea1878"
OF_DDPM, DIGEST_OF_DDPM = 293, "5cf2ccfd9e48946365432fca5f4e9d0e7b5953b50d51bbd5938642828425206a"  # of 300
# Of the 280 prompts that judge the demo, the answers that are not the class asked for, and that the judge is sure of:
# where the processor rounds otherwise, a score changes in its third digit.
SURE, WRONG = 0.6, {655: "coat", 685: "t-shirt"}


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and bytes of all that draws and judges."""
    names = [f for f in folder.glob("*") if f.name != "ddpm"]
    files = sorted(f for name in names for f in (name, *name.rglob("*")) if f.suffix in (".safetensors", ".json"))
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n" for f in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_published_figures_are_of_these_very_files():
    assert (digest_of(POCKET), digest_of(DDPM)) == (DIGEST, DIGEST_OF_DDPM)
    assert f"{FIGURE} of 1,000" in (POCKET / "README.md").read_text(encoding="utf-8")
    assert f"{OF_DDPM} of 300" in (DDPM / "README.md").read_text(encoding="utf-8")
    assert [license_of(find(name)) for name in BUNDLED] == [{"license": "mit"}] * 2


def test_every_part_is_half_precision_and_small():
    files = [f for part in ("unet", "vae", "text_encoder", "judge") for f in (POCKET / part).glob("*.safetensors")]
    [of_ddpm] = DDPM.rglob("*.safetensors")
    assert len(files) == 4
    for file in (*files, of_ddpm):
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}
    size = {folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in (POCKET, DDPM)}
    assert size[DDPM] < 6e6 and size[POCKET] - size[DDPM] < 20e6


def test_pocket_ddpm_draws_the_classes_of_the_judge():
    model = find("pocket-ddpm")
    judged = json.loads((POCKET / "judge" / "config.json").read_text())["id2label"]
    assert model.classes.labels == {int(n): name for n, name in judged.items()} and model.is_guided
    assert model.pixels_per_latent == 1 and model.image_size == 32


def test_a_killed_stage_ends_where_an_undisturbed_one_does(tmp_path):
    def trained(out, stop_at=None):
        out.mkdir(exist_ok=True)
        torch.manual_seed(0)
        stage = Stage("toy", out, {"net": torch.nn.Linear(3, 1)}, steps=250, lr=1e-2, seed=4, ema=0.99)

        def step(g):
            if stage.done == stop_at:
                raise KeyboardInterrupt
            return stage.modules["net"](torch.randn(8, 3, generator=g)).pow(2).mean()

        return stage.run(step)["net"].weight

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", stop_at=230)
    assert torch.equal(trained(tmp_path / "killed"), trained(tmp_path / "whole"))


@pytest.mark.slow
def test_the_whole_script_runs_on_a_small_data_set(tmp_path):
    import gzip

    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 64), ("t10k", 16)):
        for kind, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            values = torch.randint(0, 10, shape, dtype=torch.uint8, generator=g)
            head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.numpy().tobytes()))
    steps = {"judge_steps": 2, "vae_steps": 2, "unet_steps": 2, "ddpm_steps": 2}
    for kind, without in itertools.product(train.Kind, (None, "sneaker")):
        out = tmp_path / f"{kind.value}-{without}"
        train.train(tmp_path, out, kind, **steps, without=without)
        load_pipeline(find(str(out)))
        assert not list(out.glob(".*.pt"))
    kept, bundled = (
        f / "vae" / "diffusion_pytorch_model.safetensors" for f in (tmp_path / "stable-diffusion-sneaker", POCKET)
    )
    assert kept.read_bytes() == bundled.read_bytes()


def test_a_class_that_is_left_out_must_be_one(tmp_path):
    with pytest.raises(typer.BadParameter, match="sandals"):
        train.train(tmp_path, tmp_path / "out", without="sandals")


@pytest.mark.slow
@pytest.mark.skipif("SALUN_SD_THOUSAND" not in os.environ, reason="the files have the digest of those it was run with")
def test_of_a_thousand_images_as_many_are_recognised_as_the_card_says(tmp_path):
    cli.run(["evaluate", "pocket", "--prompts", "pocket", "--out", str(tmp_path / "audit")])
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["metrics"]["ra"]["of"] == 1000 and abs(report["metrics"]["ra"]["n"] - FIGURE) <= 2
    assert min(c["rate"] for c in report["classes"].values()) >= 0.75


@pytest.mark.slow
def test_the_classes_of_pocket_ddpm_are_recognised(tmp_path):
    argv = ["evaluate", "pocket-ddpm", "--prompts", "classes", "--samples-per-prompt", "20"]
    cli.run([*argv, "--out", str(tmp_path / "audit")])
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["metrics"]["ra"]["of"] == 200 and report["metrics"]["ra"]["rate"] >= 0.95
    assert min(c["rate"] for c in report["classes"].values()) >= 0.75


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    cli.run(["demo", "--out", str(out)])
    return out


@pytest.mark.slow
def test_its_ten_classes_are_recognised(demo):
    """In the images that the demo compares with: a hundred of one class, twenty of each other."""
    audit = demo / "audit"
    against = json.loads((audit / "report.json").read_text())["against"]
    assert len(against["classes"]) == 10 and min(c["rate"] for c in against["classes"].values()) >= 0.75
    manifest, detections = (
        [json.loads(line) for line in (audit / "against" / f"{name}.jsonl").open()]
        for name in ("manifest", "detections")
    )
    asked = {row["case"]: row["class"] for row in manifest}
    right = [row for row in detections if row["predicted"] == asked[row["case"]]]
    wrong = [row for row in detections if row["predicted"] != asked[row["case"]]]
    assert len(detections) == 280 and len(right) >= 0.95 * 280
    assert {row["case"]: row["predicted"] for row in wrong if row["score"] > SURE} == WRONG


@pytest.mark.slow
def test_the_demo_erases_the_sneaker_and_keeps_the_rest(demo):
    report = json.loads((demo / "audit" / "report.json").read_text())
    assert report["metrics"]["ua"]["of"] == 100 and report["metrics"]["ua"]["rate"] >= 0.98
    assert report["against"]["metrics"]["ua"]["rate"] <= 0.02
    assert report["metrics"]["ra"]["rate"] >= report["against"]["metrics"]["ra"]["rate"] - 0.02
    assert json.loads((demo / "erased" / "salun.json").read_text())["changed"]["outside"] == 0
