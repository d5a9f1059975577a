"""Weights are looked at when they are loaded; tokenizers are those of the text encoders."""

import json
import os
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.models import damage, write_pipeline, write_single_file

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import check, load_part, load_pipeline, load_tokenizers
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.finite import NotFinite

WEIGHTS = [
    ("unet", "conv_out.weight", "UNet"), ("vae", "decoder.conv_out.bias", "VAE"),
    ("vae", "encoder.conv_in.weight", "VAE"), ("text_encoder", "final_layer_norm.weight", "text encoder"),
    ("text_encoder_2", "text_projection.weight", "text encoder 2"),
]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("part", "name", "words"), WEIGHTS)
def test_a_weight_that_is_not_finite_is_named_with_its_part_and_the_checkpoint(tmp_path, part, name, words, value):
    folder = write_pipeline(tmp_path / "sdxl", "sdxl")
    load_pipeline(find(str(folder)))
    damage(folder, part, name, value)
    with pytest.raises(NotFinite) as caught:
        load_pipeline(find(str(folder)))
    assert all(word in str(caught.value) for word in (name, words, str(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_by_itself_is_looked_at_too(tmp_path, dtype):
    folder = write_pipeline(tmp_path / "sd1", "sd1", dtype=torch.float16)
    load_part(find(str(folder)), "unet", dtype)
    damage(folder, "unet", "conv_in.bias", float("inf"))
    with pytest.raises(NotFinite, match="conv_in.bias in the UNet.*float16"):
        load_part(find(str(folder)), "unet", dtype)
    load_pipeline(find(str(folder)), unet=False)  # the other parts are whole


def test_a_single_file_is_looked_at_too(tmp_path):
    folder = write_pipeline(tmp_path / "sd1", "sd1", dtype=torch.float16)
    damage(folder, "unet", "conv_out.bias", float("nan"))
    write_single_file(folder, tmp_path / "sd1.safetensors")
    model = find(str(tmp_path / "sd1.safetensors"), config=str(folder))
    for load in (partial(load_part, part="unet"), load_pipeline):
        with pytest.raises(NotFinite, match="conv_out.bias in the UNet of .*sd1.safetensors"):
            load(model)


def test_tokenizers_are_those_of_the_pipeline_and_read_no_more_than_its_encoders(tmp_path):
    folder = write_pipeline(tmp_path / "sdxl", "sdxl")
    file = folder / "tokenizer_2" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["model_max_length"]
    file.write_text(json.dumps(settings))
    model = find(str(folder))
    tokenizers, pipeline = load_tokenizers(model), load_pipeline(model)
    assert {name: t.model_max_length for name, t in tokenizers.items()} == {"tokenizer": 24, "tokenizer_2": 24}
    for name, tokenizer in tokenizers.items():
        assert type(getattr(pipeline, name)) is type(tokenizer)
        assert getattr(pipeline, name)("a  Sneaker").input_ids == tokenizer("a sneaker").input_ids


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": 3}'])
def test_a_tokenizer_that_is_missing_or_damaged_is_named(tmp_path, content):
    folder = write_pipeline(tmp_path / "sdxl", "sdxl")
    file = folder / "tokenizer_2" / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    for load in (load_tokenizers, load_pipeline):
        with pytest.raises(SalunError, match="tokenizer_2"):
            load(find(str(folder)))


def test_a_pipe_among_the_files_of_a_tokenizer_is_not_waited_for(tmp_path):
    folder = write_pipeline(tmp_path / "sd1", "sd1")
    os.mkfifo(pipe := folder / "tokenizer" / "special_tokens_map.json")
    with pytest.raises(SalunError, match=str(pipe)):
        load_tokenizers(find(str(folder)))


def test_a_config_through_which_tensors_passed_is_not_tried_again_and_another_one_is(tmp_path, monkeypatch):
    model = find(str(write_pipeline(tmp_path / "model", "sd1")))
    check(model)

    def forward(self, *args, **kwargs):
        raise RuntimeError("it was tried")

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    check(model)
    file = tmp_path / "model" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"norm_eps": 1e-3}))
    with pytest.raises(UsageError, match="it was tried"):
        check(find(str(tmp_path / "model")))
