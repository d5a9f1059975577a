"""Checkpoints written in the forms that other programs load, streamed from the base's own tensors."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch

from salun_sd.checkpoint import layout, tensors
from salun_sd.checkpoint.families import UNET, V_MARK
from salun_sd.checkpoint.model import CONFIGS, SAMPLING, Checkpoint, part_files
from salun_sd.checkpoint.tensors import Lazy, Tensors
from salun_sd.errors import SalunError

EMA = "model_ema."


def folder(base: Checkpoint, unet: Tensors, out: Path) -> None:
    """Fill the folder `out` with a pipeline: the base's files, the UNet's tensors instead of its own.

    Weight files get their names without a variant, and no other copy of the base's UNet comes along.
    """
    index = json.loads((base.config / "model_index.json").read_text(encoding="utf-8"))
    if (base.config / SAMPLING).is_file():
        shutil.copy(base.config / SAMPLING, out)
    for part in [key for key in index if (base.config / key).is_dir()]:
        files = sorted(p for p in (base.config / part).iterdir() if p.is_file())
        weights = [p for p in files if p.suffix not in CONFIGS or ".index." in p.name]
        if base.is_file and part not in base.family.parts and (base.config / part / "config.json").is_file():
            index[part] = [None, None]  # a model that the single file has not: the safety checker
            index["requires_safety_checker"] = False
            continue
        (out / part).mkdir()
        for file in files:
            if file not in weights:
                shutil.copy(file, out / part)
        if part == "unet" or base.is_file:
            _write_part(base, part, unet if part == "unet" else base.parts.get(part, {}), out / part)
        else:
            _copy_weights(base, part, weights, out / part)
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (out / "model_index.json").write_text(text, encoding="utf-8")


def _write_part(base: Checkpoint, part: str, weights: Tensors, out: Path) -> None:
    """A component's weights, in files of the names and the contents that the base has."""
    if not weights:
        return
    if base.is_file:
        prefix = "text_model." if part.startswith("text_encoder") else ""  # as every version of transformers reads it
        named = {name if name.startswith("text_proj") else prefix + name: t for name, t in weights.items()}
        tensors.write(out / _stem(part, ".safetensors"), named, {"format": "pt"})
        return
    files = part_files(base.path, part, base.variant)
    for file in files:
        of_file = {name: weights[name] for name in tensors.read(file)[0]}
        tensors.write(out / (file.name if len(files) > 1 else _stem(part, ".safetensors")), of_file, {"format": "pt"})
    if len(files) > 1:
        dotted = f".{base.variant}" if base.variant else ""
        shutil.copy(
            base.path / part / _stem(part, f".safetensors.index{dotted}.json"),
            out / _stem(part, ".safetensors.index.json"),
        )


def _stem(part: str, ending: str) -> str:
    return ("model" if part.startswith("text_encoder") else "diffusion_pytorch_model") + ending


def _copy_weights(base: Checkpoint, part: str, weights: list[Path], out: Path) -> None:
    """The safetensors of a component that the pipeline would load, and nothing else that lies beside them."""
    dotted = f".{base.variant}" if base.variant else ""
    chosen = [p for p in weights if ".safetensors" in p.name]
    if dotted and any(dotted in p.name for p in chosen):
        chosen = [p for p in chosen if dotted in p.name]
    else:
        dotted, chosen = "", [p for p in chosen if p.name.count(".") == 1 or ".index.json" in p.name]
    for file in chosen or weights:  # a safety checker may be there as a pickle alone
        is_shard = "-of-" in file.name  # the index goes on to call it by its name
        shutil.copy(file, out / (file.name if is_shard or not dotted else file.name.replace(dotted, "")))


def single_file(base: Checkpoint, unet: Tensors) -> Tensors:
    """The tensors of one file in the original layout. Those of a base that is such a file stay as they are and where
    they are, but for the UNet's, and for a second copy of the UNet under model_ema, which is left out: it would carry
    the concept along."""
    parts = {**base.parts, "unet": unet}
    pieces = layout.original_layout(base.family.key, {part: list(names) for part, names in parts.items()})
    made = {key: _made(piece, parts[piece.part]) for key, piece in pieces.items()}
    if not base.is_file:
        # How A1111 and ComfyUI tell an SDXL that predicts v from the usual one
        marked = base.family.key == "sdxl" and base.prediction_type == "v_prediction"
        return made | ({V_MARK: tensors.given(torch.empty(0))} if marked else {})
    return {
        key: made[key] if key.startswith(UNET) and key in made else t
        for key, t in base.original.items()
        if not key.startswith(EMA)
    }


def _made(piece: layout.Piece, part: Tensors) -> Lazy:
    sources = [part[name] for name in piece.names]
    shape, dtype = layout.made(piece, [t.shape for t in sources], sources[0].dtype)
    return Lazy(dtype, torch.Size(shape), partial(_make, piece, sources))


def _make(piece: layout.Piece, sources: list[Lazy]) -> torch.Tensor:
    return layout.make(piece, [t.read() for t in sources])


def sizes(base: Checkpoint, patch: Tensors) -> dict[str, int]:
    """Bytes of tensors in each form that the checkpoint can take: a pipeline folder's UNet, VAE and text encoders, a
    single file, a patch."""
    found = {"diffusers": sum(tensors.size(part) for part in base.parts.values()), "patch": tensors.size(patch)}
    try:
        return found | {"single-file": tensors.size(single_file(base, base.unet))}
    except SalunError:  # a UNet with a tensor that the original layout has no place for
        return found
