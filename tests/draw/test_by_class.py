"""Images of a class: as diffusers' own pipeline draws them, or the loop written out where it has none for classes."""

import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, PNDMScheduler
from helpers.by_class import LABELS, change, write_ddpm, write_dit
from PIL import Image

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.core.diffusion import predict
from salun_sd.draw import generate, prompts, sample
from salun_sd.draw.encode import encode_image, encode_prompts, pixels, reader
from salun_sd.draw.prompts import Prompt
from salun_sd.draw.sample import Row, Sampler
from salun_sd.errors import UsageError

IMAGENET = [f"thing {n}" for n in range(1000)]  # diffusers' pipeline takes 1000 for the null class of any model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind of model; "bare" has no null class."""
    place = tmp_path_factory.mktemp("by-class")
    return {
        "ddpm": str(write_ddpm(place / "ddpm")),
        "colour": str(write_ddpm(place / "colour", channels=3)),
        "bare": str(write_ddpm(place / "bare", None, embeddings=3, guidance=1.0)),
        "dit": str(write_dit(place / "dit", IMAGENET)),
    }


@pytest.fixture(scope="module")
def pipelines(folders):
    return {kind: load_pipeline(find(folder)) for kind, folder in folders.items()}


def rows_of(pipeline, guidance: float) -> list[Row]:
    texts = [pipeline.classes.text(n) for n in (2, 0, 1)]
    return [Row(text, 7 + i, guidance, (8, 8)) for i, text in enumerate(texts)]


def levels(some, others) -> int:
    """The largest difference between images, in 8-bit steps."""
    return max(int(np.abs(np.int16(a) - np.int16(b)).max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", ["ddpm", "dit"])
def test_a_prediction_is_the_modules_own_without_the_variances(pipelines, kind):
    unet, g = pipelines[kind].unet, torch.Generator().manual_seed(0)
    x, t = torch.randn((3, unet.config.in_channels, 4, 4), generator=g), torch.tensor([5, 300, 999])
    classes = encode_prompts(pipelines[kind], ["0", "", "2"])
    wanted = unet(x, t, class_labels=torch.tensor([0, pipelines[kind].classes.null, 2])).sample
    assert wanted.shape[1] == {"ddpm": 1, "dit": 8}[kind]
    assert torch.equal(predict(unet, x, t, classes), wanted[:, : x.shape[1]])
    assert torch.equal(predict(unet, x, t[1], classes)[1], predict(unet, x, t[[1, 1, 1]], classes)[1])  # one for all


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_transformer_draws_what_diffusers_pipeline_draws(folders, pipelines, guidance):
    rows = rows_of(pipelines["dit"], guidance)
    theirs = DiTPipeline.from_pretrained(folders["dit"], local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        theirs.get_label_ids([row.text for row in rows]), guidance_scale=guidance, num_inference_steps=4,
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
    ).images  # fmt: skip
    images = Sampler(pipelines["dit"], 4).draw(rows, len(rows))
    assert levels(images, wanted) <= 1
    assert levels(images[:1], images[1:2]) > 10


@pytest.mark.parametrize(("kind", "guidance"), [("ddpm", 3.0), ("ddpm", 1.0), ("colour", 3.0), ("bare", 1.0)])
@torch.no_grad()
def test_pixels_are_those_of_the_loop_written_out(pipelines, kind, guidance):
    pipeline, rows = pipelines[kind], rows_of(pipelines[kind], guidance)
    unet, scheduler, numbers = pipeline.unet, deepcopy(pipeline.scheduler), torch.tensor([2, 0, 1])
    shape = 1, unet.config.in_channels, 8, 8
    x = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(row.seed)) for row in rows])
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        noise = unet(x, t, class_labels=numbers).sample
        if guidance > 1:
            without = unet(x, t, class_labels=torch.full((3,), 3)).sample  # behind the three classes
            noise = without + guidance * (noise - without)
        x = scheduler.step(noise, t, x, eta=0.0).prev_sample
    wanted = [np.uint8(((image + 1) / 2).clamp(0, 1).mul(255).round().permute(1, 2, 0).squeeze(2)) for image in x]
    images = Sampler(pipeline, 4).draw(rows, len(rows))
    assert levels(images, wanted) <= 1 and images[0].mode == ("RGB" if kind == "colour" else "L")
    assert levels(images[:1], images[1:2]) > 10


@pytest.mark.parametrize("kind", ["ddpm", "colour", "dit"])
def test_images_of_several_guidances_in_a_pass_are_each_as_by_itself(pipelines, kind):
    rows = [row._replace(guidance=g) for row, g in zip(rows_of(pipelines[kind], 2.0), (1.5, 4.0, 9.0), strict=True)]
    sampler = Sampler(pipelines[kind], 3)
    assert levels(sampler.draw(rows), [sampler.draw([row], 1)[0] for row in rows]) <= 1


