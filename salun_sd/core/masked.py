"""Adam and SGD for the weights that a mask lets move. They hold state for these weights alone."""

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
    updated: int = 0  # the last step that changed it

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """The salient entries of a tensor of the parameter's shape, float32 [k]."""
        passes = in_passes(self.packed, self.p.numel())
        return torch.cat([dense.view(-1)[where].masked_select(bits) for where, bits in passes]).float()

    @torch.no_grad()
    def scatter(self, values: torch.Tensor) -> None:
        """Write values [k] into the parameter."""
        done, n = 0, self.p.numel()
        flat = self.p.contiguous().view(-1)  # a copy only where the parameter lies in another order (channels_last)
        for where, bits in in_passes(self.packed, n):
            k = int(bits.sum()) if where.stop < n else len(values) - done  # on a GPU, one pass: it is not waited for
            flat[where].masked_scatter_(bits, values[done : done + k].to(self.p.dtype))
            done += k
        if not self.p.is_contiguous():
            self.p.copy_(flat.view(self.p.shape))


class Masked:
    """What both optimizers share. One `step()` is one update:

        adam = MaskedAdam(model, bits, lr=1e-5)
        with adam.step():
            loss(batch).mean().backward()

    The optimizer holds the salient weights alone, so nothing can move the others: theta_u equals theta_o outside the
    mask by construction (SalUn, arXiv 2310.12508, eq. 4). Each update equals that of the dense optimizer with a masked
    gradient. Buffers, such as the statistics of batch norm, are no parameters: a forward pass in training mode moves
    them, and no mask holds them.

    model: any module. Its parameters have the names and shapes of the mask, else ValueError. Those without a salient
    weight no longer require a gradient.
    values: parameter name -> tensor to start from, for a module that holds its weights rounded; each is looked up once.
    Default: the module's own weights.
    clip: the largest norm of the salient gradient of a step. It sets `holds`.
    holds: gradients wait for the end of the step, which may then have several backward passes, or for `withdraw`.

    A dense gradient is reduced to its salient entries and freed in the backward pass that makes it. Unless `holds`, the
    update is made there and then. In a run of several processes that the commands started, gradients are summed over
    them; only their salient entries travel.

    RuntimeError: a backward pass outside `step()`; a step without one; a second gradient of a parameter in a step that
    does not hold. ValueError: numbers that no optimizer takes. `lr` may be set between steps.
    """

    moments: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, bits: Mapping[str, torch.Tensor], lr: float, *,
        values: Mapping[str, torch.Tensor] | None = None, clip: float | None = None, holds: bool = False,
    ):  # fmt: skip
        parameters = dict(model.named_parameters())
        bits = bits if isinstance(bits, Bits) else Bits.of(bits.items())
        _check_names(parameters, bits)
        _check_numbers(lr=lr)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}: give a number above 0, or None.")
        self.lr, self.clip, self.holds = lr, clip, holds or clip is not None
        self.steps, self._stepping = 0, False
        self.salient: dict[str, Salient] = {}
        for name, p in parameters.items():
            chosen = bits[name]
            if not chosen.any():
                continue
            dense = p.detach() if values is None else values[name]
            kept = dense[chosen.to(dense.device)].float().to(p.device)
            moments = {kind: torch.zeros_like(kept) for kind in self.moments}
            self.salient[name] = Salient(p, bits.packed[name].to(p.device), kept, moments)
        self._required = [(p, p.requires_grad) for p in parameters.values()]
        for name, p in parameters.items():
            p.requires_grad_(name in self.salient)
        self._hooks = [s.p.register_post_accumulate_grad_hook(partial(self._take, s)) for s in self.salient.values()]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the backward passes of one update. One that an exception ends before any weight has moved is not
        counted; gradients that it held are dropped."""
        if not self._hooks:
            raise RuntimeError("The optimizer is closed, or its mask is empty: make a new one.")
        if self._stepping:
            raise RuntimeError("A step is open already: end it before the next.")
        self.steps += 1
        self._stepping = True
        try:
            yield
            if any(s.grad is not None for s in self.salient.values()):
                self.apply(self.withdraw())
            if not self._moved():
                raise RuntimeError("The step ended without a gradient: call backward() inside it.")
        finally:
            self._stepping = False
            for s in self.salient.values():
                s.grad = None
            if not self._moved():
                self.steps -= 1

    def _moved(self) -> bool:
        """Whether this step has changed a weight."""
        return any(s.updated == self.steps for s in self.salient.values())

    def withdraw(self) -> dict[str, torch.Tensor]:
        """The gradients that the step holds, summed over the processes: parameter name -> float32 [k]. Then it holds
        none. For what is computed from the gradients of several losses:

            with adam.step():
                forget.backward()
                f = adam.withdraw()
                retain.backward()
                r = adam.withdraw()
                adam.apply(joined(f, r))

        RuntimeError outside a step, and where the optimizer was made without `holds`.
        """
        if not (self._stepping and self.holds):
            raise RuntimeError("Gradients are held inside a step alone, by an optimizer made with holds=True.")
        held = {name: s.grad for name, s in self.salient.items() if s.grad is not None}
        for name, grad in held.items():
            ranks.summed(grad)
            self.salient[name].grad = None
        return held

    def apply(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """The update of a step that holds none, from gradients as `withdraw` gives them; clipped where that is asked
        for, in place. Parameters without one stay as they are. In a run of several processes, each gives the same.

        RuntimeError outside a step, and at a second update in one step.
        """
        if not self._stepping or self._moved():
            raise RuntimeError("A step takes one update: call apply() once inside `with optimizer.step():`.")
        if gradients and self.clip is not None:
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in gradients.values()]
            norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            for grad in gradients.values():
                grad.mul_(min(1.0, self.clip / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
        for name, grad in gradients.items():
            self._apply(self.salient[name], grad)

    def _take(self, s: Salient, p: nn.Parameter) -> None:
        """The hook that a parameter's gradient is given to as soon as it is made."""
        grad = s.gather(p.grad.contiguous())
        p.grad = None
        if not self._stepping:
            raise RuntimeError("A gradient came outside a step: put backward() inside `with optimizer.step():`, and "
                               "close() an optimizer of this module that is no longer used.")  # fmt: skip
        if not self.holds:
            if s.updated == self.steps:
                raise RuntimeError("A second backward pass in one step: make the optimizer with holds=True.")
            self._apply(s, ranks.summed(grad))
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

    def are_finite(self) -> bool:
        return all(bool(s.values.isfinite().all()) for s in self.salient.values())

    def values(self) -> dict[str, torch.Tensor]:
        """The trained values, float32 [k] for each parameter with salient weights, on the CPU."""
        return {name: s.values.cpu() for name, s in self.salient.items()}

    def close(self) -> None:
        """Drop all state, and take the hooks off the module: its parameters require gradients as before. Its weights
        stay as they are."""
        for hook in self._hooks:
            hook.remove()
        for p, required in self._required:
            p.requires_grad_(required)
        self._hooks.clear()
        self._required.clear()
        self.salient.clear()

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs beside the number of steps: KIND/PARAMETER -> float32 [k], not a copy."""
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


def _check_numbers(**values: float) -> None:
    """Raises ValueError unless each is a finite number from 0 on."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: give a finite number from 0 on.")


