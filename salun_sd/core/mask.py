"""The mask m_S: which weights may move. Exact thresholds at a density; bits are packed in memory."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from salun_sd.errors import UsageError

PASS = 1 << 18  # weights that a core works on at a time: the temporary tensors stay in its cache
ONES = torch.tensor([byte.bit_count() for byte in range(256)])  # in a byte


class Bits(Mapping):
    """The bits of a mask: parameter name -> bool tensor of the parameter's shape, on the CPU.

    They are held packed, one bit for each weight, and unpacked at each access.
    """

    def __init__(self, packed: dict[str, torch.Tensor], shapes: Mapping[str, torch.Size]):
        self.packed = packed  # name -> uint8 [ceil(n / 8)], as `packed_bits` gives it
        self.shapes = {name: torch.Size(shapes[name]) for name in packed}

    @classmethod
    def of(cls, bits: Iterable[tuple[str, torch.Tensor]]) -> "Bits":
        """From pairs of a name and a bool tensor. A generator need not hold two tensors in memory at once."""
        packed, shapes = {}, {}
        for name, b in bits:
            packed[name], shapes[name] = packed_bits(b), b.shape
        return cls(packed, shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpacked_bits(self.packed[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def keep_count(density: float, total: int) -> int:
    """round(density x total). Raises UsageError unless 0 < density <= 1 and at least one weight is kept."""
    if not 0 < density <= 1:
        raise UsageError(f"Density {density} is outside (0, 1]: give the share of weights to keep, such as 0.5.")
    if (keep := round(density * total)) == 0:
        raise UsageError(f"Density {density} keeps none of {total:,} weights: give a larger density.")
    return keep


def cut(saliency: Mapping[str, torch.Tensor], density: float) -> Bits:
    """The mask of exactly round(density x total) ones: the largest values over all tensors together.

    saliency: parameter name -> float32, none negative, as `GradientSum.result` gives it. Of equal values the first by
    position are kept. Raises TypeError for another dtype, ValueError naming the tensor with a negative value or NaN,
    UsageError as `keep_count` does.
    """
    for name, s in saliency.items():
        if s.dtype != torch.float32:
            raise TypeError(f"The saliency of {name} is {s.dtype}: give float32.")
        if not (s >= 0).all():
            raise ValueError(f"The saliency of {name} has a negative value or NaN: give absolute values.")
    return cuts(saliency, [keep_count(density, sum(s.numel() for s in saliency.values()))])[0][1]


def cuts(saliency: Mapping[str, torch.Tensor], counts: list[int]) -> list[tuple[float, Bits]]:
    """For each k in counts: the k-th largest value over all tensors together, and the mask of exactly k ones,
    m_S = 1(|g| >= threshold); of weights at the threshold the first by position."""
    return [(t, select(saliency, t, k)) for t, k in zip(thresholds(saliency, counts), counts, strict=True)]


def thresholds(saliency: Mapping[str, torch.Tensor], counts: list[int]) -> list[float]:
    """The k-th largest value over all tensors together, for each k in counts, exactly and without sorting.

    Non-negative floats order like their bit patterns, so counting the high 16 bits finds the bucket that the
    k-th value is in, and counting the low 16 bits inside that bucket finds the value. Two passes for all of counts.
    """
    patterns, cores = list(_patterns(list(saliency.values()))), torch.get_num_threads()
    with ThreadPoolExecutor(cores) as threads:  # torch counts on one core

        def over_all(table: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            """The sum of the tables of all patterns. Each thread adds up its own, so few tables are in memory."""
            return sum(threads.map(lambda i: sum(map(table, patterns[i::cores])), range(cores)))

        high = over_all(lambda p: torch.bincount(_high(p), minlength=1 << 15))
        places = [_bucket_of(high, k) for k in counts]

        def low_of(p: torch.Tensor) -> torch.Tensor:
            return torch.stack([
                torch.bincount(p[_high(p) == bucket] & 0xFFFF, minlength=1 << 16) for bucket, _ in places
            ])  # fmt: skip

        low = over_all(low_of)  # [len(counts), 65536]
    values = [(b << 16) + _bucket_of(table, k - before)[0]
              for k, (b, before), table in zip(counts, places, low, strict=True)]  # fmt: skip
    return torch.tensor(values, dtype=torch.int32).view(torch.float32).tolist()


def _patterns(values: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bit patterns of float32 values, int32 [n], a pass at a time."""
    for v in values:
        yield from v.contiguous().view(-1).view(torch.int32).split(pass_size(v.numel(), v.device))