def test_an_image_is_grey_or_coloured_as_the_model_draws_it(pipelines):
    g = torch.Generator().manual_seed(0)
    colour = Image.fromarray(torch.randint(256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy())
    grey = colour.convert("L")

    def encoded(kind, image):
        return encode_image(pipelines[kind], pixels(image.convert("RGB"), 8)[0])

    luma = torch.from_numpy(np.array(grey)).float() / 127.5 - 1
    torch.testing.assert_close(encoded("ddpm", colour), luma[None], atol=1 / 127, rtol=0)  # Pillow rounds its luma
    torch.testing.assert_close(encoded("ddpm", grey), luma[None], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded("colour", grey), luma.expand(3, 8, 8), atol=1e-5, rtol=0)
    assert torch.equal(encoded("colour", colour), pixels(colour, 8)[0])
    assert encoded("dit", colour).shape == (4, 4, 4)


def test_two_texts_of_one_class_are_one_to_the_model(folders):
    reads = reader(find(folders["ddpm"]))
    assert reads("Boot") == reads("2") == reads("ankle boot, boot") != reads("coat") and reads("") != reads("bag")
    with pytest.raises(UsageError, match="trouser"):
        reads("trouser")


@pytest.mark.parametrize(("kind", "guidance"), [("ddpm", 3.0), ("bare", 1.0)])
def test_the_set_of_all_classes_has_each_once_by_its_number_at_the_models_guidance(folders, kind, guidance):
    model = find(folders[kind])
    rows = prompts.read("classes", model=model)
    labels = list(LABELS) if kind == "ddpm" else ["0", "1", "2"]
    assert [(p.case, p.text, p.label, p.guidance) for p in rows] == [(n, c, c, guidance) for n, c in enumerate(labels)]
    assert len({p.seed for p in rows}) == 3 and rows == prompts.read("classes", model=model)
    assert prompts.read("classes", ["class=2"] if kind == "bare" else ["class~boot"], model=model) == rows[2:]
    assert prompts.read("classes", limit=2, model=model) == rows[:2]
    generate.check(model, rows, scheduler=None, steps=None)


def test_classes_with_one_label_are_drawn_by_number(folders, tmp_path):
    folder = shutil.copytree(folders["ddpm"], tmp_path / "model")
    change(folder / "model_index.json", id2label={"0": "crane", "1": "bag", "2": "Crane"})
    rows = prompts.read("classes", model=find(str(folder)))
    assert [(p.case, p.label) for p in rows] == [(0, "0"), (1, "bag"), (2, "2")]


def test_the_set_of_all_classes_needs_a_model_that_has_some(tiny):
    assert "classes" in prompts.builtin()
    for model in (None, find(tiny)):
        with pytest.raises(UsageError, match="set classes") as e:
            prompts.read("classes", model=model)
        assert model is None or tiny in str(e.value)


@pytest.mark.parametrize(("kind", "prompt", "named"), [
    ("bare", Prompt(4, "1", 0, 7.5), "Case 4.*7.5.*--guidance 1"),
    ("ddpm", Prompt(4, "a photo of a bag", 0, 1.0), "a photo of a bag.*bag"),
    ("dit", Prompt(4, "1000", 0, 1.0), "1000"),
    ("ddpm", Prompt(4, "bag", 0, 1.0, size=(8, 7)), "Case 4.*8 x 7.*multiples of 2.*--size 8"),
    ("dit", Prompt(4, "1", 0, 1.0, size=(6, 6)), "Case 4.*6 x 6.*multiples of 4.*--size 8"),
    ("dit", Prompt(4, "1", 0, 1.0, size=(16, 8)), "Case 4.*16 x 8.*squares.*--size 8"),
])  # fmt: skip
def test_what_a_model_cannot_draw_is_refused_before_it_is_loaded(folders, kind, prompt, named):
    with pytest.raises(UsageError, match=named):
        generate.check(find(folders[kind]), [prompt], scheduler=None, steps=None)


@pytest.mark.parametrize(("kind", "size"), [("ddpm", (10, 6)), ("dit", (12, 12))])
def test_what_passes_the_check_is_drawn_at_another_size(folders, pipelines, kind, size):
    generate.check(find(folders[kind]), [Prompt(4, "1", 0, 1.0, size=size)], scheduler=None, steps=None)
    [image] = Sampler(pipelines[kind], 2).draw([Row("1", 0, 1.0, size)], 1)
    assert image.size == size


@pytest.mark.parametrize(("own", "clips"), [
    (DDPMScheduler(clip_sample=True), True), (DDPMScheduler(clip_sample=False), False), (PNDMScheduler(), False),
])  # fmt: skip
def test_another_scheduler_clips_where_the_models_own_does(own, clips):
    """And draws no noise in a step, whatever the own one does."""
    assert sample.new_scheduler(own, "DDIMScheduler").config.clip_sample == clips
    own.register_to_config(algorithm_type="sde-dpmsolver++")
    assert sample.new_scheduler(own, "DPMSolverMultistepScheduler").config.algorithm_type == "dpmsolver++"
