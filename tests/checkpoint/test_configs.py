"""Configs and tokenizers that are damaged, swapped or hostile: a sentence that names file and key, and no code runs."""

import json
import shutil
import sys

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, LCMScheduler
from helpers import models

from salun_sd.checkpoint import load
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import alphas_cumprod, load_pipeline, scheduler_class
from salun_sd.draw import generate
from salun_sd.errors import SalunError, UsageError

GONE = object()


@pytest.fixture(scope="module")
def tiny_sd1(tmp_path_factory):
    return models.write_pipeline(tmp_path_factory.mktemp("tiny") / "sd1", "sd1")


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory):
    return models.write_pipeline(tmp_path_factory.mktemp("tiny") / "sdxl", "sdxl")


@pytest.fixture
def folder(tiny_sd1, tmp_path):
    """A pipeline that a test may break."""
    return shutil.copytree(tiny_sd1, tmp_path / "model")


def change(file, **values):
    settings = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not GONE}))


def opened(folder):
    """All that a command looks at before it draws."""
    model = find(str(folder))
    model.describe()
    generate.check(model, [], scheduler=None, steps=None)
    return model


def refused(folder, *named) -> str:
    with pytest.raises(SalunError) as e:
        opened(folder)
    assert all(word in str(e.value) for word in named), str(e.value)
    assert "\n" not in str(e.value)
    return str(e.value)


CONFIG = {"unet": "unet/config.json", "vae": "vae/config.json", "text": "text_encoder/config.json",
          "noise": "scheduler/scheduler_config.json", "words": "tokenizer/tokenizer_config.json"}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "block_out_channels", GONE), ("unet", "block_out_channels", []), ("unet", "block_out_channels", "x"),
        ("unet", "block_out_channels", [16, 64]), ("unet", "block_out_channels", [16] * 101),
        ("unet", "block_out_channels", [10**9, 32]), ("unet", "in_channels", "4"), ("unet", "in_channels", GONE),
        ("unet", "out_channels", 8), ("unet", "sample_size", "8"), ("unet", "sample_size", 0),
        ("unet", "sample_size", 10**6), ("unet", "sample_size", []),
        ("unet", "cross_attention_dim", GONE), ("unet", "cross_attention_dim", [32]),
        ("unet", "cross_attention_dim", 64), ("unet", "layers_per_block", 10**9), ("unet", "norm_eps", "small"),
        ("unet", "norm_eps", None), ("unet", "norm_eps", float("nan")), ("unet", "norm_num_groups", 0),
        ("unet", "act_fn", "no_such"), ("unet", "down_block_types", ["Evil", "DownBlock2D"]),
        ("unet", "attention_head_dim", GONE), ("unet", "attention_head_dim", 5), ("unet", "flip_sin_to_cos", "yes"),
        ("unet", "_class_name", "UNet3DConditionModel"), ("unet", "time_cond_proj_dim", 256),
        ("unet", "norm_num_groups", -1), ("unet", "downsample_padding", None), ("unet", "freq_shift", None),
        ("vae", "up_block_types", []), ("text", "eos_token_id", None), ("words", "pad_token", None),
        ("unet", "addition_embed_type", "text_time"), ("unet", "class_embed_type", "timestep"),
        ("vae", "block_out_channels", GONE), ("vae", "block_out_channels", {}), ("vae", "scaling_factor", "0.18"),
        ("vae", "scaling_factor", 0), ("vae", "latent_channels", 16), ("vae", "_class_name", "AutoencoderTiny"),
        ("vae", "norm_num_groups", 5),
        ("text", "hidden_size", GONE), ("text", "hidden_size", 33), ("text", "vocab_size", 10),
        ("text", "vocab_size", 10**9),
        ("text", "hidden_act", "no_such"), ("text", "num_attention_heads", 0), ("text", "num_attention_heads", GONE),
        ("text", "num_hidden_layers", 10**9), ("text", "model_type", "bert"), ("text", "layer_norm_eps", []),
        ("noise", "_class_name", GONE), ("noise", "_class_name", 5), ("noise", "beta_start", GONE),
        ("noise", "beta_schedule", GONE), ("noise", "beta_schedule", "no_such"), ("noise", "beta_end", "0.1"),
        ("noise", "beta_end", 5.0), ("noise", "beta_start", float("nan")), ("noise", "num_train_timesteps", 10**12),
        ("noise", "num_train_timesteps", 0), ("noise", "num_train_timesteps", "1000"),
        ("noise", "prediction_type", "sample"), ("noise", "prediction_type", 1), ("noise", "trained_betas", [0.1, 0.2]),
        ("noise", "steps_offset", "1"),
        ("words", "model_max_length", "24"), ("words", "model_max_length", 0),
        ("words", "tokenizer_class", "BertTokenizer"),
        ("words", "eos_token", "no such"), ("words", "pad_token", 5), ("words", "added_tokens_decoder", {"9": 5}),
    ],
)  # fmt: skip
def test_a_config_that_is_damaged_or_of_another_model_is_named(folder, part, key, value):
    change(folder / CONFIG[part], **{key: value})
    words = refused(folder, str(folder)).replace("prediction type", "prediction_type")
    places = {"text": ["text_encoder", "cross_attention_dim"], "words": ["tokenizer"], "noise": ["PNDMScheduler"]}
    assert any(word in words for word in (key, CONFIG[part], *places.get(part, ()))), words


