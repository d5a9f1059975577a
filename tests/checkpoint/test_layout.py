import math
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import models
from safetensors.torch import load_file, save_file

from salun_sd.checkpoint import layout
from salun_sd.errors import SalunError

FAMILIES = ["sd1", "sd2", "sdxl"]
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
VIT_H, CLIP_L = "cond_stage_model.model.", "conditioner.embedders.0.transformer.text_model."
BIG_G = "conditioner.embedders.1.model."

# Keys and shapes as the published files have them: v1-5-pruned-emaonly, v2-1_768-ema-pruned, sd_xl_base_1.0.
PUBLISHED_VAE = {
    "encoder.conv_in.weight": [128, 3, 3, 3],
    "encoder.down.0.block.1.conv2.bias": [128],
    "encoder.down.0.downsample.conv.weight": [128, 128, 3, 3],
    "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
    "encoder.down.3.block.1.norm2.weight": [512],
    "encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    "encoder.mid.attn_1.norm.weight": [512],
    "encoder.mid.block_2.conv1.weight": [512, 512, 3, 3],
    "encoder.norm_out.bias": [512],
    "encoder.conv_out.weight": [8, 512, 3, 3],
    "quant_conv.weight": [8, 8, 1, 1],
    "post_quant_conv.weight": [4, 4, 1, 1],
    "decoder.conv_in.weight": [512, 4, 3, 3],
    "decoder.mid.block_1.norm1.bias": [512],
    "decoder.mid.attn_1.proj_out.weight": [512, 512, 1, 1],
    "decoder.mid.attn_1.v.bias": [512],
    "decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
    "decoder.up.1.block.0.nin_shortcut.weight": [256, 512, 1, 1],
    "decoder.up.1.upsample.conv.weight": [256, 256, 3, 3],
    "decoder.up.3.block.0.norm1.weight": [512],
    "decoder.up.3.upsample.conv.bias": [512],
    "decoder.norm_out.weight": [128],
    "decoder.conv_out.weight": [3, 128, 3, 3],
}
PUBLISHED_UNET = {  # SD 1.x and 2.x alike
    "time_embed.0.weight": [1280, 320],
    "time_embed.2.bias": [1280],
    "input_blocks.0.0.weight": [320, 4, 3, 3],
    "input_blocks.1.0.in_layers.2.weight": [320, 320, 3, 3],
    "input_blocks.1.0.emb_layers.1.weight": [320, 1280],
    "input_blocks.2.1.transformer_blocks.0.ff.net.0.proj.weight": [2560, 320],
    "input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
    "input_blocks.5.1.transformer_blocks.0.attn1.to_out.0.bias": [640],
    "input_blocks.9.0.op.bias": [1280],
    "input_blocks.11.0.out_layers.3.weight": [1280, 1280, 3, 3],
    "middle_block.0.in_layers.0.weight": [1280],
    "middle_block.1.transformer_blocks.0.attn1.to_q.weight": [1280, 1280],
    "middle_block.2.out_layers.0.bias": [1280],
    "output_blocks.0.0.in_layers.0.weight": [2560],
    "output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
    "output_blocks.5.0.skip_connection.weight": [1280, 1920, 1, 1],
    "output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
    "output_blocks.8.2.conv.bias": [640],
    "output_blocks.9.0.in_layers.2.weight": [320, 960, 3, 3],
    "output_blocks.11.0.skip_connection.weight": [320, 640, 1, 1],
    "output_blocks.11.1.transformer_blocks.0.norm1.bias": [320],
    "out.0.bias": [320],
    "out.2.weight": [4, 320, 3, 3],
}
PUBLISHED_CLIP_L = {
    "embeddings.position_ids": [1, 77],
    "embeddings.token_embedding.weight": [49408, 768],
    "embeddings.position_embedding.weight": [77, 768],
    "encoder.layers.0.self_attn.q_proj.weight": [768, 768],
    "encoder.layers.11.mlp.fc1.weight": [3072, 768],
    "encoder.layers.11.layer_norm2.bias": [768],
    "final_layer_norm.weight": [768],
}


def behind(prefix, keys):
    return {prefix + key: shape for key, shape in keys.items()}