def _check_names(parameters: Mapping[str, nn.Parameter], bits: Bits) -> None:
    """Raises ValueError unless a mask has the parameters of a module, in their shapes."""
    both = parameters.keys() & bits.keys()
    odd = (parameters.keys() ^ bits.keys()) | {name for name in both if parameters[name].shape != bits.shapes[name]}
    if odd:
        raise ValueError(f"Mask and module differ in {some(sorted(odd))}: a mask fits the module it was made for.")


class MaskedAdam(Masked):
    """Adam (arXiv 1412.6980, algorithm 1), with the defaults of torch.optim.Adam. 12 bytes for each salient weight,
    and the mask's bits."""

    moments = ("mean", "square")

    def update(self, s: Salient, grad: torch.Tensor) -> None:
        mean, square = s.moments["mean"], s.moments["square"]
        mean.lerp_(grad, 1 - BETA1)
        square.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        denominator = (square.sqrt() / math.sqrt(1 - BETA2**self.steps)).add_(EPSILON)
        s.values.addcdiv_(mean, denominator, value=-self.lr / (1 - BETA1**self.steps))


class MaskedSGD(Masked):
    """SGD with momentum and weight decay, as torch.optim.SGD has them: v = momentum v + (g + weight_decay theta),
    theta = theta - lr v. 4 bytes for each salient weight, 8 with momentum, and the mask's bits.

    Weight decay and momentum reach the salient weights alone.
    """

    def __init__(
        self, model: nn.Module, bits: Bits, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0, **rest
    ):  # fmt: skip
        _check_numbers(momentum=momentum, weight_decay=weight_decay)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.moments = ("momentum",) if momentum else ()
        super().__init__(model, bits, lr, **rest)

    def update(self, s: Salient, grad: torch.Tensor) -> None:
        grad = grad.add(s.values, alpha=self.weight_decay) if self.weight_decay else grad
        velocity = s.moments["momentum"].mul_(self.momentum).add_(grad) if self.momentum else grad
        s.values.add_(velocity, alpha=-self.lr)
