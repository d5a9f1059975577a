"""Tensor names of the original single-file layout, which A1111 and ComfyUI read, for those of diffusers.

The tables map a module of a diffusers part to one of the original layout; `inverse` gives the other direction.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

import torch

from salun_sd.checkpoint.families import UNET, averaged
from salun_sd.errors import SalunError

Parts = dict[str, list[str]]  # "unet", "vae", "text_encoder", "text_encoder_2" -> canonical names of its tensors
Table = dict[str, str]  # diffusers name -> original name


class Piece(NamedTuple):
    """How to make one tensor of the original layout from tensors of a diffusers part."""

    part: str
    names: tuple[str, ...]  # one name; or q, k and v, which are concatenated along dimension 0
    form: str = "same"  # a key of MAKE


Pieces = dict[str, Piece]  # original name -> piece

MAKE = {
    "same": lambda t: t,
    "conv": lambda t: t[:, :, None, None],  # a linear weight [a, b] stored as a 1x1 convolution [a, b, 1, 1]
    "transposed": lambda t: t.T,
    # Made up, as published files have these tensors and diffusers folders do not. No image depends on them.
    "positions": lambda t: torch.arange(len(t), device=t.device)[None],  # [1, L] int64; programs make their own
    "logit_scale": lambda t: t.new_full((), 100).log(),  # temperature of CLIP's loss, at the limit of its clipping
    "identity": lambda t: torch.eye(len(t), dtype=t.dtype, device=t.device),  # SD 2 does not use the projection
    "copy": torch.clone,  # SD 2 does not use the last resblock: it reads the output of the one before
}
TAKE = {  # of a tensor of any shape: what has a wrong one keeps a wrong one
    "same": lambda t: t,
    "conv": lambda t: t.flatten(1) if t.ndim > 1 else t,
    "transposed": lambda t: t.transpose(0, -1),
}


def make(piece: Piece, tensors: list[torch.Tensor]) -> torch.Tensor:
    """A tensor of the original layout, from the tensors of piece.names in their order."""
    return MAKE[piece.form](torch.cat(tensors) if len(tensors) > 1 else tensors[0]).contiguous()


def take(piece: Piece, which: int, original: torch.Tensor) -> torch.Tensor:
    """The inverse of `make`: the tensor of piece.names[which]. Not for a piece that is made up."""
    t = TAKE[piece.form](original)
    return (t.tensor_split(len(piece.names))[which] if t.ndim else t).contiguous()


def make_meta(piece: Piece, shapes: list, dtype: torch.dtype) -> tuple[list[int], torch.dtype]:
    """Shape and dtype of what `make` gives, from the shapes of piece.names and their dtype."""
    t = make(piece, [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes])
    return list(t.shape), t.dtype


def take_meta(piece: Piece, which: int, shape, dtype: torch.dtype) -> tuple[list[int], torch.dtype]:
    """Shape and dtype of what `take` gives, from those of the original tensor."""
    t = take(piece, which, torch.empty(shape, dtype=dtype, device="meta"))
    return list(t.shape), t.dtype


def canonical(part: str, name: str) -> str | None:
    """The name that the tables use for a tensor in a part's file; None for a buffer that is no weight.

    Older programs put "text_model." before a text encoder's names, and used words for the attention of a VAE or of a
    UNet that draws classes.
    """
    if part.startswith("text_encoder"):
        name = name.removeprefix("text_model.")
        return None if name == "embeddings.position_ids" else name
    if part in ("vae", "unet"):
        return re.sub(r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.)", lambda m: _OLD_WORDS[m[1]], name)
    return name


def original_layout(family: str, names: Parts) -> Pieces:
    """Original key -> how to make it, for all keys of the published files of "sd1", "sd2" or "sdxl".

    Raises SalunError, which names the tensor, if one has no place there or is missing: nothing is translated in part.
    """
    if family not in FAMILIES:
        raise SalunError("Only Stable Diffusion has a layout of one file.")
    if names.keys() != FAMILIES[family].keys():
        raise SalunError(f"A {family} checkpoint has {', '.join(FAMILIES[family])}; this one has {', '.join(names)}.")
    layout = {}
    for part, (prefix, table, made_up) in FAMILIES[family].items():
        places, present = table(names[part]), set(names[part])  # diffusers name -> original name
        if unknown := [name for name in names[part] if name not in places]:
            raise SalunError(f"{unknown[0]} in {part} has no place in the original layout of {family}.")
        sources: dict[str, list[str]] = {}
        for name, place in places.items():
            sources.setdefault(place, []).append(name)
        real = {
            place: Piece(part, tuple(needed), _form(place))
            for place, needed in sources.items() if present & set(needed)
        }  # fmt: skip
        pieces = made_up(part, real) | real
        if absent := {name for piece in pieces.values() for name in piece.names} - present:
            raise SalunError(f"{min(absent)} is missing in {part}.")
        layout |= {prefix + place: piece for place, piece in pieces.items()}
    return layout


def as_written(layout: Pieces, names: Collection[str]) -> Pieces:
    """The pieces under the names that a file has for them. Some programs leave out "text_model."; some files hold only
    the moving average (EMA) of the UNet."""
    is_short = not any(".transformer.text_model." in name for name in names)
    is_averaged = not any(name.startswith(UNET) for name in names)

    def own(key: str) -> str:
        if is_averaged and key.startswith(UNET):
            return averaged(key)
        return key.replace(".transformer.text_model.", ".transformer.") if is_short else key

    return {own(key): piece for key, piece in layout.items()}


def inverse(layout: Pieces) -> dict[tuple[str, str], tuple[str, int]]:
    """(part, diffusers name) -> (original key, index in its piece's names), for all tensors that are not made up."""
    return {
        (piece.part, name): (key, which)
        for key, piece in layout.items() if piece.form in TAKE
        for which, name in enumerate(piece.names)
    }  # fmt: skip


def _form(place: str) -> str:
    if re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", place):
        return "conv"
    return "transposed" if place == "text_projection" else "same"


def _count(names, pattern: str) -> int:
    """How many different numbers the names have where the pattern has its group."""
    return len({m[1] for name in names if (m := re.search(pattern, name))})


def _inside(modules: Table, members: Table) -> Table:
    """Every member of every module: "a.b" -> "x.y" for a -> x in modules and b -> y in members."""
    return {f"{a}.{b}": f"{x}.{y}" for a, x in modules.items() for b, y in members.items()}


def _as_is(*names: str) -> Table:
    return dict(zip(names, names, strict=True))


_LEAVES = _as_is("weight", "bias")


def _unet(names: list[str]) -> Table:
    """The original numbers all blocks in one row: conv_in, then each level's layers and its downsampler.

    On the way up, a level has one more layer, and its upsampler is the last module of its last block.
    """
    levels = range(_count(names, r"^down_blocks\.(\d+)\."))
    row = _count(names, r"^down_blocks\.0\.resnets\.(\d+)\.") + 1  # blocks of one level
    depth = range(_count(names, r"\.transformer_blocks\.(\d+)\."))
    layers = [(f"down_blocks.{b}", i, f"input_blocks.{1 + b * row + i}") for b in levels for i in range(row - 1)]
    layers += [(f"up_blocks.{b}", i, f"output_blocks.{b * row + i}") for b in levels for i in range(row)]
    resnets = {f"{block}.resnets.{i}": f"{place}.0" for block, i, place in layers}
    attentions = {f"{block}.attentions.{i}": f"{place}.1" for block, i, place in layers}
    down = {f"down_blocks.{b}.downsamplers.0.conv": f"input_blocks.{(b + 1) * row}.0.op" for b in levels}
    up = {}
    for b in levels:
        place = 1 + any(name.startswith(f"up_blocks.{b}.attentions.") for name in names)
        up[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{(b + 1) * row - 1}.{place}.conv"
    resnets |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    attentions |= {"mid_block.attentions.0": "middle_block.1"}
    transformer = _as_is("norm", "proj_in", "proj_out")
    transformer |= _inside(_as_is(*(f"transformer_blocks.{d}" for d in depth)), _TRANSFORMER_BLOCK)
    return _inside(
        _UNET_ENDS | _inside(resnets, _UNET_RESNET) | _inside(attentions, transformer) | down | up, _LEAVES
    )  # fmt: skip


_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_TRANSFORMER_BLOCK = _as_is(
    "norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "norm2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "norm3", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip


def _vae(names: list[str]) -> Table:
    """The original numbers the levels of encoder and decoder from the fine end."""
    levels = _count(names, r"^encoder\.down_blocks\.(\d+)\.")
    layers = _count(names, r"^encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    resnets, modules = {}, _as_is("quant_conv", "post_quant_conv")
    for side in ("encoder", "decoder"):
        resnets |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
        modules |= _inside({f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1"}, _VAE_ATTENTION)
        modules |= _inside(_as_is(side), {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
    for b in range(levels):
        down, up = f"encoder.down.{b}", f"decoder.up.{levels - 1 - b}"
        resnets |= {f"encoder.down_blocks.{b}.resnets.{i}": f"{down}.block.{i}" for i in range(layers)}
        resnets |= {f"decoder.up_blocks.{b}.resnets.{i}": f"{up}.block.{i}" for i in range(layers + 1)}
        modules[f"encoder.down_blocks.{b}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        modules[f"decoder.up_blocks.{b}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    return _inside(modules | _inside(resnets, _VAE_RESNET), _LEAVES)


_VAE_RESNET = _as_is("norm1", "conv1", "norm2", "conv2") | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_WORDS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _open_clip(names: list[str]) -> Table:
    layers = range(_count(names, r"^encoder\.layers\.(\d+)\."))
    modules = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    modules |= _inside({f"encoder.layers.{i}": f"transformer.resblocks.{i}" for i in layers}, _OPEN_CLIP_LAYER)
    tensors = {name: place.replace("in_proj.", "in_proj_") for name, place in _inside(modules, _LEAVES).items()}
    return tensors | {_POSITION: "positional_embedding", "text_projection.weight": "text_projection"}


def _clip(names: list[str]) -> Table:
    """The names of OpenAI's CLIP are the same in both."""
    return _as_is(*(name for name in _open_clip(names) if name != "text_projection.weight"))


_POSITION = "embeddings.position_embedding.weight"
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.q_proj": "attn.in_proj",  # q, k and v are one tensor in the original
    "self_attn.k_proj": "attn.in_proj",
    "self_attn.v_proj": "attn.in_proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _nothing(part: str, real: Pieces) -> Pieces:
    return {}


def _positions(part: str, real: Pieces) -> Pieces:
    return {"embeddings.position_ids": Piece(part, (_POSITION,), "positions")}


def _logit_scale(part: str, real: Pieces) -> Pieces:
    return {"logit_scale": Piece(part, ("final_layer_norm.weight",), "logit_scale")}


def _head(part: str, real: Pieces) -> Pieces:
    """What diffusers leaves out of SD 2's text encoder, as no image needs it: the last of 24 resblocks, and the
    projection."""
    blocks = _count(real, r"^transformer\.resblocks\.(\d+)\.")
    last, spare = (f"transformer.resblocks.{i}." for i in (blocks - 1, min(blocks, 23)))
    return _logit_scale(part, real) | {
        "text_projection": Piece(part, ("final_layer_norm.weight",), "identity"),
        **{k.replace(last, spare): piece._replace(form="copy") for k, piece in real.items() if k.startswith(last)},
    }


_DIFFUSION = {"unet": (UNET, _unet, _nothing), "vae": ("first_stage_model.", _vae, _nothing)}
FAMILIES = {  # part -> prefix in the file, table, and the function that gives the pieces that are made up
    "sd1": _DIFFUSION | {"text_encoder": ("cond_stage_model.transformer.text_model.", _clip, _positions)},
    "sd2": _DIFFUSION | {"text_encoder": ("cond_stage_model.model.", _open_clip, _head)},
    "sdxl": _DIFFUSION | {
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.", _clip, _positions),
        "text_encoder_2": ("conditioner.embedders.1.model.", _open_clip, _logit_scale),
    },
}  # fmt: skip