PUBLISHED = {
    "sd1": behind(VAE, PUBLISHED_VAE) | behind(UNET, PUBLISHED_UNET) | behind(CLIP, PUBLISHED_CLIP_L) | behind(UNET, {
        "input_blocks.1.1.proj_in.weight": [320, 320, 1, 1],
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
        "middle_block.1.proj_out.weight": [1280, 1280, 1, 1],
        "output_blocks.3.1.transformer_blocks.0.attn2.to_v.weight": [1280, 768],
    }),
    "sd2": behind(VAE, PUBLISHED_VAE) | behind(UNET, PUBLISHED_UNET) | behind(UNET, {
        "input_blocks.1.1.proj_in.weight": [320, 320],
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024],
        "middle_block.1.proj_out.weight": [1280, 1280],
        "output_blocks.3.1.transformer_blocks.0.attn2.to_v.weight": [1280, 1024],
    }) | behind(VIT_H, {
        "token_embedding.weight": [49408, 1024],
        "positional_embedding": [77, 1024],
        "transformer.resblocks.0.ln_1.weight": [1024],
        "transformer.resblocks.22.mlp.c_proj.weight": [1024, 4096],
        "transformer.resblocks.23.attn.in_proj_weight": [3072, 1024],
        "transformer.resblocks.23.attn.in_proj_bias": [3072],
        "transformer.resblocks.23.attn.out_proj.weight": [1024, 1024],
        "transformer.resblocks.23.mlp.c_fc.bias": [4096],
        "ln_final.bias": [1024],
        "text_projection": [1024, 1024],
        "logit_scale": [],
    }),
    "sdxl": behind(VAE, PUBLISHED_VAE) | behind(CLIP_L, PUBLISHED_CLIP_L) | behind(UNET, {
        "time_embed.2.weight": [1280, 1280],
        "label_emb.0.0.weight": [1280, 2816],
        "label_emb.0.2.bias": [1280],
        "input_blocks.0.0.bias": [320],
        "input_blocks.2.0.out_layers.3.weight": [320, 320, 3, 3],
        "input_blocks.3.0.op.weight": [320, 320, 3, 3],
        "input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
        "input_blocks.4.1.proj_in.weight": [640, 640],
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": [640, 2048],
        "input_blocks.6.0.op.bias": [640],
        "input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": [1280, 5120],
        "middle_block.1.transformer_blocks.9.norm3.weight": [1280],
        "output_blocks.0.0.in_layers.2.weight": [1280, 2560, 3, 3],
        "output_blocks.2.1.transformer_blocks.9.attn1.to_out.0.weight": [1280, 1280],
        "output_blocks.2.2.conv.weight": [1280, 1280, 3, 3],
        "output_blocks.3.0.skip_connection.weight": [640, 1920, 1, 1],
        "output_blocks.5.1.transformer_blocks.1.norm2.bias": [640],
        "output_blocks.5.2.conv.bias": [640],
        "output_blocks.8.0.skip_connection.weight": [320, 640, 1, 1],
        "out.2.bias": [4],
    }) | behind(BIG_G, {
        "token_embedding.weight": [49408, 1280],
        "positional_embedding": [77, 1280],
        "transformer.resblocks.9.mlp.c_proj.bias": [1280],
        "transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
        "transformer.resblocks.31.mlp.c_fc.weight": [5120, 1280],
        "ln_final.weight": [1280],
        "text_projection": [1280, 1280],
        "logit_scale": [],
    }),
}  # fmt: skip
COUNTS = {
    "sd1": {UNET: 686, VAE: 248, CLIP: 197},
    "sd2": {UNET: 686, VAE: 248, VIT_H: 294},
    "sdxl": {UNET: 1680, VAE: 248, CLIP_L: 197, BIG_G: 390},
}


def parts_of(shapes) -> layout.Parts:
    return {part: [layout.canonical(part, name) for name in names] for part, names in shapes.items()}


def full_size(family) -> dict[str, list[int]]:
    """Key -> shape of the whole original layout, without a value in memory."""
    shapes = models.shapes(family, full=True)
    of = {part: {layout.canonical(part, name): s for name, s in names.items()} for part, names in shapes.items()}
    pieces = layout.original_layout(family, parts_of(shapes))
    return {
        key: layout.make_meta(piece, [of[piece.part][name] for name in piece.names], torch.float16)[0]
        for key, piece in pieces.items()
    }


def same(a, b) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_set_is_the_published_one(family):
    found = full_size(family)
    assert {prefix: sum(key.startswith(prefix) for key in found) for prefix in COUNTS[family]} == COUNTS[family]
    assert len(found) == sum(COUNTS[family].values()) == {"sd1": 1131, "sd2": 1228, "sdxl": 2515}[family]
    assert {key: found.get(key) for key in PUBLISHED[family]} == PUBLISHED[family]


