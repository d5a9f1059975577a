"""Adam whose state lives where the mask is 1, and which takes each gradient as soon as it is made."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from salun_sd import ranks
from salun_sd.mask import Bits, in_passes
from salun_sd.tensors import Lazy, Tensors

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class Salient:
    """A parameter's salient weights, k of its n."""

    p: nn.Parameter
    packed: torch.Tensor  # the mask's bits, uint8 [ceil(n / 8)]
    values: torch.Tensor  # float32 [k], of which the parameter holds the rounding to its own dtype
    mean: torch.Tensor  # first moment, float32 [k]
    square: torch.Tensor  # second moment, float32 [k]
    grad: torch.Tensor | None = None  # float32 [k], where it has to be held
    base: torch.Tensor | None = None  # the base's values, in the parameter's dtype [k], where they are asked for

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """The salient entries of a tensor of the parameter's shape, float32 [k]."""
        passes = in_passes(self.packed, self.p.numel())
        return torch.cat([dense.view(-1)[where].masked_select(bits) for where, bits in passes]).float()

    @torch.no_grad()
    def scatter(self, values: torch.Tensor) -> None:
        """Write values [k] into the parameter."""
        done, n = 0, self.p.numel()
        for where, bits in in_passes(self.packed, n):
            k = int(bits.sum()) if where.stop < n else len(values) - done  # on a GPU, one pass: it is not waited for
            self.p.view(-1)[where].masked_scatter_(bits, values[done : done + k].to(self.p.dtype))
            done += k


class SalientAdam:
    """Adam (arXiv 1412.6980, algorithm 1) over the weights that a mask lets move.

    It never sees the other weights, so that nothing can move them: theta_u equals theta_o outside the mask by
    construction (SalUn, arXiv 2310.12508, eq. 4). Updates are those of dense Adam with a masked gradient.

    Beside the UNet it holds 12 bytes for each salient weight, and the mask's bits. A dense gradient is reduced to its
    salient entries and freed in the backward pass that makes it, and unless `holds`, the update is made there and then.
    `clip` bounds the norm of the salient gradient (and needs `holds`). With several processes, gradients are summed
    over them; only their salient entries travel.
    """

    def __init__(
        self, unet: nn.Module, bits: Bits, base: Tensors, lr: float, *, clip: float | None = None, holds: bool = False,
        keeps_base: bool = False,
    ):  # fmt: skip
        self.lr, self.clip, self.holds, self.steps = lr, clip, holds or clip is not None, 0
        self.salient: dict[str, Salient] = {}
        self._hooks: list = []
        for name, p in unet.named_parameters():
            chosen = bits[name]
            p.requires_grad_(bool(chosen.any()))
            if not p.requires_grad:
                continue
            values = base[name].read()[chosen].float().to(p.device)  # not the UNet's: it may hold them rounded
            s = Salient(p, bits.packed[name].to(p.device), values, torch.zeros_like(values), torch.zeros_like(values))
            s.base = values.to(p.dtype, copy=True) if keeps_base else None
            self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._take, s)))
            self.salient[name] = s

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the backward passes of one update."""
        self.steps += 1
        yield
        if not self.holds:
            return
        held = [s for s in self.salient.values() if s.grad is not None]
        for s in held:
            ranks.added(s.grad)
        if self.clip is not None:
            norms = [torch.linalg.vector_norm(s.grad, dtype=torch.float64) for s in held]
            norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            for s in held:
                s.grad.mul_(min(1.0, self.clip / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
        for s in held:
            self._update(s, s.grad)
            s.grad = None

    def _take(self, s: Salient, p: nn.Parameter) -> None:
        grad = s.gather(p.grad.contiguous())
        p.grad = None
        if not self.holds:
            self._update(s, ranks.added(grad))
        else:
            s.grad = grad if s.grad is None else s.grad.add_(grad)

    @torch.no_grad()
    def _update(self, s: Salient, grad: torch.Tensor) -> None:
        s.mean.lerp_(grad, 1 - BETA1)
        s.square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        denominator = (s.square.sqrt() / math.sqrt(1 - BETA2**self.steps)).add_(EPSILON)
        s.values.addcdiv_(s.mean, denominator, value=-self.lr / (1 - BETA1**self.steps))
        s.scatter(s.values)

    @contextmanager
    def base(self) -> Iterator[None]:
        """The UNet as it was before training, for as long as it is asked."""
        for s in self.salient.values():
            s.scatter(s.base)
        try:
            yield
        finally:
            for s in self.salient.values():
                s.scatter(s.values)

    def are_finite(self) -> bool:
        return all(bool(s.values.isfinite().all()) for s in self.salient.values())

    def values(self) -> dict[str, torch.Tensor]:
        """The trained values, float32 [k] for each parameter with salient weights, on the CPU."""
        return {name: s.values.cpu() for name, s in self.salient.items()}

    def close(self) -> None:
        """Let go of the UNet and of all state."""
        for hook in self._hooks:
            hook.remove()
        self.salient.clear()

    def state(self) -> Tensors:
        """What `restore` needs, beside the number of steps."""
        kinds = ("values", "mean", "square")
        held = {f"{kind}/{name}": getattr(s, kind) for name, s in self.salient.items() for kind in kinds}
        return {name: Lazy(t.dtype, t.shape, t.cpu) for name, t in held.items()}

    def restore(self, state: Mapping, steps: int) -> None:
        self.steps = steps
        for name, s in self.salient.items():
            for kind in ("values", "mean", "square"):
                getattr(s, kind).copy_(state[f"{kind}/{name}"].read())
            s.scatter(s.values)
