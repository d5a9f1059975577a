"""Write an erased checkpoint in a form that other programs load, one tensor at a time."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import torch

from salun_sd.checkpoint import families, layout, tensors
from salun_sd.checkpoint.families import EMA, UNET, V_MARK, ZERO_SNR_MARK
from salun_sd.checkpoint.model import CONFIGS, SAMPLING, Checkpoint, part_files
from salun_sd.checkpoint.tensors import Lazy, Tensors
from salun_sd.errors import SalunError


def folder(base: Checkpoint, unet: Tensors, out: Path) -> None:
    """Fill the empty folder `out` with the base's pipeline, with these tensors as its UNet.

    Weight files get names without a variant. No other copy of the base's UNet is copied.
    """
    index = dict(base.index)
    if (base.config / SAMPLING).is_file():
        shutil.copy(base.config / SAMPLING, out)
    for part in [key for key in index if re.fullmatch(r"\w+", key) and (base.config / key).is_dir()]:
        files = sorted(p for p in (base.config / part).iterdir() if p.is_file())
        weights = [p for p in files if p.suffix not in CONFIGS or ".index." in p.name]
        if base.is_file and part not in base.family.parts and (base.config / part / "config.json").is_file():
            index[part] = [None, None]  # a model that a single file does not hold: the safety checker
            index["requires_safety_checker"] = False
            continue
        (out / part).mkdir()
        for file in files:
            if file not in weights:
                shutil.copy(file, out / part)
        if part == base.denoiser or base.is_file:
            _write_part(base, part, unet if part == base.denoiser else base.parts.get(part, {}), out / part)
        else:
            _copy_weights(base, part, weights, out / part)
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (out / "model_index.json").write_text(text, encoding="utf-8")


def _write_part(base: Checkpoint, part: str, weights: Tensors, out: Path) -> None:
    """Write a part's weights in the files that the base has, each with the base's names of tensors."""
    if not weights:
        return
    if base.is_file:
        prefix = "text_model." if part.startswith("text_encoder") else ""  # every version of transformers reads these
        renamed = {name if name.startswith("text_proj") else prefix + name: t for name, t in weights.items()}
        tensors.write(out / _file_name(part, ".safetensors"), renamed, {"format": "pt"})
        return
    files = part_files(base.path, part, base.variant)
    for file in files:
        of_file = {name: weights[layout.canonical(part, name)] for name in tensors.read(file)[0]}
        name = file.name if len(files) > 1 else _file_name(part, ".safetensors")
        tensors.write(out / name, of_file, {"format": "pt"})
    if len(files) > 1:
        dotted = f".{base.variant}" if base.variant else ""
        shutil.copy(
            base.path / part / _file_name(part, f".safetensors.index{dotted}.json"),
            out / _file_name(part, ".safetensors.index.json"),
        )


def _file_name(part: str, ending: str) -> str:
    return ("model" if part.startswith("text_encoder") else "diffusion_pytorch_model") + ending


def _copy_weights(base: Checkpoint, part: str, weights: list[Path], out: Path) -> None:
    """Copy the safetensors files of a part that the pipeline would load, and no others."""
    dotted = f".{base.variant}" if base.variant else ""
    chosen = [p for p in weights if ".safetensors" in p.name]
    if dotted and any(dotted in p.name for p in chosen):
        chosen = [p for p in chosen if dotted in p.name]
    else:
        dotted, chosen = "", [p for p in chosen if p.name.count(".") == 1 or ".index.json" in p.name]
    for file in chosen or weights:  # a safety checker may be only a pickle
        is_shard = "-of-" in file.name  # the index refers to shards by their names
        shutil.copy(file, out / (file.name if is_shard or not dotted else file.name.replace(dotted, "")))


def single_file(base: Checkpoint, unet: Tensors) -> Tensors:
    """The tensors of one file in the original layout.

    If the base is such a file, its tensors, their names and their order stay, except the UNet's. A second copy of the
    UNet under model_ema is left out, as it would still hold the concept. Raises SalunError if a tensor has no place in
    the layout.
    """
    parts = {**base.parts, "unet": unet}
    pieces = layout.original_layout(base.family.key, {part: list(names) for part, names in parts.items()})
    translated = {key: _lazy(piece, parts[piece.part]) for key, piece in pieces.items()}
    if not base.is_file:
        return translated | {mark: tensors.in_memory(torch.empty(0)) for mark in _marks(base)}
    others = {key: t for key, t in base.original.items() if not key.startswith(EMA)}
    return others | {key: t for key, t in translated.items() if key.startswith(UNET)}


def _marks(base: Checkpoint) -> list[str]:
    """The names by which A1111 and ComfyUI know what an SDXL predicts, and with which noise they are to draw it."""
    if base.family is not families.SDXL or base.prediction_type != "v_prediction":
        return []
    return [V_MARK, ZERO_SNR_MARK] if base.noise.get("rescale_betas_zero_snr") else [V_MARK]


def _lazy(piece: layout.Piece, part: Tensors) -> Lazy:
    """A tensor of the original layout, made when it is read."""
    sources = [part[name] for name in piece.names]
    shape, dtype = layout.make_meta(piece, [t.shape for t in sources], sources[0].dtype)
    return Lazy(dtype, torch.Size(shape), partial(_make, piece, sources))


def _make(piece: layout.Piece, sources: list[Lazy]) -> torch.Tensor:
    return layout.make(piece, [t.read() for t in sources])


def sizes(base: Checkpoint, patch: Tensors) -> dict[str, int]:
    """Bytes of the tensors in each form: "diffusers", "patch" and, if the original layout has a place for every tensor,
    "single-file"."""
    by_form = {"diffusers": sum(tensors.size(part) for part in base.parts.values()), "patch": tensors.size(patch)}
    try:
        return by_form | {"single-file": tensors.size(single_file(base, base.unet))}
    except SalunError:
        return by_form