@pytest.mark.parametrize(
    ("family", "attention", "layers"),
    [("sd1", "x.", 1), ("sd1", "xx.", 2), ("sd2", ".x.", 1), ("sdxl", ".x", 1), ("sdxl", ".xx", 2)],
)
def test_diffusers_reads_the_single_file_as_the_folder(tmp_path, monkeypatch, family, attention, layers):
    levels = (16, 32, 32)[: len(attention)]
    blocks = models.blocks(attention) | {"block_out_channels": levels, "layers_per_block": layers}
    if family == "sdxl":
        blocks["transformer_layers_per_block"] = (1, 2, 3)[: len(attention)]
    monkeypatch.setitem(models.TINY[family], "unet", models.TINY[family]["unet"] | blocks)
    folder = models.write_pipeline(tmp_path / "model", family)
    config = shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    file = models.write_single_file(folder, tmp_path / "model.safetensors")
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    optional = {} if family == "sdxl" else {"safety_checker": None}

    def parts(file):
        loaded = pipeline.from_single_file(str(file), config=str(config), local_files_only=True, **optional)
        return {part: getattr(loaded, part).state_dict() for part in layout.FAMILIES[family]}

    direct = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for part, loaded in parts(file).items():
        expected = getattr(direct, part).state_dict()
        assert loaded.keys() == expected.keys()
        assert [name for name, t in expected.items() if not same(t, loaded[name])] == []

    # a weight that moves in the file moves in exactly one place of the pipeline
    tensors = load_file(file)
    tensors[f"{UNET}output_blocks.{layers}.0.in_layers.2.bias"] += 1
    save_file(tensors, tmp_path / "moved.safetensors")
    moved = [
        (part, name)
        for part, loaded in parts(tmp_path / "moved.safetensors").items()
        for name, t in getattr(direct, part).state_dict().items()
        if not same(t, loaded[name])
    ]
    assert moved == [("unet", f"up_blocks.0.resnets.{layers}.conv1.bias")]


def test_a_ckpt_holds_the_same_tensors(tmp_path):
    folder = models.write_pipeline(tmp_path / "model", "sd2", dtype=torch.float16, variant="fp16", shards=True)
    plain = load_file(models.write_single_file(folder, tmp_path / "model.safetensors"))
    pickled = torch.load(models.write_single_file(folder, tmp_path / "model.ckpt"), weights_only=True)["state_dict"]
    assert plain.keys() == pickled.keys()
    assert all(same(t, pickled[key]) for key, t in plain.items())
    assert {t.dtype for t in plain.values()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_take_inverts_make_and_both_are_announced(tmp_path, family, dtype):
    parts = models.load_parts(models.write_pipeline(tmp_path, family, dtype=dtype))
    pieces = layout.original_layout(family, {part: list(tensors) for part, tensors in parts.items()})
    originals = {}
    for key, piece in pieces.items():
        tensors = [parts[piece.part][name] for name in piece.names]
        originals[key] = t = layout.make(piece, tensors)
        assert t.is_contiguous()
        assert layout.make_meta(piece, [list(s.shape) for s in tensors], dtype) == (list(t.shape), t.dtype)
    inverse = layout.inverse(pieces)
    assert inverse.keys() == {(part, name) for part, tensors in parts.items() for name in tensors}
    assert len(set(inverse.values())) == len(inverse)
    assert (
        layout.inverse(dict(reversed(pieces.items()))) == inverse
    )  # no luck of the order: what is made up is no source
    for (part, name), (key, which) in inverse.items():
        t = layout.take(pieces[key], which, originals[key])
        assert t.is_contiguous() and same(t, parts[part][name])
        assert layout.take_meta(pieces[key], which, list(originals[key].shape), dtype) == (list(t.shape), dtype)
    # each form is met, and none but "same" is the identity
    forms = {piece.form for piece in pieces.values()}
    assert forms == {"same", "conv"} | {
        "sd1": {"positions"},
        "sd2": {"logit_scale", "identity", "copy"},
        "sdxl": {"positions", "logit_scale", "transposed"},
    }[family]  # fmt: skip
    for key, piece in pieces.items():
        first = parts[piece.part][piece.names[0]]
        assert same(originals[key], first) == (piece.form in ("same", "copy") and len(piece.names) == 1)


def test_q_k_and_v_lie_in_this_order():
    piece = layout.Piece("text_encoder", ("q", "k", "v"))
    q, k, v = (torch.full((2, 3), float(i)) for i in range(3))
    assert layout.make(piece, [q, k, v])[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    names = layout.original_layout("sd2", parts_of(models.shapes("sd2")))
    assert names[f"{VIT_H}transformer.resblocks.1.attn.in_proj_bias"].names == tuple(
        f"encoder.layers.1.self_attn.{x}_proj.bias" for x in "qkv"
    )


def test_what_is_made_up(tmp_path):
    sd1, sd2, sdxl = (models.single_file_tensors(models.write_pipeline(tmp_path / f, f)) for f in FAMILIES)
    for positions in (sd1[f"{CLIP}embeddings.position_ids"], sdxl[f"{CLIP_L}embeddings.position_ids"]):
        assert same(positions, torch.arange(24)[None])
    for scale in (sd2[f"{VIT_H}logit_scale"], sdxl[f"{BIG_G}logit_scale"]):
        assert scale.shape == () and scale.item() == pytest.approx(math.log(100))
    assert same(sd2[f"{VIT_H}text_projection"], torch.eye(32))
    blocks = [{k: t for k, t in sd2.items() if f".resblocks.{i}." in k} for i in range(4)]
    assert [len(block) for block in blocks] == [12, 12, 12, 0]  # of two layers in the folder
    assert all(same(t, sd2[k.replace(".2.", ".1.", 1)]) for k, t in blocks[2].items())
    assert not all(same(t, sd2[k.replace(".1.", ".0.", 1)]) for k, t in blocks[1].items())


@pytest.mark.parametrize(("layers", "copied"), [(22, True), (23, True), (24, False)])
def test_a_text_encoder_that_is_whole_is_not_lengthened(layers, copied):
    parts = parts_of(models.shapes("sd2"))
    layer = [name for name in parts["text_encoder"] if name.startswith("encoder.layers.0.")]
    parts["text_encoder"] += [n.replace(".0.", f".{i}.", 1) for n in layer for i in range(2, layers)]
    pieces = layout.original_layout("sd2", parts)
    assert sum(".resblocks." in key for key in pieces) == 12 * (layers + copied)
    assert sum(piece.form == "copy" for piece in pieces.values()) == 12 * copied


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "class_embedding.linear_1.weight"),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
        ("unet", "down_blocks.0.resnets.7.norm1.weight"),
        ("unet", "conv_in.scale"),
        ("vae", "encoder.mid_block.attentions.1.to_q.weight"),
        ("text_encoder", "encoder.layers.9.mlp.fc1.weight"),
        ("text_encoder", "text_projection.weight"),
    ],
)
def test_an_unknown_tensor_is_refused_by_name(part, name):
    parts = parts_of(models.shapes("sd1"))
    layout.original_layout("sd1", parts)  # as it is, it is whole
    parts[part].append(name)
    with pytest.raises(SalunError, match=f"{name}.* {part}.* sd1"):
        layout.original_layout("sd1", parts)


