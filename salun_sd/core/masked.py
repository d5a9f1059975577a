"""Optimizers of the weights that a mask lets move: Adam and SGD whose state is no larger than the mask is dense."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from salun_sd.core.mask import Bits, in_passes
from salun_sd.errors import some
from salun_sd.runtime import ranks

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class Salient:
    """A parameter's salient weights, k of its n."""

    p: nn.Parameter
    packed: torch.Tensor  # the mask's bits, uint8 [ceil(n / 8)]
    values: torch.Tensor  # float32 [k], of which the parameter holds the rounding to its own dtype
    moments: dict[str, torch.Tensor]  # what the rule remembers of earlier steps, float32 [k] each
    grad: torch.Tensor | None = None  # float32 [k], where it has to be held
    base: torch.Tensor | None = None  # the values before training, in the parameter's dtype [k], where asked for
    updated: int = 0  # the last step that changed it

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


class Masked:
    """What both optimizers share. One `step()` is one update:

        adam = MaskedAdam(model, bits, lr=1e-5)
        with adam.step():
            loss(batch).mean().backward()

    They never see the other weights, so that nothing can move them: theta_u equals theta_o outside the mask by
    construction (SalUn, arXiv 2310.12508, eq. 4). Each update equals the dense optimizer's with a masked gradient.

    model: any module; its parameters' names are the mask's, else ValueError. Parameters without a salient weight no
    longer require a gradient. values: parameter name -> tensor, from which training starts, where the module holds them
    rounded; each is looked up once. Default: the module's own. clip bounds the norm of the salient gradient of a step.
    holds: gradients wait for the end of the step, so that it may have several backward passes; clip needs that, and
    sets it. keeps_base: the values before training are kept for `base()`.

    A dense gradient is reduced to its salient entries and freed in the backward pass that makes it, and unless held,
    the update is made there and then. In a run of several processes, gradients are summed over them; only their salient
    entries travel.

    A backward pass outside `step()`, a second one in a step that does not hold, and a step without any raise
    RuntimeError. `lr` may be set between steps.
    """

    moments: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, bits: Bits, lr: float, *, values: Mapping[str, torch.Tensor] | None = None,
        clip: float | None = None, holds: bool = False, keeps_base: bool = False,
    ):  # fmt: skip
        parameters = dict(model.named_parameters())
        _check_names(parameters, bits)
        self.lr, self.clip, self.holds, self.keeps_base = lr, clip, holds or clip is not None, keeps_base
        self.steps, self._stepping = 0, False
        self.salient: dict[str, Salient] = {}
        self._hooks: list = []
        for name, p in parameters.items():
            chosen = bits[name]
            p.requires_grad_(bool(chosen.any()))
            if not p.requires_grad:
                continue
            dense = p.detach() if values is None else values[name]
            own = dense[chosen.to(dense.device)].float().to(p.device)
            s = Salient(p, bits.packed[name].to(p.device), own, {kind: torch.zeros_like(own) for kind in self.moments})
            s.base = own.to(p.dtype, copy=True) if keeps_base else None
            self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._take, s)))
            self.salient[name] = s

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the backward passes of one update."""
        if self._stepping:
            raise RuntimeError("A step is open already: end it before the next.")
        self.steps += 1
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
        if not self.holds:
            if not any(s.updated == self.steps for s in self.salient.values()):
                raise RuntimeError("The step ended without a gradient: call backward() inside it.")
            return
        held = [s for s in self.salient.values() if s.grad is not None]
        if not held:
            raise RuntimeError("The step ended without a gradient: call backward() inside it.")
        for s in held:
            ranks.added(s.grad)
        if self.clip is not None:
            norms = [torch.linalg.vector_norm(s.grad, dtype=torch.float64) for s in held]
            norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            for s in held:
                s.grad.mul_(min(1.0, self.clip / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
        for s in held:
            self._apply(s, s.grad)
            s.grad = None

    def _take(self, s: Salient, p: nn.Parameter) -> None:
        """The hook that a parameter's gradient is given to as soon as it is made."""
        grad = s.gather(p.grad.contiguous())
        p.grad = None
        if not self._stepping:
            raise RuntimeError("A gradient came outside a step: put backward() inside `with optimizer.step():`.")
        if not self.holds:
            if s.updated == self.steps:
                raise RuntimeError("A second backward pass in one step: make the optimizer with holds=True.")
            self._apply(s, ranks.added(grad))
        else:
            s.grad = grad if s.grad is None else s.grad.add_(grad)

    @torch.no_grad()
    def _apply(self, s: Salient, grad: torch.Tensor) -> None:
        self.update(s, grad)
        s.updated = self.steps
        s.scatter(s.values)

    def update(self, s: Salient, grad: torch.Tensor) -> None:
        """The rule: change s.values [k] and s.moments in place by a gradient, float32 [k]."""
        raise NotImplementedError

    @contextmanager
    def base(self) -> Iterator[None]:
        """The module as it was before training, for as long as it is asked. Needs keeps_base, else RuntimeError."""
        if not self.keeps_base:
            raise RuntimeError("The values before training were not kept: make the optimizer with keeps_base=True.")
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
        """Let go of the module and of all state."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.salient.clear()

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs, beside the number of steps: KIND/PARAMETER -> float32 [k], not copied."""
        return {
            f"{kind}/{name}": t
            for name, s in self.salient.items()
            for kind, t in {"values": s.values, **s.moments}.items()
        }

    def restore(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Go on after so many steps, from what `state` gave then."""
        self.steps = steps
        for name, s in self.salient.items():
            s.updated = steps
            for kind, t in {"values": s.values, **s.moments}.items():
                t.copy_(state[f"{kind}/{name}"])
            s.scatter(s.values)


def _check_names(parameters: Mapping[str, nn.Parameter], bits: Bits) -> None:
    """Raises ValueError unless a mask has the parameters of a module, in their shapes."""
    odd = sorted(parameters.keys() ^ bits.keys())
    odd += [name for name in parameters.keys() & bits.keys() if parameters[name].shape != bits.shapes[name]]
    if odd:
        raise ValueError(f"The mask and the module differ in {some(odd)}: a mask fits the module it was made for.")


class MaskedAdam(Masked):
    """Adam (arXiv 1412.6980, algorithm 1): 12 bytes for each salient weight, and the mask's bits."""

    moments = ("mean", "square")

    def update(self, s: Salient, grad: torch.Tensor) -> None:
        mean, square = s.moments["mean"], s.moments["square"]
        mean.lerp_(grad, 1 - BETA1)
        square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        denominator = (square.sqrt() / math.sqrt(1 - BETA2**self.steps)).add_(EPSILON)
        s.values.addcdiv_(mean, denominator, value=-self.lr / (1 - BETA1**self.steps))


class MaskedSGD(Masked):
    """SGD with momentum and weight decay, as torch.optim.SGD has them: v = momentum v + (g + weight_decay theta),
    theta = theta - lr v. 8 bytes for each salient weight, and the mask's bits.

    Weight decay and momentum reach the salient weights alone.
    """

    moments = ("momentum",)

    def __init__(
        self, model: nn.Module, bits: Bits, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0, **rest
    ):  # fmt: skip
        super().__init__(model, bits, lr, **rest)
        self.momentum, self.weight_decay = momentum, weight_decay

    def update(self, s: Salient, grad: torch.Tensor) -> None:
        grad = grad.add(s.values, alpha=self.weight_decay) if self.weight_decay else grad
        velocity = s.moments["momentum"].mul_(self.momentum).add_(grad)
        s.values.add_(velocity, alpha=-self.lr)