@pytest.mark.parametrize("file", ["model_index.json", *CONFIG.values(), "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b'{"_class_name": "\\ud800"}', b"[" * 100_000 + b"]" * 100_000],
    ids=["empty", "list", "null", "cut", "not UTF-8", "half a letter", "deep"],
)
def test_a_file_that_is_no_json_object_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    refused(folder, file.split("/")[0])


@pytest.mark.parametrize("file", [*CONFIG.values(), "tokenizer/tokenizer.json"])
def test_a_file_that_is_missing_is_named(folder, file):
    (folder / file).unlink()
    refused(folder, file.split("/")[0])


@pytest.mark.parametrize("file", ["model_index.json", CONFIG["vae"], CONFIG["noise"], "sampling.json"])
def test_a_link_whose_target_is_gone_is_said(folder, file):
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(folder / "blobs" / "0123")
    refused(folder, file, "link", "0123")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"steps": 2}', '{"steps": "2", "guidance": 3}', '{"steps": 0, "guidance": 3}',
             '{"steps": 2, "guidance": NaN}', '{"steps": 2, "guidance": -1}', '{"steps": 1001, "guidance": 3}'],
)  # fmt: skip
def test_settings_to_draw_with_that_are_damaged_are_refused(folder, text):
    (folder / "sampling.json").write_text(text)
    refused(folder, "1001" if "1001" in text else "sampling.json")


@pytest.mark.parametrize(
    "shards",
    [None, [], {}, *({"weight_map": value} for value in ([], {"a": 1}, {"a": "../../b.safetensors"}, {"a": ""}))],
)
def test_an_index_of_shards_that_is_damaged_is_named(folder, shards):
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards))
    refused(folder, "unet/diffusion_pytorch_model.safetensors.index.json")


@pytest.mark.parametrize(("size", "pixels"), [(8, 32), ([8, 8], 32), ([6, 8], 24), (None, 32), (GONE, 32)])
def test_a_sample_size_is_one_side_or_two_or_the_vaes(folder, size, pixels):
    change(folder / CONFIG["unet"], sample_size=size)
    assert opened(folder).image_size == pixels
    change(folder / CONFIG["vae"], sample_size=[40, 32])
    assert opened(folder).image_size == pixels


def test_a_size_that_no_config_has_is_asked_for(folder):
    for part in ("unet", "vae"):
        change(folder / CONFIG[part], sample_size=GONE)
    refused(folder, "unet", "sample_size")