def test_a_tensor_or_part_that_is_needed_and_missing_is_named():
    parts = parts_of(models.shapes("sd2"))
    parts["text_encoder"].remove("encoder.layers.1.self_attn.k_proj.weight")
    with pytest.raises(SalunError, match="encoder.layers.1.self_attn.k_proj.weight.* text_encoder"):
        layout.original_layout("sd2", parts)
    with pytest.raises(SalunError, match="sdxl.* text_encoder_2"):
        layout.original_layout("sdxl", parts)


def test_names_of_older_programs_are_canonical():
    shapes = models.shapes("sdxl")
    for part, names in shapes.items():  # what is written today maps to itself, but for one prefix
        assert {layout.canonical(part, name) for name in names} == {name.removeprefix("text_model.") for name in names}
    for part in ("text_encoder", "text_encoder_2"):
        assert layout.canonical(part, "text_model.final_layer_norm.bias") == "final_layer_norm.bias"
        assert layout.canonical(part, "text_model.embeddings.position_ids") is None
        assert layout.canonical(part, "embeddings.position_ids") is None
    assert layout.canonical("text_encoder_2", "text_projection.weight") == "text_projection.weight"
    old = {"query.weight": "to_q.weight", "key.bias": "to_k.bias", "value.weight": "to_v.weight",
           "proj_attn.bias": "to_out.0.bias", "group_norm.bias": "group_norm.bias"}  # fmt: skip
    for name, new in old.items():
        for side in ("encoder", "decoder"):
            place = f"{side}.mid_block.attentions.0."
            assert layout.canonical("vae", place + name) == place + new
        place = "down_blocks.2.attentions.1."  # of a UNet that draws classes
        assert layout.canonical("unet", place + name) == place + new
    assert layout.canonical("text_encoder", "attentions.0.query.weight") == "attentions.0.query.weight"


def test_the_order_of_the_names_does_not_matter():
    parts = parts_of(models.shapes("sdxl"))
    shuffled = {part: sorted(names, reverse=True) for part, names in parts.items()}
    assert list(layout.original_layout("sdxl", shuffled).items()) == list(layout.original_layout("sdxl", parts).items())
