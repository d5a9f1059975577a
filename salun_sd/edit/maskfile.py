"""Mask files: packed, read back, checked against a UNet."""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from salun_sd.checkpoint import sources, tensors
from salun_sd.checkpoint.tensors import Tensors
from salun_sd.core.mask import Bits
from salun_sd.errors import SalunError, some
from salun_sd.runtime.documents import parse_json

SETTINGS = {"shapes?": dict, "base?": str, "concepts?": [str], "density?": float}  # of a mask file
MAKE = "make one with: salun-sd mask MODEL --concept TEXT --out FILE"


class Mask(NamedTuple):
    """The bits of a mask, and the settings that it was made with."""

    bits: Bits
    settings: dict


def kept_per_block(bits: Bits) -> dict[str, tuple[int, int]]:
    """`kept` for each block of the UNet: conv_in, time_embedding, down_blocks.0, ..., conv_out."""
    blocks: dict[str, tuple[int, int]] = {}
    for name, b in bits.items():
        first, second, *_ = name.split(".")
        block = f"{first}.{second}" if second.isdigit() else first
        n, of = blocks.get(block, (0, 0))
        blocks[block] = (n + int(b.sum()), of + b.numel())
    return blocks


def write(file: Path, mask: Mask) -> None:
    """Write a mask file: safetensors, sealed, per parameter uint8 [ceil(n / 8)]; bit i of byte j is weight 8 j + i.

    The settings and the shapes are JSON under the metadata key "salun_sd". The same mask is the same bytes.
    """
    shapes = {name: list(shape) for name, shape in mask.bits.shapes.items()}
    packed = {name: tensors.in_memory(t) for name, t in mask.bits.packed.items()}
    tensors.write(file, packed, {"salun_sd": json.dumps({**mask.settings, "shapes": shapes})}, sealed=True)


def read(file: Path) -> Mask:
    """The mask in a file. Raises SalunError where it is not a mask file, or is damaged."""
    with sources.meant_as("mask", MAKE):
        content, metadata = tensors.read_sealed(file)
    if any(name.startswith("new/") for name in content):
        raise SalunError(f"{file} is a patch, not a mask: {MAKE}")
    if {"salun_sd", "modelspec.architecture"} <= metadata.keys():
        raise SalunError(f"{file} is a checkpoint, not a mask: {MAKE}")
    try:
        settings = parse_json(metadata["salun_sd"], str(file), SETTINGS)
        bits = bits_of(content, settings.pop("shapes"))
    except KeyError as e:
        raise SalunError(f"{file} is not a mask of salun-sd: {MAKE}") from e
    tensors.warn_without_digest(file, metadata)
    return Mask(bits, settings)


def bits_of(packed: Tensors, shapes: dict) -> Bits:
    """The bits of tensors on disk. Raises KeyError where the tensors are not the bits of these shapes."""
    try:
        sizes = {name: (torch.uint8, (-(-math.prod(shape) // 8),)) for name, shape in shapes.items()}
        if sizes == {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()}:
            return Bits({name: packed[name].read() for name in shapes}, shapes)
    except (TypeError, RuntimeError) as e:  # a shape that is none
        raise KeyError("shapes") from e
    raise KeyError("shapes")


def check(mask: Mask, shapes: dict[str, torch.Size], fingerprint: str) -> None:
    """Raise SalunError unless the mask has the parameters of this UNet and was made for its weights."""
    missing, extra = sorted(shapes.keys() - mask.bits.keys()), sorted(mask.bits.keys() - shapes.keys())
    other = [name for name in shapes.keys() & mask.bits.keys() if shapes[name] != mask.bits.shapes[name]]
    for what, names in (("lacks", missing), ("has unknown", extra), ("has another shape for", sorted(other))):
        if names:
            raise SalunError(f"The mask {what} {some(names, 3)}: it was made for another UNet; {MAKE}")
    if mask.settings.get("base") != fingerprint:
        raise SalunError(
            f"The mask was made for a UNet with fingerprint {str(mask.settings.get('base'))[:12]}, this one is "
            f"{fingerprint[:12]}; {MAKE}"
        )


def digest(spec: str | None) -> str | None:
    """SHA-256, in hex, of the mask file that --mask names; None where it names no file."""
    return hashlib.sha256(Path(spec).read_bytes()).hexdigest() if spec and Path(spec).is_file() else None
