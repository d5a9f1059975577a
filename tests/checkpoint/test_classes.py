"""Class-conditional checkpoints: their classes by name and number, and the folders that are none."""

import shutil

import pytest
from diffusers import DiTPipeline
from helpers.by_class import LABELS, change, write_ddpm, write_dit
from helpers.models import write_pipeline

from salun_sd.checkpoint import load
from salun_sd.checkpoint.classes import NONE, Classes
from salun_sd.checkpoint.find import find
from salun_sd.errors import SalunError, UsageError

IMAGENET = ["tench, Tinca tinca", "Cardigan, Cardigan Welsh corgi", "crane", "cardigan", "maillot", "crane",
            "maillot, tank suit"]  # fmt: skip


def classes_of(labels: list[str], embeddings: int | None = None) -> Classes:
    return Classes.of(embeddings or len(labels) + 1, dict(enumerate(labels)), "the model")


# Names and numbers


@pytest.mark.parametrize(("text", "number"), [
    ("tench, Tinca tinca", 0), ("TENCH", 0), (" tinca   Tinca ", 0), ("0", 0), ("Cardigan Welsh corgi", 1),
    ("cardigan", 3),  # the whole label of one, and a name of another
    ("maillot", 4), ("tank suit", 6), ("maillot,  tank SUIT", 6), ("5", 5), ("", 7),
])  # fmt: skip
def test_a_class_goes_by_each_of_its_names_in_any_case_and_by_its_number(text, number):
    assert classes_of(IMAGENET).number(text) == number


@pytest.mark.parametrize("text", ["7", "-1", "1.0", "¹", "tench Tinca", "tank", ",", " "])
def test_what_names_no_class_is_refused_by_name(text):
    with pytest.raises(UsageError) as e:
        classes_of(IMAGENET).number(text)
    assert repr(text) in str(e.value) and "the model" in str(e.value)


def test_a_label_of_two_classes_is_refused_with_their_numbers():
    with pytest.raises(UsageError, match="'Crane'.* 2, 5"):
        classes_of(IMAGENET).number("Crane")


@pytest.mark.parametrize("labels", [
    IMAGENET, ["a", "A "], ["a, b", "b", "a"], ["", "b", "  "], [str(n) for n in range(10)],
    [str(n) for n in range(1, 11)], ["1", "2", "0"],
])  # fmt: skip
def test_every_class_has_a_text_that_names_it_alone(labels):
    classes = classes_of(labels)
    texts = [classes.text(n) for n in classes.labels]
    assert [classes.number(text) for text in texts] == list(range(len(labels))) and all(texts)
    assert [classes.label(text) for text in texts] == texts


def test_an_unknown_class_is_answered_with_some_classes_the_near_ones_first():
    many = classes_of([f"thing {n}" for n in range(900)] + ["sneaker", "ankle boot, boot"])
    with pytest.raises(UsageError) as e:
        many.number("sneeker")
    said = str(e.value)
    assert 0 < said.find("sneaker") < said.find("thing 0") and "thing 100" not in said and len(said) < 300
    with pytest.raises(UsageError) as e:
        many.number("ankle-boot")
    assert 0 < str(e.value).find("ankle boot, boot") < str(e.value).find("thing 0")


def test_classes_without_labels_are_numbers_and_have_no_null_class():
    classes = Classes.of(3, None, "the model")
    assert classes.labels == {0: "0", 1: "1", 2: "2"} and not classes.has_null and classes.number("") == NONE
    assert classes.label("2") == "2"


def test_the_null_class_is_the_last_embedding_where_all_others_have_a_label():
    assert classes_of(["a", "b"]).null == 2 and classes_of(["a", "b"]).has_null
    for some in ({0: "a"}, {1: "b", 2: "c"}, {0: "a", 1: "b", 2: "c"}):
        classes = Classes.of(3, some, "the model")
        assert classes.null == NONE and len(classes.labels) == 3
    given = Classes.of(3, None, "the model", null=2)
    assert given.null == 2 and list(given.labels) == [0, 1]


@pytest.mark.parametrize(("embeddings", "null", "odd"), [(2, None, 2), (3, 2, 2)])
def test_labels_of_another_model_are_refused(embeddings, null, odd):
    with pytest.raises(UsageError, match=f"the model.* {odd}\\b"):
        Classes.of(embeddings, {0: "a", 1: "b", 2: "c"}, "the model", null=null)


# Folders


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    return write_ddpm(tmp_path_factory.mktemp("ddpm") / "model")


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return write_dit(tmp_path_factory.mktemp("dit") / "model")


@pytest.fixture
def copies(ddpm, dit, tmp_path):
    return {"ddpm": shutil.copytree(ddpm, tmp_path / "ddpm"), "dit": shutil.copytree(dit, tmp_path / "dit")}


def test_a_folder_says_what_it_draws(ddpm, dit, tmp_path):
    pixels, latents = find(str(ddpm)), find(str(dit))
    assert (pixels.denoiser, latents.denoiser) == ("unet", "transformer")
    assert (pixels.classes.labels, pixels.classes.null) == (latents.classes.labels, latents.classes.null)
    assert (pixels.classes.labels, pixels.classes.null) == (dict(enumerate(LABELS)), 3)
    assert (pixels.pixels_per_latent, pixels.image_size, pixels.size_multiple) == (1, 8, 2)
    assert (latents.pixels_per_latent, latents.image_size, latents.size_multiple) == (2, 8, 4)
    assert pixels.vae_settings is None and latents.vae_settings["latent_channels"] == 4
    for model in (pixels, latents):
        assert "3 classes" in model.describe() and "8 x 8" in model.describe() and model.is_guided
        assert model.fingerprints.keys() == set(model.family.parts) and model.fingerprints[model.denoiser]


