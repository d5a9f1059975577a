"""Patches: the weights that an erasure changes, and nothing else."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from salun_sd.checkpoint import provenance, sources, tensors
from salun_sd.checkpoint.tensors import Lazy, Tensors, in_memory
from salun_sd.core.mask import Bits, gather, scatter, unpacked_bits
from salun_sd.errors import SalunError, TrainingError, UsageError
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.contents import no_file
from salun_sd.runtime.documents import parse_json

GIVE = "give a file that salun-sd erase --format patch wrote."


class Patch(NamedTuple):
    """For each UNet parameter with k salient weights of n: mask/NAME uint8 [ceil(n / 8)], new/NAME [k] in the
    checkpoint's dtype and, where it can be reverted, old/NAME [k]."""

    tensors: Tensors
    record: dict  # the provenance, as in salun.json

    @property
    def is_reversible(self) -> bool:
        return any(key.startswith("old/") for key in self.tensors)


def of_training(values: dict[str, torch.Tensor], bits: Bits, base: Tensors, reversible: bool) -> Patch:
    """The patch of trained values, float32 [k] for each parameter with k salient weights, in the dtype of the base's
    own tensors. Its record is empty.

    Raises TrainingError naming a weight that the dtype cannot hold.
    """
    changes: Tensors = {}
    for name, trained in values.items():
        new = trained.to(base[name].dtype)
        if not new.isfinite().all():
            raise TrainingError(f"{name} has a value too large for {base[name].dtype}: lower --lr.")
        changes[f"mask/{name}"], changes[f"new/{name}"] = in_memory(bits.packed[name]), in_memory(new)
        if reversible:
            changes[f"old/{name}"] = Lazy(new.dtype, new.shape, partial(_salient, base[name], bits.packed[name]))
    return Patch(changes, {})


def _salient(base: Lazy, packed: torch.Tensor) -> torch.Tensor:
    return gather(base.read(), packed)


def merged(weights: Tensors, patch: Patch, which: str = "new") -> Tensors:
    """A UNet's tensors with the patch's values where its mask is 1: "new", or "old" to revert. Every other bit stays.
    Each tensor is merged when it is read."""
    changed = dict(weights)
    for key, mask in patch.tensors.items():
        kind, _, name = key.partition("/")
        if kind == "mask":
            t, values = weights[name], patch.tensors[f"{which}/{name}"]
            changed[name] = Lazy(t.dtype, t.shape, partial(_merge, t, mask, values))
    return changed


def _merge(base: Lazy, mask: Lazy, values: Lazy) -> torch.Tensor:
    t = base.read().clone(memory_format=torch.contiguous_format)
    scatter(values.read(), t.view(-1), mask.read())
    return t


def write(file: Path, patch: Patch) -> None:
    """Write a patch file: safetensors, sealed, with the record as JSON under the metadata key "salun_sd"."""
    record = json.dumps(patch.record, ensure_ascii=False)
    tensors.write(file, patch.tensors, {provenance.KEY: record}, sealed=True)


def read(file: Path) -> Patch:
    """A patch file, its tensors still on disk. Raises UsageError if it is missing, SalunError if it is not a patch or
    is damaged."""
    if fault := no_file(file):
        raise UsageError(f"Patch {file} {fault}: {GIVE}")
    with sources.meant_as("patch", GIVE):
        content, metadata = tensors.read_sealed(file)
    names = {key.partition("/")[2] for key in content}
    whole = names and all(f"{kind}/{name}" in content for name in names for kind in ("mask", "new"))
    if not whole or provenance.KEY not in metadata:
        raise SalunError(f"{file} is not a patch of salun-sd: {GIVE}")
    record = parse_json(metadata[provenance.KEY], str(file), provenance.RECORD)
    tensors.warn_without_digest(file, metadata)
    return Patch(content, record)


def check(patch: Patch, file: Path, weights: Tensors, name: str, fingerprint: str, revert: bool) -> None:
    """Raise SalunError unless the weights are those that the patch is for: the base's or, to revert, the erased."""
    base, erased = patch.record["base"], patch.record["erased"]["fingerprint"]
    if revert and not patch.is_reversible:
        raise SalunError(f"{file} does not hold the base's values: it was made without --reversible. Take the base "
                         "itself.")  # fmt: skip
    before, after = (erased, base["fingerprint"]) if revert else (base["fingerprint"], erased)
    if fingerprint == before:
        values = "old" if revert else "new"
        if not _fits(patch, weights) or tensors.fingerprint(merged(weights, patch, values)) != after:
            raise SalunError(f"{file} is damaged: what it makes of {name} is not what its record says. Fetch it again.")
        return
    if fingerprint == after:
        state = "is the base already: there is nothing to revert" if revert else "has this patch already: take it as is"
        raise SalunError(f"{name} {state}.")
    wanted = f"what it made of {base['model']}" if revert else base["model"]
    raise SalunError(f"{file} is for {wanted} (UNet {before[:12]}), not for {name} (UNet {fingerprint[:12]}): give "
                     "that model.")  # fmt: skip


def _fits(patch: Patch, weights: Tensors) -> bool:
    """Whether the patch has a value for each 1 of its masks, and the UNet has its parameters in their dtypes."""
    for key, mask in patch.tensors.items():
        kind, _, name = key.partition("/")
        if kind != "mask":
            continue
        values = [patch.tensors[f"{k}/{name}"] for k in ("new", "old") if f"{k}/{name}" in patch.tensors]
        if name not in weights or mask.bytes != -(-weights[name].shape.numel() // 8):
            return False
        ones = int(unpacked_bits(mask.read(), weights[name].shape).sum())
        if any(v.shape != (ones,) or v.dtype != weights[name].dtype for v in values):
            return False
    return True


def changes(base: Tensors, other: Tensors, bits: Bits) -> dict[str, int]:
    """Count the weights whose bytes differ: {"inside": n, "outside": n}.

    A tensor without a mask counts as outside. Raises SalunError if a tensor is missing, added or has another shape or
    dtype.
    """
    inside = outside = 0
    if extra := other.keys() - base.keys():
        raise SalunError(f"The saved UNet has a tensor that the base does not have: {min(extra)}.")
    for name, t in Bar(base.items(), desc="compare", unit="tensor", leave=None):
        if name not in other or (other[name].shape, other[name].dtype) != (t.shape, t.dtype):
            raise SalunError(f"The saved UNet lost {name}, or its shape or dtype changed.")
        old, new = (x.read().reshape(-1, 1).view(torch.uint8) for x in (t, other[name]))
        differs = (old != new).any(1)  # [n]
        salient = bits[name].view(-1) if name in bits else torch.zeros(len(differs), dtype=torch.bool)
        inside += int((differs & salient).sum())
        outside += int((differs & ~salient).sum())
    return {"inside": inside, "outside": outside}
