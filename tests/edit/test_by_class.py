"""A class of a class-conditional model is masked, erased, patched and brought back as a concept of a text model is."""

import shutil
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from helpers.by_class import LABELS, write_ddpm, write_dit
from helpers.erasures import erasure_by, train
from helpers.forms import all_same, apply, check_a_kill_changes_nothing, files_of, same
from helpers.runs import fails_with, record_of
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from salun_sd.checkpoint import provenance
from salun_sd.checkpoint.find import find
from salun_sd.cli import app as cli
from salun_sd.core.diffusion import Examples, mse, noise_for
from salun_sd.core.mask import kept
from salun_sd.core.saliency import GradientSum
from salun_sd.edit import datasets, maskfile, supports
from salun_sd.edit.checks import images_of
from salun_sd.edit.concepts import Concept
from salun_sd.edit.encodings import LoadedBase, encode
from salun_sd.edit.recipes import recipe_of
from salun_sd.edit.resources import Compute, schedule_of
from salun_sd.edit.retain_prompts import ANCHOR, prompts_to_retain
from salun_sd.methods.salun import SalUn, forget_gradient

KINDS = ["ddpm", "dit"]
WEIGHTS = {"ddpm": "unet/diffusion_pytorch_model.safetensors", "dit": "transformer/diffusion_pytorch_model.safetensors"}
SHORT = ["--samples", "4", "--steps", "2", "--batch-size", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A model of each kind; "bare" has no null class, "colour" three channels."""
    place = tmp_path_factory.mktemp("by-class")
    return {
        "ddpm": write_ddpm(place / "ddpm"),
        "dit": write_dit(place / "dit"),
        "bare": write_ddpm(place / "bare", None, embeddings=3, guidance=1.0),
        "colour": write_ddpm(place / "colour", channels=3),
    }


def erase(model: Path, *options) -> None:
    cli.run(["erase", str(model), *SHORT, *map(str, options)])


# The mask, and what is erased inside it


class Made(NamedTuple):
    """One erasure as a folder and as a patch, with a mask that was made before."""

    kind: str
    base: Path
    mask: Path
    folder: Path
    patch: Path


@pytest.fixture(scope="module", params=KINDS)
def made(request, places, tmp_path_factory):
    out, base = tmp_path_factory.mktemp(f"made-{request.param}"), places[request.param]
    made = Made(request.param, base, out / "m.safetensors", out / "erased", out / "p.safetensors")
    cli.run(["mask", str(base), "--concept", "BAG", "--samples", "4", "--density", "0.3", "--out", str(made.mask)])
    erase(base, "--concept", "Bag", "--anchor", "coat", "--mask", made.mask, "--out", made.folder)
    erase(base, "--concept", "0", "--anchor", "1", "--mask", made.mask, "--format", "patch", "--reversible",
          "--out", made.patch)  # fmt: skip
    return made


def test_the_weights_outside_the_mask_are_the_bases_to_the_last_bit_and_inside_they_moved(made):
    before, after = load_file(made.base / WEIGHTS[made.kind]), load_file(made.folder / WEIGHTS[made.kind])
    mask = maskfile.read(made.mask)
    assert before.keys() == after.keys() == mask.bits.keys() and kept(mask.bits)[0] == round(0.3 * kept(mask.bits)[1])
    assert all(same(after[name][~mask.bits[name]], t[~mask.bits[name]]) for name, t in before.items())
    moved = sum(int((after[name] != t).sum()) for name, t in before.items())
    assert kept(mask.bits)[0] / 2 < moved == record_of(made.folder)["changed"]["inside"]
    of_base, of_folder = files_of(made.base), files_of(made.folder)
    assert of_folder.keys() == of_base.keys() | {"README.md", "salun.json"}
    apart = {WEIGHTS[made.kind], "model_index.json"}
    assert [name for name in of_base.keys() - apart if of_folder[name] != of_base[name]] == []


def test_the_record_and_the_card_name_the_classes_and_no_text_model(made):
    record, card = record_of(made.folder), ModelCard.load(made.folder / "README.md")
    assert [(c["prompt"], c["anchor"]) for c in record["concepts"]] == [("bag", "coat")]
    assert record["images"] == {"forget": 4, "retain": 4}
    settings = maskfile.read(made.mask).settings
    assert settings["guidance"] == 2.0 and settings["concepts"] == ["bag"] and settings["images"] == 4
    assert card.data.pipeline_tag is None and "stable-diffusion" not in card.data.tags
    assert card.data.library_name == "diffusers" and "class-conditional" in card.data.tags
    assert ("UNet" in card.text) == (made.kind == "ddpm") != ("transformer" in card.text)


def test_a_patch_makes_of_its_base_what_erase_makes_and_takes_it_back(made, tmp_path):
    applied = apply(made.base, made.patch, tmp_path / "applied")
    assert (applied / WEIGHTS[made.kind]).read_bytes() == (made.folder / WEIGHTS[made.kind]).read_bytes()
    reverted = apply(made.folder, made.patch, tmp_path / "reverted", "--revert")
    assert find(str(reverted)).fingerprints == find(str(made.base)).fingerprints
    provenance.check(find(str(applied)))


def test_diffusers_opens_the_result_and_finds_the_new_weights(made):
    kind, part = {"ddpm": ("DDPMPipeline", "unet"), "dit": ("DiTPipeline", "transformer")}[made.kind]
    opened = getattr(diffusers, kind).from_pretrained(made.folder, local_files_only=True)
    found = getattr(opened, part).state_dict()
    assert all_same(found, load_file(made.folder / WEIGHTS[made.kind]))
    assert not all_same(found, load_file(made.base / WEIGHTS[made.kind]))


@pytest.mark.parametrize("made", ["ddpm"], indirect=True)
def test_old_names_of_attention_stay_and_mean_the_same_weights(made, tmp_path):
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        for new, word in words.items():
            name = name.replace(f".{new}.", f".{word}.")
        return name

    base = shutil.copytree(made.base, tmp_path / "base")
    tensors = {old(name): t for name, t in load_file(base / WEIGHTS["ddpm"]).items()}
    assert sum("proj_attn" in name for name in tensors) >= 2
    save_file(tensors, base / WEIGHTS["ddpm"], {"format": "pt"})
    assert find(str(base)).fingerprint == find(str(made.base)).fingerprint
    applied = load_file(apply(base, made.patch, tmp_path / "applied") / WEIGHTS["ddpm"])
    wanted = load_file(made.folder / WEIGHTS["ddpm"])
    assert all_same(applied, {old(name): t for name, t in wanted.items()})
    opened = diffusers.DDPMPipeline.from_pretrained(tmp_path / "applied", local_files_only=True)
    assert all_same(opened.unet.state_dict(), wanted)


# The equations


def examples_of(model, which: list[int], seed: int) -> Examples:
    """Random latents of classes, whose prompts are all classes and the null class."""
    side, channels = model.image_size // model.pixels_per_latent, model.unet_settings["in_channels"]
    latents = torch.randn(len(which), channels, side, side, generator=torch.Generator().manual_seed(seed))
    numbers = torch.tensor([*model.classes.labels, model.classes.null])
    return Examples(latents, {"class": numbers}, torch.tensor(which))


def noised(schedule, x0, noise, t) -> torch.Tensor:
    a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    return a**0.5 * x0 + (1 - a) ** 0.5 * noise


def output(unet, x_t, t, numbers) -> torch.Tensor:
    return unet(x_t, t, class_labels=numbers).sample[:, : x_t.shape[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_the_equations(places, kind):
    """Towards class 1 from class 0, and the noise for class 2, before each of three steps."""
    model = find(str(places[kind]))
    unet, schedule = Compute.of(model, None, None).unet(), schedule_of(model)
    forget, retain = examples_of(model, [0] * 4, 1), examples_of(model, [2] * 4, 2)
    anchors = torch.ones(4, dtype=torch.int64)
    erasure = erasure_by(SalUn(), schedule, forget, retain, weight=1.0, steps=3, batch_size=3, anchors=anchors)
    steps = train(unet, erasure)
    for batch in erasure.batches():
        with torch.no_grad():
            x_t = noised(schedule, forget.latents[batch.forget], batch.noise[:3], batch.t[:3])
            x_r = noised(schedule, retain.latents[batch.retain], batch.noise[3:], batch.t[3:])
            ours, theirs = (output(unet, x_t, batch.t[:3], torch.full((3,), number)) for number in (0, 1))
            kept_loss = mse(output(unet, x_r, batch.t[3:], torch.full((3,), 2)), batch.noise[3:]).mean()
        row = next(steps)
        assert row["forget"] == pytest.approx(mse(ours, theirs).mean().item(), rel=1e-3)
        assert row["retain"] == pytest.approx(kept_loss.item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_the_saliency_is_the_gradient_of_the_guided_loss(places, kind, guidance):
    model = find(str(places[kind]))
    unet, schedule, forget = Compute.of(model, None, None).unet(), schedule_of(model), examples_of(model, [0] * 5, 1)
    with GradientSum(unet) as sums:
        list(forget_gradient(unet, schedule, forget, {"class": torch.tensor([model.classes.null])},
                             guidance=guidance, seed=0, batch_size=2))  # fmt: skip
    got = sums.result(5)
    t, noise = noise_for(range(5), forget.latents.shape[1:], 1000, seed=0)
    x_t, unet = noised(schedule, forget.latents, noise, t), unet.requires_grad_(True)
    conditional, without = (output(unet, x_t, t, torch.full((5,), n)) for n in (0, model.classes.null))
    loss = mse((1 + guidance) * conditional - guidance * without, noise).mean()
    names, parameters = zip(*unet.named_parameters(), strict=True)
    least = 1e-5 * max(values.max().item() for values in got.values())
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
        torch.testing.assert_close(got[name], gradient.abs(), rtol=1e-3, atol=least)
    rows = [gradient for name, gradient in got.items() if "class_embed" in name or "embedding_table" in name]
    assert all((rows[0][number] > 0).any() == hit for number, hit in [(0, True), (1, False), (3, guidance > 0)])


@pytest.mark.parametrize(("kind", "given", "wanted"), [
    ("ddpm", None, 2.0), ("dit", None, 2.0), ("ddpm", 0.0, 0.0), ("ddpm", 7.5, 7.5), ("bare", None, 0.0),
    ("bare", 0.0, 0.0), ("pocket", None, 7.5), ("pocket", 1.0, 1.0),
])  # fmt: skip
def test_the_guidance_of_the_saliency_is_the_authors_and_none_without_a_null_class(places, kind, given, wanted):
    model = find(str(places.get(kind, kind)))
    assert supports.saliency_guidance(model, given) == wanted
    assert supports.support_of("salient:0.1", guidance=given).of_model(model).guidance == wanted


# What is retained, forgotten and trained


def test_all_other_classes_are_retained_at_the_models_guidance(places):
    base, concepts = find(str(places["ddpm"])), [Concept("bag", "coat")]
    others = [(label, 3.0) for label in LABELS[1:]]
    assert prompts_to_retain(base, concepts, None, 100) == others == prompts_to_retain(base, concepts, "classes", 100)
    assert prompts_to_retain(base, concepts, None, 1) == others[:1]
    assert prompts_to_retain(base, concepts, ANCHOR, 100) == others[:1]
    assert prompts_to_retain(base, [Concept("bag", "coat", ("boot",))], None, 100) == others[:1]


@pytest.mark.parametrize(("kind", "guidance"), [("ddpm", 7.5), ("bare", 1.0)])
def test_classes_of_a_file_are_drawn_without_guidance_where_there_is_no_null_class(places, tmp_path, kind, guidance):
    file = tmp_path / "others.txt"
    file.write_text("1\n2\n")
    retained = prompts_to_retain(find(str(places[kind])), [Concept("0", "1")], str(file), 100)
    assert retained == [("1", guidance), ("2", guidance)]


@pytest.mark.parametrize(("kind", "size", "values"), [("colour", 8, 192), ("ddpm", 16, 256), ("dit", 8, 64)])
def test_the_papers_recipe_for_classes_is_its_authors_and_what_is_typed_comes_first(places, kind, size, values):
    """Their retain loss is a sum over an image's values; ours is the mean."""
    base = find(str(places[kind]))
    paper, ours = (recipe_of("salun", name, None, {}).of_model(base, size) for name in ("paper", None))
    for recipe in (paper, ours):
        assert [recipe.values[o] for o in ("lr", "steps", "batch_size", "retain_prompts")] == [1e-4, 1000, 128, None]
    assert paper.retain == (pytest.approx(1e-3 * values), "noise") and ours.retain == (10.0, "base")
    typed = {"lr": 2e-4, "steps": 3, "retain_weight": 0.25, "retain_prompts": "anchor"}
    chosen = recipe_of("salun", "paper", None, dict(typed)).of_model(base, size)
    assert chosen.values | typed == chosen.values and chosen.values["batch_size"] == 128
    assert recipe_of("ablation", "paper", None, {}).of_model(base, size) == recipe_of("ablation", "paper", None, {})


def write_images(folder: Path, *, coloured: bool, mode: str) -> Path:
    """Two images, grey or coloured, in files of a mode."""
    folder.mkdir()
    for i in range(2):
        image = Image.fromarray(np.random.RandomState(i).randint(0, 256, (12, 10, 3), dtype=np.uint8))
        (image if coloured else image.convert("L")).convert(mode).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", ["ddpm", "colour"])
def test_images_to_forget_are_grey_or_coloured_files_of_any_size(places, tmp_path, kind):
    """A grey image is the same in a file of either kind. A coloured one is grey to a model that draws grey."""
    model, made = find(str(places[kind])), []
    for coloured, mode in ((False, "L"), (False, "RGB"), (True, "RGB")):
        items = images_of(str(write_images(tmp_path / f"{coloured}-{mode}", coloured=coloured, mode=mode)), "bag")
        examples, row = encode(LoadedBase(model, 8), datasets.captioned(items, "bag"), [""])
        assert examples.latents.shape == (2, model.unet_settings["in_channels"], 8, 8)
        assert examples.prompts["class"][row["bag"]] == 0 and examples.prompts["class"][row[""]] == 3
        made.append(examples.latents)
    apart = (made[1] - made[2]).abs().max()
    assert torch.equal(made[0], made[1]) and (apart > 0.2 if kind == "colour" else apart < 0.05)


@pytest.mark.parametrize(("kind", "options"), [
    ("bare", "--anchor 1"),  # a mask without guidance, first
    ("ddpm", "--method esd --mask none --retain-prompts classes --retain-weight 1"),
    ("dit", "--method ablation --mask salient:0.2 --anchor 1 --dtype bfloat16"),
    ("bare", "--method erasediff --mask random:0.5 --anchor 1"),
    ("bare", "--method ascent --mask none"),  # the probe has no goal
])  # fmt: skip
def test_methods_and_supports_work_on_classes(places, tmp_path, kind, options):
    erase(places[kind], "--concept", "0", *options.split(), "--sample-every", "2", "--out", tmp_path / "out")
    record = record_of(tmp_path / "out")
    assert record["changed"]["outside"] == 0 < record["changed"]["inside"]
    assert record["settings"]["guidance"] == (0.0 if options == "--anchor 1" else 2.0 if "salient" in options else None)
    assert [p.name for p in (tmp_path / "out.run" / "samples").iterdir()] == ["step-00000.png", "step-00002.png"]


REFUSED = {  # a command line, and what the refusal names
    "one class": ("erase {ddpm} --concept Bag --anchor 0", "bag {ddpm}"),
    "one class twice": ("erase {ddpm} --concept boot --anchor 0 --concept 2 --anchor 1", "boot {ddpm}"),
    "an anchor that is erased": ("erase {ddpm} --concept bag --anchor boot --concept 2 --anchor 1", "boot {ddpm}"),
    "an unknown class": ("mask {ddpm} --concept coats", "'coats' 'it has coat, bag'"),
    "an unknown anchor": ("erase {dit} --concept bag --anchor 3", "'3' {dit} bag"),
    "an unknown class without labels": ("mask {bare} --concept bag", "'bag' '0, 1, 2'"),
    "a text to retain": ("erase {ddpm} --concept bag --anchor coat --retain-prompts {texts}", "'a photo of a coat'"),
    "the concept to retain": ("erase {ddpm} --concept bag --anchor coat --retain-prompts {itself}", "'BAG' {ddpm}"),
    "a caption": ("mask {ddpm} --concept bag --forget {captioned}", "'a photo of a bag' coat"),
    "nothing to retain": ("erase {bare} --method ascent --concept 0 --concept 1 --concept 2 --retain-weight 1",
                          "'--retain-weight 0'"),
    "a single file": ("erase {ddpm} --concept bag --anchor coat --mask none --format single-file --out {saved}",
                      "{ddpm} --format"),
    "uce": ("erase {ddpm} --method uce --concept bag --anchor coat", "uce {ddpm} salun"),
    "forget-me-not": ("erase {dit} --method forget-me-not --concept bag", "forget-me-not {dit} salun"),
    "esd without a null class": ("erase {bare} --method esd --mask none --concept 0", "esd {bare} null salun"),
    "no cross-attention": ("erase {ddpm} --method esd --concept bag", "cross-attention --mask salient:0.5"),
    "a guided mask": ("mask {bare} --concept 0 --saliency-guidance 2", "--saliency-guidance {bare} null"),
    "a guided erasure": ("erase {bare} --concept 0 --anchor 1 --saliency-guidance 7", "--saliency-guidance 7 null"),
    "guidance that no mask has": ("erase {ddpm} --concept 0 --anchor 1 --mask none --saliency-guidance 2",
                                  "--saliency-guidance none"),
    "a size": ("mask {dit} --concept bag --size 6", "--size 4"),
    "classes of a text model": ("erase {tiny} --concept 'a bag' --anchor 'a coat' --retain-prompts classes",
                                "classes {tiny}"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(places, tiny, tmp_path, tmp_path_factory, line, named,
                                                              capsys):  # fmt: skip
    given = tmp_path_factory.mktemp("given")
    (given / "texts.txt").write_text("coat\na photo of a coat\n")
    (given / "itself.txt").write_text("coat\nBAG\n")
    captioned = write_images(given / "captioned", coloured=False, mode="L")
    (captioned / "0.txt").write_text("a photo of a bag")
    files = {"texts": given / "texts.txt", "itself": given / "itself.txt", "captioned": captioned}
    out = {"out": tmp_path / "out", "saved": tmp_path / "out.safetensors"}
    line += "" if "--out" in line else " --out {saved}" if line.startswith("mask") else " --out {out}"
    if line.startswith("erase") and "uce" not in line:
        line += " --samples 2 --steps 2"  # one that is not refused soon ends
    fails_with(line, places | files | out | {"tiny": tiny}, 2, named, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_patch_is_not_applied_as_a_single_file(made, tmp_path, capsys):
    line = "apply {base} {patch} --format single-file --out {saved}"
    saved = {"saved": tmp_path / "out.safetensors"}
    fails_with(line, made._asdict() | saved, 2, "{base} --format", capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_erasure_of_a_class_goes_on_and_ends_with_the_same_bytes(places, tmp_path, monkeypatch):
    options = "--samples 4 --batch-size 2 --steps 30 --lr 1e-3"
    argv = ["erase", str(places["ddpm"]), "--concept", "bag", "--anchor", "coat", *options.split()]
    check_a_kill_changes_nothing(argv, tmp_path, monkeypatch)
