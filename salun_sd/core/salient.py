"""The weights that a mask lets move, and what an optimizer remembers of each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from salun_sd.core import mask
from salun_sd.core.mask import Bits, packed_bits, unpacked_bits

TOGETHER = 1 << 24  # weights that a GPU updates at a time: most parameters are too small to keep it busy
WAITING = 5  # of these groups wait at most for the last gradient of theirs: 3.7 in SD 1.x, 4.4 in SDXL


@dataclass(eq=False)
class Salient:
    """The salient weights of one parameter, or of several that are updated together: k of their n."""

    parameters: dict[str, nn.Parameter]  # of one dtype, on one device
    counts: list[int]  # of the k, how many are each one's
    packed: torch.Tensor  # the mask's bits, uint8 [ceil(n / 8)]
    values: torch.Tensor  # float32 [k], of which the parameters hold the rounding to their own dtype
    moments: dict[str, torch.Tensor]  # what the rule remembers of earlier steps, float32 [k] each
    grad: torch.Tensor | None = None  # float32 [k], where it has to be held
    updated: int = 0  # the last step that changed it
    arrived: dict[str, torch.Tensor] = field(default_factory=dict)  # dense gradients that wait for the others'

    @classmethod
    def of(
        cls, parameters: dict[str, nn.Parameter], bits: Bits, values: Mapping[str, torch.Tensor] | None,
        moments: Iterable[str],
    ) -> "Salient":  # fmt: skip
        """Before the first step, at `values` by name, or at the parameters' own."""
        device, packed = next(iter(parameters.values())).device, [bits.packed[name] for name in parameters]
        dense = [p.detach() if values is None else values[name] for name, p in parameters.items()]
        kept = [mask.gather(d, of.to(d.device)).float().to(device) for d, of in zip(dense, packed, strict=True)]
        together = packed[0] if len(packed) == 1 else packed_bits(in_one([bits[name] for name in parameters]))
        start = in_one(kept)
        of_kinds = {kind: torch.zeros_like(start) for kind in moments}
        return cls(parameters, [len(k) for k in kept], together.to(device), start, of_kinds)

    @property
    def sizes(self) -> list[int]:
        """How many weights each parameter has."""
        return [p.numel() for p in self.parameters.values()]

    def by_name(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor [k] in the parts of the parameters, not copied."""
        return dict(zip(self.parameters, t.split(self.counts), strict=True))

    def gather(self, dense: list[torch.Tensor]) -> torch.Tensor:
        """The salient entries of tensors of the parameters' shapes, float32 [k]."""
        return mask.gather(in_one(dense), self.packed).float()

    @torch.no_grad()
    def scatter(self, values: torch.Tensor) -> None:
        """Write values [k] into the parameters."""
        parameters = list(self.parameters.values())
        flat = in_one(parameters)
        mask.scatter(values, flat, self.packed)
        if len(parameters) > 1 or not parameters[0].is_contiguous():  # then `flat` is a copy
            for p, part in zip(parameters, flat.split(self.sizes), strict=True):
                p.copy_(part.view(p.shape))

    def apart(self) -> dict[str, "Salient"]:
        """The same, each parameter alone. Values and moments are not copied."""
        bits = unpacked_bits(self.packed, (sum(self.sizes),))
        parts = zip(self.parameters.items(), bits.split(self.sizes), strict=True)
        values, moments = self.by_name(self.values), {kind: self.by_name(t) for kind, t in self.moments.items()}
        grads = {} if self.grad is None else self.by_name(self.grad)
        return {
            name: Salient({name: p}, [len(values[name])], packed_bits(own).to(bits.device), values[name],
                          {kind: of[name] for kind, of in moments.items()}, grads.get(name), self.updated)
            for (name, p), own in parts
        }  # fmt: skip


def in_one(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Their entries in one tensor [n]; of a single one that is contiguous, no copy."""
    flat = [t.contiguous().view(-1) for t in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def groups(parameters: Mapping[str, nn.Parameter], bits: Bits, most: int | None) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters with a salient weight, those that are updated together in one dictionary: up to `most` weights, or
    else as many as suit the device."""
    group, size, kind = {}, 0, None
    for name, p in parameters.items():
        if not bits.packed[name].any():
            continue
        limit = (TOGETHER if p.is_cuda else 0) if most is None else most
        if group and (size + p.numel() > limit or kind != (p.dtype, p.device)):
            yield group
            group, size = {}, 0
        group[name] = p
        size, kind = size + p.numel(), (p.dtype, p.device)
    if group:
        yield group
