"""The supports: what --mask may say, and which weights it means."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from helpers import models
from helpers.forms import all_same

from salun_sd.checkpoint.find import find
from salun_sd.core.mask import kept
from salun_sd.edit import maskfile, patch
from salun_sd.edit.concepts import Concept
from salun_sd.edit.push import push
from salun_sd.edit.supports import Support, parameters_of, support_of
from salun_sd.errors import SalunError, UsageError

CONCEPT = [Concept("a photo of a sneaker", "a photo of a bag")]
NAMED = ("cross-attention", "cross-attention-kv", "not-cross-attention")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("salient:0.3",), Support("salient", 0.3)),
        ((None, 0.3), Support("salient", 0.3)),
        ((None, 0.3, 0.0, "cross-attention"), Support("salient", 0.3, 0.0)),
        (("salient:1", None, 2.0, "none"), Support("salient", 1.0, 2.0)),
        ((None,), Support("salient", 0.5)),
        ((None, None, None, "cross-attention"), Support("cross-attention")),
        (("random:1e-3",), Support("random", 0.001)),
        *(((name,), Support(name)) for name in (*NAMED, "none")),
    ],
)
def test_what_is_typed_comes_before_the_methods_own(given, wanted):
    assert support_of(*given) == wanted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("cross_attention",), "give cross-attention,"),
        (("Cross-Attn-KV",), "give cross-attention-kv,"),
        (("salient=0.5",), "give salient:0.5,"),
        (("Random:0.5",), "give random:0.5,"),
        (("nowhere.safetensors",), "nowhere.safetensors .*give salient:0.5, random:0.5, .*, none, or a file"),
        (("",), "give salient"),
        ((".",), "no regular file"),
        (("salient",), "salient:0.5"),
        (("random:x",), "random:x .*random:0.5"),
        *(((f"{kind}:{d}",), "outside") for kind in ("salient", "random") for d in ("0", "-0.5", "1.5", "nan", "inf")),
        (("salient:0.3", 0.3), "--mask salient:0.3 and --density 0.3"),
        (("none", 0.3), "--density"),
        (("random:0.5", None, 7.5), "--saliency-guidance .*random:0.5"),
        ((None, None, 7.5, "cross-attention"), "--saliency-guidance .*cross-attention"),
    ],
)
def test_what_it_cannot_be_is_refused_before_a_model_is_opened(given, named):
    with pytest.raises(UsageError, match=named):
        support_of(*given)


def test_a_file_is_a_support_whatever_its_name():
    for name in ("mask.safetensors", "salient", "cross_attention"):
        Path(name).touch()
        assert support_of(name) == Support("file", file=Path(name))


def attention_of(unet):
    """Names of the parameters in the layers that diffusers' blocks call attn2, the second of two, without norms."""
    return {name for name, _ in unet.named_parameters() if re.search(r"\.attn2\.to_", name)}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_named_supports_are_the_layers_of_esd(family):
    unet = models.skeleton("unet", models.TINY[family]["unet"])
    cross, kv, outside = (parameters_of(unet, kind) for kind in NAMED)
    assert cross == attention_of(unet)
    assert kv == {name for name in cross if ".to_k." in name or ".to_v." in name} and kv
    names = {name for name, _ in unet.named_parameters()}
    rest = names - cross - outside  # norms alone
    assert cross <= names and outside <= names and not cross & outside
    assert rest and all("norm" in name for name in rest) and not any("norm" in name for name in outside)


def test_a_unet_without_cross_attention_has_layers_outside_it_alone():
    with torch.device("meta"):
        unet = UNet2DModel(8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                           up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4)  # fmt: skip
    assert [bool(parameters_of(unet, kind)) for kind in NAMED] == [False, False, True]


@pytest.mark.parametrize("spec", [*NAMED, "none", "random:0.3"])
def test_a_mask_frees_whole_layers_or_a_share_of_weights_and_its_file_says_which(tiny, tmp_path, spec):
    base, support = find(tiny), support_of(spec)
    mask = support.mask(base, CONCEPT, 0)
    assert mask.settings["kind"] == spec.partition(":")[0] and mask.settings["base"] == base.fingerprint
    assert mask.bits.shapes == {name: t.shape for name, t in base.unet.items()}
    if spec in NAMED:
        free = parameters_of(base.skeleton("unet"), spec)
        assert all(bool(bits.all()) == bool(bits.any()) == (name in free) for name, bits in mask.bits.items())
    else:
        n, of = kept(mask.bits)
        assert n == round((support.density or 1) * of)
    maskfile.write(tmp_path / "m.safetensors", mask)
    stored = support_of("m.safetensors").mask(base, CONCEPT, 1)
    assert stored.settings == mask.settings and all_same(stored.bits, mask.bits)


def test_salient_weights_have_to_be_computed_and_there_must_be_some(tiny):
    assert support_of("salient:0.5").mask(find(tiny), CONCEPT, 0) is None
    for spec in ("salient:1e-9", "random:1e-9"):
        with pytest.raises(UsageError, match="1e-09 keeps none"):
            support_of(spec).mask(find(tiny), CONCEPT, 0)


def test_a_mask_of_no_concept_is_of_no_other_one(tiny, tmp_path, caplog):
    """A mask of random weights goes with any concept; one that was made for another concept is said."""
    base, random = find(tiny), support_of("random:0.3").mask(find(tiny), CONCEPT, 0)
    for made_for, said in ((None, False), (["a photo of a sneaker"], False), (["a photo of a cat"], True)):
        concepts = {} if made_for is None else {"concepts": made_for}
        maskfile.write(tmp_path / "m.safetensors", random._replace(settings=random.settings | concepts))
        caplog.clear()
        support_of("m.safetensors").mask(base, CONCEPT, 0)
        assert ("m.safetensors" in caplog.text) == said


@pytest.mark.parametrize(
    "content", [b"no mask", b"<!doctype html>", b"", b"GGUF", bytes(range(256)), b"\x80\x04K\x01.", b"PK\3\4"]
)
def test_a_file_that_is_no_mask_is_named_with_the_command_that_makes_one(tiny, tmp_path, content):
    Path("m.safetensors").write_bytes(content)
    with pytest.raises(
        SalunError, match=r"m\.safetensors .*no mask .*: make one with: salun-sd mask .*--out"
    ) as raised:
        support_of("m.safetensors").mask(find(tiny), CONCEPT, 0)
    assert not re.search("load|.ckpt|model's", str(raised.value))
    with pytest.raises(SalunError, match=r"m\.safetensors .*no patch .*: give .*--format patch"):
        patch.read(Path("m.safetensors"))
    with pytest.raises(SalunError, match=r"m\.safetensors .*no checkpoint .*: give what salun-sd erase"):
        push("m.safetensors", "a/b", dry_run=True)