@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline"])
def test_the_settings_to_draw_with_are_the_familys_and_without_a_null_class_there_is_no_guidance(
    copies, pipeline, tmp_path
):
    for folder in (*copies.values(), write_ddpm(tmp_path / "bare", None, embeddings=3)):
        (folder / "sampling.json").unlink()
    change(copies["ddpm"] / "model_index.json", _class_name=pipeline)
    assert find(str(copies["ddpm"])).sampling == (100, 3.0) and find(str(copies["dit"])).sampling == (50, 4.0)
    assert find(str(tmp_path / "bare")).sampling == (100, 1.0) and not find(str(tmp_path / "bare")).is_guided


def test_a_guidance_to_draw_with_is_refused_where_there_is_no_null_class(tmp_path):
    folder = write_ddpm(tmp_path / "bare", None, embeddings=3, guidance=1.0)
    assert find(str(folder)).sampling == (2, 1.0)
    change(folder / "sampling.json", guidance=3.0)
    with pytest.raises(UsageError, match="sampling.json.*null class"):
        find(str(folder)).sampling  # noqa: B018


UNET, TRANSFORMER, VAE, INDEX = "unet/config.json", "transformer/config.json", "vae/config.json", "model_index.json"
REFUSED = {  # of which folder, what is changed, and what the refusal names
    "draws no classes": ("ddpm", UNET, {"num_class_embeds": None}, "num_class_embeds"),
    "embeds times": ("ddpm", UNET, {"class_embed_type": "timestep"}, "draws no classes"),
    "a UNet for texts": ("ddpm", UNET, {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 8},
                         "UNet2DConditionModel UNet2DModel"),
    "another UNet": ("ddpm", UNET, {"_class_name": "UNet1DModel"}, "UNet1DModel"),
    "other outputs": ("ddpm", UNET, {"out_channels": 2}, "unet 2 1"),
    "neither grey nor coloured": ("ddpm", UNET, {"in_channels": 4, "out_channels": 4}, "4 channels"),
    "no number of a class": ("ddpm", INDEX, {"id2label": {"one": "bag"}}, "model_index.json one"),
    "a class too many": ("ddpm", INDEX, {"id2label": dict.fromkeys("01239", "bag")}, "id2label 9"),
    "a number for a label": ("ddpm", INDEX, {"id2label": {"0": 1}}, "model_index.json id2label"),
    "a VAE of other channels": ("dit", VAE, {"latent_channels": 8}, "transformer 4 vae 8"),
    "other outputs of a transformer": ("dit", TRANSFORMER, {"out_channels": 6}, "transformer 6 4"),
    "another transformer": ("dit", TRANSFORMER, {"_class_name": "SanaTransformer2DModel"}, "SanaTransformer2DModel"),
    "another norm": ("dit", TRANSFORMER, {"norm_type": "ada_norm_single"}, "transformer/config.json ada_norm_single"),
    "no classes of a transformer": ("dit", TRANSFORMER, {"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
    "the null class as a label": ("dit", INDEX, {"id2label": {"3": "none"}}, "id2label 3"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "values", "named"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_draws_no_classes_or_whose_parts_do_not_fit_is_refused(copies, kind, file, values, named):
    change(copies[kind] / file, **values)
    with pytest.raises(UsageError) as e:
        model = find(str(copies[kind]))
        model.skeleton(model.denoiser)
        model.classes  # noqa: B018
    missing = [word for word in [str(copies[kind]), *named.split()] if word not in str(e.value)]
    assert not missing, f"{missing} not in: {e.value}"


def test_a_unet_that_draws_classes_is_none_of_stable_diffusion(ddpm, tmp_path):
    folder = write_pipeline(tmp_path / "sd1", "sd1")
    shutil.rmtree(folder / "unet")
    shutil.copytree(ddpm / "unet", folder / "unet")
    with pytest.raises(UsageError, match="StableDiffusionPipeline .*UNet2DModel"):
        find(str(folder))


def test_the_embeddings_on_disk_have_to_be_those_of_the_config(copies):
    change(copies["ddpm"] / UNET, num_class_embeds=9)
    model = find(str(copies["ddpm"]))
    with pytest.raises(SalunError, match="class_embedding.weight"):
        load.check(model)


def test_a_transformer_goes_by_its_old_name_too(copies):
    """As DiT-XL/2 was published, before diffusers gave it a class of its own; it still opens both."""
    new = find(str(copies["dit"]))
    change(copies["dit"] / TRANSFORMER, _class_name="Transformer2DModel", cross_attention_dim=None, attention_bias=True)
    change(copies["dit"] / INDEX, transformer=["diffusers", "Transformer2DModel"])
    old = find(str(copies["dit"]))
    assert type(old.skeleton("transformer")) is type(new.skeleton("transformer"))
    assert old.fingerprint == new.fingerprint
    opened = DiTPipeline.from_pretrained(copies["dit"], local_files_only=True)
    assert type(opened.transformer) is type(new.skeleton("transformer"))
