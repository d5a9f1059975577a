"""The mask m_S: which weights may move. Threshold at a density, pack to bits, read back, check against a UNet."""

import json
import math
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from salun_sd.errors import SalunError, UsageError

Bits = dict[str, torch.Tensor]  # parameter name -> bool tensor of the parameter's shape, on the CPU


class Mask(NamedTuple):
    """A frozen result: the bits, and every setting they came from."""

    bits: Bits
    settings: dict


def keep_count(density: float, total: int) -> int:
    """round(density x total). Raises UsageError unless 0 < density <= 1 and at least one weight is kept."""
    if not 0 < density <= 1:
        raise UsageError(f"Density {density:g} is outside (0, 1]: give the share of weights to keep, such as 0.5.")
    if (keep := round(density * total)) == 0:
        raise UsageError(f"Density {density:g} keeps none of {total:,} weights: give a larger --density.")
    return keep


def thresholds(saliency: dict[str, torch.Tensor], counts: list[int]) -> list[float]:
    """The k-th largest value over all tensors together, for each k in counts, exactly and without sorting.

    Non-negative floats order like their bit patterns, so counting the high 16 bits finds the bucket that the
    k-th value is in, and counting the low 16 bits inside that bucket finds the value.
    """
    patterns = [s.contiguous().view(-1).view(torch.int32) for s in saliency.values()]
    # patterns: list of [n] int32, non-negative
    high = sum(torch.bincount(p >> 16, minlength=1 << 15) for p in patterns)
    found = []
    for k in counts:
        bucket, before = _bucket_of(high, k)
        low = sum(torch.bincount(p[p >> 16 == bucket] & 0xFFFF, minlength=1 << 16) for p in patterns)
        value, _ = _bucket_of(low, k - before)
        found.append(torch.tensor((bucket << 16) + value, dtype=torch.int32).view(torch.float32).item())
    return found


def _bucket_of(table: torch.Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th item counted from the top, and how many items are in the buckets above it."""
    from_top = table.flip(0).cumsum(0)
    i = int(torch.searchsorted(from_top, k))
    return len(table) - 1 - i, int(from_top[i - 1]) if i else 0


def select(saliency: dict[str, torch.Tensor], threshold: float, count: int) -> Bits:
    """m_S = 1(|g| >= threshold) with exactly count ones: of the weights at the threshold, the first by position."""
    spare = count - sum(int((s > threshold).sum()) for s in saliency.values())
    bits = {}
    for name, s in saliency.items():
        chosen = s > threshold
        ties = (s == threshold).view(-1).nonzero().squeeze(1)[:spare]
        chosen.view(-1)[ties] = True
        spare -= len(ties)
        bits[name] = chosen.cpu()
    return bits


def random_bits(shapes: dict[str, torch.Size], density: float, seed: int) -> Bits:
    """A control: exactly round(density x total) weights chosen at random over the whole UNet, drawn in the order of
    their names: that of a file is another in each form of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shapes[name], generator=generator) for name in sorted(shapes)}
    count = keep_count(density, sum(s.numel() for s in scores.values()))
    return select(scores, thresholds(scores, [count])[0], count)


def full_bits(shapes: dict[str, torch.Size]) -> Bits:
    """The other control: every weight may move."""
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}


def kept(bits: Bits) -> tuple[int, int]:
    """How many weights the mask keeps, and of how many."""
    return sum(int(b.sum()) for b in bits.values()), sum(b.numel() for b in bits.values())


def kept_per_block(bits: Bits) -> dict[str, tuple[int, int]]:
    """`kept` for each block of the UNet: conv_in, time_embedding, down_blocks.0, ..., conv_out."""
    blocks: dict[str, Bits] = {}
    for name, b in bits.items():
        first, second, *_ = name.split(".")
        blocks.setdefault(f"{first}.{second}" if second.isdigit() else first, {})[name] = b
    return {block: kept(members) for block, members in blocks.items()}


def packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bool of any shape => uint8 [ceil(n / 8)], bit i of byte j is weight 8 j + i."""
    return torch.from_numpy(np.packbits(bits.cpu().numpy().reshape(-1), bitorder="little"))


def unpacked_bits(packed: torch.Tensor, shape) -> torch.Tensor:
    """The inverse of `packed_bits`."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(tuple(shape))


def pack(mask: Mask) -> bytes:
    """The bytes of a mask file: safetensors, per parameter uint8 [ceil(n / 8)], bit i of byte j is weight 8 j + i.

    One metadata key, "salun_sd", holds the settings and the shapes as JSON: safetensors orders several keys at
    random, and the same mask has to be the same bytes.
    """
    shapes = {name: list(b.shape) for name, b in mask.bits.items()}
    packed = {name: packed_bits(b) for name, b in mask.bits.items()}
    return save_tensors(packed, {"salun_sd": json.dumps({**mask.settings, "shapes": shapes})})


def unpack(data: bytes, name: str) -> Mask:
    """The inverse of `pack`; name is the file's, for the SalunError raised when it is no mask file or truncated."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        settings = json.loads(header["__metadata__"]["salun_sd"])
        shapes = settings.pop("shapes")
        packed = load_tensors(data)
        sizes = {key: -(-math.prod(shape) // 8) for key, shape in shapes.items()}
        if sizes != {key: t.numel() for key, t in packed.items()}:
            raise ValueError("the header's shapes are not those of the bits")
        bits = {key: unpacked_bits(packed[key], shape) for key, shape in shapes.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise SalunError(f"{name} is not a salun-sd mask, or it is truncated; make it again with: salun-sd mask") from e
    return Mask(bits, settings)


def check(mask: Mask, shapes: dict[str, torch.Size], fingerprint: str) -> None:
    """Raise SalunError unless the mask has exactly this UNet's parameters and was made for these weights."""
    missing, extra = sorted(shapes.keys() - mask.bits.keys()), sorted(mask.bits.keys() - shapes.keys())
    other = [name for name in shapes.keys() & mask.bits.keys() if shapes[name] != mask.bits[name].shape]
    for what, names in (("lacks", missing), ("has unknown", extra), ("has another shape for", sorted(other))):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise SalunError(f"The mask {what} {shown}: it was made for another UNet; make one with: salun-sd mask")
    if mask.settings.get("base") != fingerprint:
        raise SalunError(
            f"The mask was made for a UNet with fingerprint {str(mask.settings.get('base'))[:12]}, this one is "
            f"{fingerprint[:12]}; make one for it with: salun-sd mask"
        )
