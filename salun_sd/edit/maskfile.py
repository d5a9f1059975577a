"""Mask files: packed, read back, checked against a UNet."""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from salun_sd.core.mask import Bits
from salun_sd.errors import SalunError, some


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


def pack(mask: Mask) -> bytes:
    """The bytes of a mask file: safetensors, per parameter uint8 [ceil(n / 8)], bit i of byte j is weight 8 j + i.

    The settings and the shapes are JSON under one metadata key, "salun_sd": safetensors writes several keys in random
    order, and the same mask has to be the same bytes.
    """
    shapes = {name: list(shape) for name, shape in mask.bits.shapes.items()}
    return save_tensors(mask.bits.packed, {"salun_sd": json.dumps({**mask.settings, "shapes": shapes})})


def unpack(data: bytes, name: str) -> Mask:
    """The inverse of `pack`. Raises SalunError, with the file's `name`, where it is not a mask file or truncated."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        settings = json.loads(header["__metadata__"]["salun_sd"])
        shapes = settings.pop("shapes")
        packed = load_tensors(data)
        sizes = {key: -(-math.prod(shape) // 8) for key, shape in shapes.items()}
        if sizes != {key: t.numel() for key, t in packed.items()}:
            raise ValueError("the shapes in the header do not fit the bits")
        bits = Bits({key: packed[key] for key in shapes}, shapes)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise SalunError(f"{name} is not a salun-sd mask, or it is truncated; make it again with: salun-sd mask") from e
    return Mask(bits, settings)


def check(mask: Mask, shapes: dict[str, torch.Size], fingerprint: str) -> None:
    """Raise SalunError unless the mask has the parameters of this UNet and was made for its weights."""
    missing, extra = sorted(shapes.keys() - mask.bits.keys()), sorted(mask.bits.keys() - shapes.keys())
    other = [name for name in shapes.keys() & mask.bits.keys() if shapes[name] != mask.bits.shapes[name]]
    for what, names in (("lacks", missing), ("has unknown", extra), ("has another shape for", sorted(other))):
        if names:
            raise SalunError(f"The mask {what} {some(names, 3)}: it was made for another UNet; make one with: salun-sd "
                             "mask")  # fmt: skip
    if mask.settings.get("base") != fingerprint:
        raise SalunError(
            f"The mask was made for a UNet with fingerprint {str(mask.settings.get('base'))[:12]}, this one is "
            f"{fingerprint[:12]}; make one for it with: salun-sd mask"
        )


def digest(spec: str | None) -> str | None:
    """SHA-256, in hex, of the mask file that --mask names; None where it names no file."""
    return hashlib.sha256(Path(spec).read_bytes()).hexdigest() if spec and Path(spec).is_file() else None