def test_sdxl_has_a_scaling_factor_of_its_own(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    opened(folder)
    for part, key in (("vae", "scaling_factor"), ("unet", "projection_class_embeddings_input_dim")):
        kept = (folder / CONFIG[part]).read_text()
        change(folder / CONFIG[part], **{key: GONE})
        refused(folder, part, key)
        (folder / CONFIG[part]).write_text(kept)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_is_loaded_is_what_diffusers_loads(family, tmp_path):
    folder = models.write_pipeline(tmp_path / "model", family, dtype=torch.float16)
    ours, theirs = load_pipeline(find(str(folder))), diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.to(torch.float32)
    for part in find(str(folder)).family.parts:
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    for a, b in zip(ours.encode_prompt("a bag", **how), theirs.encode_prompt("a bag", **how), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert ours.scheduler.config == theirs.scheduler.config


def test_no_name_in_a_file_makes_code_run(folder, monkeypatch):
    """diffusers would import the module that model_index.json names."""
    (folder / "evil_of_model.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nE = 1\n")
    monkeypatch.syspath_prepend(str(folder))
    evil = ["evil_of_model", "E"]
    change(
        folder / "model_index.json",
        unet=evil,
        scheduler=evil,
        tokenizer=evil,
        vae=evil,
        custom_pipeline="evil_of_model",
    )
    auto = {"AutoModel": "evil_of_model.E", "AutoTokenizer": ["evil_of_model.E", None]}
    change(folder / CONFIG["text"], auto_map=auto, _attn_implementation="someone/kernel", architectures=["E"])
    change(folder / CONFIG["words"], auto_map=auto)
    load_pipeline(opened(folder))
    assert not (folder / "ran").exists() and "evil_of_model" not in sys.modules


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "SchedulerMixin.__init__", "KarrasDiffusionSchedulers", "scheduling_ddim", "os",
             "__doc__", "deprecated", "", "é", "no such"],
)  # fmt: skip
def test_only_a_scheduler_of_diffusers_is_one(folder, name):
    with pytest.raises(UsageError):
        scheduler_class(name)
    change(folder / CONFIG["noise"], _class_name=name)
    refused(folder, name, "--scheduler ddim")


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerDiscreteScheduler, LCMScheduler])
@pytest.mark.parametrize("zero", [False, True])
def test_the_noise_is_that_of_diffusers_scheduler(folder, kind, zero):
    made = kind.from_config(json.loads((folder / CONFIG["noise"]).read_text()) | {"rescale_betas_zero_snr": zero})
    made.save_config(folder / "scheduler")
    torch.testing.assert_close(alphas_cumprod(find(str(folder))), made.alphas_cumprod, atol=1e-7, rtol=0)


def as_two_files(tokenizer):
    """The vocabulary as vocab.json and merges.txt."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    return lines


def test_a_vocabulary_in_two_files_reads_as_that_in_one(folder):
    before = load.load_tokenizers(opened(folder))["tokenizer"]("a photo of a sneaker").input_ids
    as_two_files(folder / "tokenizer")
    assert load.load_tokenizers(opened(folder))["tokenizer"]("a photo of a sneaker").input_ids == before


@pytest.mark.parametrize(
    "damage", ["no merges", "half the merges", "foreign merges", "a larger vocabulary", "ids as text"]
)
def test_a_vocabulary_that_lost_its_merges_or_is_of_another_model_is_refused(folder, damage):
    tokenizer = folder / "tokenizer"
    lines, vocabulary = as_two_files(tokenizer), json.loads((tokenizer / "vocab.json").read_text())
    match damage:
        case "no merges":
            (tokenizer / "merges.txt").write_text("")
        case "half the merges":
            (tokenizer / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
        case "foreign merges":
            (tokenizer / "merges.txt").write_text("zz yy\n")
        case "a larger vocabulary":
            (tokenizer / "vocab.json").write_text(json.dumps(vocabulary | {"é": len(vocabulary)}))
        case "ids as text":
            (tokenizer / "vocab.json").write_text(json.dumps({k: str(v) for k, v in vocabulary.items()}))
    refused(folder, "tokenizer")