def _high(patterns: torch.Tensor) -> torch.Tensor:
    """Their high 16 bits, a view, int16 [n]."""
    return patterns.view(torch.int16)[1 if sys.byteorder == "little" else 0 :: 2]


def _bucket_of(table: torch.Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th item counted from the top, and how many items are in the buckets above it."""
    from_top = table.flip(0).cumsum(0)
    i = int(torch.searchsorted(from_top, k))
    return len(table) - 1 - i, int(from_top[i - 1]) if i else 0


def select(saliency: Mapping[str, torch.Tensor], threshold: float, count: int) -> Bits:
    """m_S = 1(|g| >= threshold) with exactly count ones: of the weights at the threshold, the first by position."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        packed = threads.map(lambda s: _packed_from(s, threshold), saliency.values())
        bits = Bits(dict(zip(saliency, packed, strict=True)), {name: s.shape for name, s in saliency.items()})
    excess = kept(bits)[0] - count
    for name in reversed(list(bits)):
        if not excess:
            break
        ties = (saliency[name] == threshold).view(-1).nonzero().squeeze(1)[-excess:].cpu()
        fewer = bits[name]
        fewer.view(-1)[ties] = False
        bits.packed[name] = packed_bits(fewer)
        excess -= len(ties)
    return bits


def _packed_from(values: torch.Tensor, threshold: float) -> torch.Tensor:
    """The bits of values >= threshold, packed."""
    passes = values.contiguous().view(-1).split(pass_size(values.numel(), values.device))
    return torch.cat([packed_bits(v >= threshold) for v in passes])


def random_bits(shapes: dict[str, torch.Size], density: float, seed: int) -> Bits:
    """A control: exactly round(density x total) weights, chosen at random over the whole module. Random numbers are
    drawn in the order of the names, so that a pipeline folder and a single file give the same mask."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shapes[name], generator=generator) for name in sorted(shapes)}
    return cut(scores, density)


def full_bits(shapes: dict[str, torch.Size]) -> Bits:
    """The other control: every weight may move."""
    return Bits.of((name, torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items())


def kept(bits: Bits) -> tuple[int, int]:
    """How many weights the mask keeps, and of how many."""
    ones = sum(int(torch.bincount(packed, minlength=256) @ ONES) for packed in bits.packed.values())
    return ones, sum(shape.numel() for shape in bits.shapes.values())


def density(bits: Bits) -> float:
    """The share of weights that the mask keeps."""
    n, of = kept(bits)
    return n / of


def packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bool of any shape => uint8 [ceil(n / 8)], bit i of byte j is weight 8 j + i."""
    return torch.from_numpy(np.packbits(bits.cpu().numpy().reshape(-1), bitorder="little"))


def unpacked_bits(packed: torch.Tensor, shape) -> torch.Tensor:
    """The inverse of `packed_bits`, on the device of `packed`."""
    n = math.prod(shape)
    if packed.device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little"))
    else:
        bits = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).view(-1)[:n]
    return bits.view(torch.bool).view(tuple(shape))


def pass_size(n: int, device: torch.device) -> int:
    """How many of n weights are worked on at a time."""
    return min(n, PASS) if device.type == "cpu" else n


def gather(t: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """The entries of a tensor of any shape whose packed bits are 1: [k], in flat order."""
    flat = t.reshape(-1)
    if flat.device.type != "cpu":
        return flat.masked_select(unpacked_bits(packed, flat.shape))
    return torch.cat([flat[where].index_select(0, ones) for where, ones in _passes(packed, len(flat))])


def scatter(values: torch.Tensor, flat: torch.Tensor, packed: torch.Tensor) -> None:
    """The inverse of `gather`, in place: write values [k] into a tensor [n], rounded to its dtype."""
    if flat.device.type != "cpu":
        flat.masked_scatter_(unpacked_bits(packed, flat.shape), values.to(flat.dtype))  # waits for no count
        return
    done = 0
    for where, ones in _passes(packed, len(flat)):
        flat[where].index_copy_(0, ones, values[done : done + len(ones)].to(flat.dtype))
        done += len(ones)


def _passes(packed: torch.Tensor, n: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Of n weights a pass at a time: where they are, and the places of the ones among them, int64. A CPU takes several
    times as long to go by torch's bool masks."""
    for start in range(0, n, PASS):
        where = slice(start, min(start + PASS, n))
        bits = unpacked_bits(packed[start // 8 : -(-where.stop // 8)], (where.stop - start,))
        yield where, torch.from_numpy(np.flatnonzero(bits.numpy()))
