"""Single files as programs write them: other spellings, marks, extra tensors, and tensors of wrong shapes."""

import json
import os

import pytest
import torch
from helpers import models
from safetensors.torch import save_file

from salun_sd.checkpoint import save
from salun_sd.checkpoint.families import EMA, ENTRY, UNET, averaged
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.errors import SalunError, UsageError

LONG, SHORT, POSITIONS = ".transformer.text_model.", ".transformer.", "embeddings.position_ids"
FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A pipeline folder of each family, and "v", an SDXL that predicts v with zero terminal SNR."""
    place = tmp_path_factory.mktemp("pipelines")
    folders = {family: models.write_pipeline(place / family, family, dtype=torch.float16) for family in FAMILIES}
    folders["v"] = models.write_pipeline(place / "v", "sdxl", dtype=torch.float16, prediction="v_prediction")
    edit(folders["v"], rescale_betas_zero_snr=True)
    return folders


@pytest.fixture(scope="module")
def files(pipelines):
    """The tensors of a single file of each."""
    return {name: models.single_file_tensors(folder) for name, folder in pipelines.items()}


def edit(folder, **settings):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def found(content, config, place, header=None):
    save_file({name: t.contiguous().clone() for name, t in content.items()}, place / "model.safetensors", header)
    return find(str(place / "model.safetensors"), config=str(config))


SPELLINGS = {
    "no text_model.": lambda content: {name.replace(LONG, SHORT): t for name, t in content.items()},
    "no positions": lambda content: {name: t for name, t in content.items() if POSITIONS not in name},
    "positions as numbers": lambda content: {n: t.float() if POSITIONS in n else t for n, t in content.items()},
    "neither": lambda content: {n.replace(LONG, SHORT): t for n, t in content.items() if POSITIONS not in n},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_spelling_is_the_same_model_and_stays_in_what_is_written(pipelines, files, tmp_path, family, spelling):
    content = SPELLINGS[spelling](files[family])
    assert content.keys() != files[family].keys() or spelling == "positions as numbers"
    model, folder = found(content, pipelines[family], tmp_path), find(str(pipelines[family]))
    assert model.identity == folder.identity
    written = save.single_file(model, model.unet)
    assert list(written) == list(model.original) and written.keys() == content.keys()
    assert all(torch.equal(written[name].read(), t) and written[name].dtype == t.dtype for name, t in content.items())


def test_a_pipeline_of_a_short_spelling_has_the_same_text_encoder(pipelines, files, tmp_path):
    short = load_pipeline(found(SPELLINGS["neither"](files["sd1"]), pipelines["sd1"], tmp_path), unet=False)
    whole = load_pipeline(find(str(pipelines["sd1"])), unet=False)
    expected = whole.text_encoder.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in short.text_encoder.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_average_alone_is_said_and_read_as_the_unet(pipelines, files, tmp_path, caplog, family):
    content = {averaged(n) if n.startswith(UNET) else n: t for n, t in files[family].items()}
    model = found(content | {f"{EMA}decay": torch.ones(())}, pipelines[family], tmp_path)
    assert "EMA" in caplog.text and model.fingerprint == find(str(pipelines[family])).fingerprint
    written = save.single_file(model, model.unet)
    assert written.keys() == files[family].keys()  # another program reads it under these names
    assert all(torch.equal(t.read(), files[family][name]) for name, t in written.items())
    del content[averaged(f"{UNET}out.2.bias")]
    with pytest.raises(SalunError, match=averaged(f"{UNET}out.2.bias")):
        found(content, pipelines[family], tmp_path)


def test_an_average_beside_the_unet_does_not_stand_in_for_it(pipelines, files, tmp_path, caplog):
    both = files["sd1"] | {averaged(n): t + 1 for n, t in files["sd1"].items() if n.startswith(UNET)}
    model = found(both, pipelines["sd1"], tmp_path)
    assert model.fingerprint == find(str(pipelines["sd1"])).fingerprint and not caplog.text
    del both[f"{UNET}out.2.bias"]
    with pytest.raises(SalunError, match=f"{UNET}out.2.bias"):
        found(both, pipelines["sd1"], tmp_path)


def test_what_is_written_of_an_sdxl_is_marked_with_what_it_predicts_and_its_noise(pipelines, tmp_path):
    marks = {}
    for name in ("sd2", "sdxl", "v"):
        model = find(str(pipelines[name]))
        marks[name] = {key for key in save.single_file(model, model.unet) if "." not in key}
    assert marks == {"sd2": set(), "sdxl": set(), "v": {"v_pred", "ztsnr"}}
    plain = models.write_pipeline(tmp_path / "v", "sdxl", dtype=torch.float16, prediction="v_prediction")
    model = find(str(plain))
    assert {key for key in save.single_file(model, model.unet) if "." not in key} == {"v_pred"}


@pytest.mark.parametrize("header", [None, {"modelspec.prediction_type": "v"}])
def test_a_mark_that_the_config_contradicts_is_refused_or_said(pipelines, files, tmp_path, caplog, header):
    v, both = {"v_pred": torch.empty(0)}, {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    assert found(files["v"] | both, pipelines["v"], tmp_path, header).prediction_type == "v_prediction"
    assert not caplog.text
    for marks in (v, both):  # this config is of epsilon
        with pytest.raises(UsageError, match="v_prediction.*--config"):
            found(files["v"] | marks, pipelines["sdxl"], tmp_path, header)
    found(files["v"] | v, pipelines["v"], tmp_path, header)
    assert "ztsnr" in caplog.text
    config = models.write_pipeline(tmp_path / "v", "sdxl", dtype=torch.float16, prediction="v_prediction")
    with pytest.raises(UsageError, match="ztsnr.*--config"):
        found(files["v"] | both, config, tmp_path, header)
    found(files["v"] | v, config, tmp_path, header)


@pytest.mark.parametrize("key", [f"{UNET}lora_note", f"{UNET}out.2.lora_up.weight", "lora_te.alpha", "control_model.a"])
def test_an_odd_tensor_beside_a_whole_unet_is_kept_and_said(pipelines, files, tmp_path, caplog, key):
    content = files["sd1"] | {key: torch.full((2,), 7.0)}
    model = found(content, pipelines["sd1"], tmp_path)
    assert model.fingerprint == find(str(pipelines["sd1"])).fingerprint
    assert (key in caplog.text) == (not key.startswith("lora_te"))
    assert torch.equal(save.single_file(model, model.unet)[key].read(), content[key])


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max", "noise_augmentor.data_mean"])
def test_a_whole_unet_of_another_kind_of_model_is_refused(pipelines, files, tmp_path, key):
    with pytest.raises(UsageError, match=r"EDM|unCLIP"):
        found(files["sdxl"] | {key: torch.ones(4)}, pipelines["sdxl"], tmp_path)


ENCODER_2 = "conditioner.embedders.1.model."
WRONG = [
    ("sd1", ENTRY),
    ("sd1", f"{UNET}out.2.bias"),
    ("sd1", "first_stage_model.encoder.mid.attn_1.q.weight"),
    ("sdxl", f"{ENCODER_2}transformer.resblocks.0.attn.in_proj_weight"),
    ("sdxl", f"{ENCODER_2}text_projection"),
]


@pytest.mark.parametrize("shape", [(), (2,), (4, 4, 3, 2), (0,)])
@pytest.mark.parametrize(("family", "key"), WRONG)
def test_a_tensor_of_a_wrong_shape_is_named(pipelines, files, tmp_path, family, key, shape):
    with pytest.raises(SalunError, match=key) as e:
        found(files[family] | {key: torch.zeros(shape).half()}, pipelines[family], tmp_path)
    assert "model.safetensors" in str(e.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize(
    "key", [f"{UNET}out.2.bias", "cond_stage_model.transformer.text_model.final_layer_norm.weight"]
)
def test_weights_that_are_not_plain_floats_are_named(pipelines, files, tmp_path, key, dtype):
    with pytest.raises(UsageError, match=f"{key.split('.')[-1]} in the .*{dtype}"):
        found(files["sd1"] | {key: files["sd1"][key].to(dtype)}, pipelines["sd1"], tmp_path)


def test_what_is_no_file_is_refused_at_once_and_an_ending_in_capitals_is_read(pipelines, files, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.ckpt").symlink_to("gone")
    for place in ("pipe.safetensors", "link.ckpt"):
        with pytest.raises(SalunError, match=place):
            find(str(tmp_path / place))
    with pytest.raises(UsageError, match="/dev/null"):
        find("/dev/null")
    save_file(files["sd1"], tmp_path / "MODEL.SAFETENSORS")
    assert find(str(tmp_path / "MODEL.SAFETENSORS"), config=str(pipelines["sd1"])).unet
