"""Adam and SGD for the weights that a mask lets move. They hold state for these weights alone."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from salun_sd.core.mask import Bits
from salun_sd.core.salient import Salient, groups, in_one
from salun_sd.errors import some
from salun_sd.runtime import ranks

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


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
    together: the most weights of parameters that are updated together; in one process it changes no bit. Default:
    `TOGETHER` on a GPU; on a CPU each parameter alone.

    Dense gradients are reduced to their salient entries and freed in the backward pass that makes them, as soon as all
    that are updated together are there. Unless `holds`, the update is made there and then. In a run of several
    processes that the commands started, gradients are summed over them; only their salient entries travel.

    RuntimeError: a backward pass outside `step()`; a step without one; a second gradient of a parameter in a step that
    does not hold. ValueError: numbers that no optimizer takes. `lr` may be set between steps.
    """

    moments: tuple[str, ...] = ()

    def __init__(
        self, model: nn.Module, bits: Mapping[str, torch.Tensor], lr: float, *,
        values: Mapping[str, torch.Tensor] | None = None, clip: float | None = None, holds: bool = False,
        together: int | None = None,
    ):  # fmt: skip
        parameters = dict(model.named_parameters())
        bits = bits if isinstance(bits, Bits) else Bits.of(bits.items())
        _check_names(parameters, bits)
        _check_numbers(lr=lr)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}: give a number above 0, or None.")
        self.lr, self.clip, self.holds = lr, clip, holds or clip is not None
        self.steps, self._stepping = 0, False
        self.salient: dict[str, Salient] = {}  # parameter name -> what it is updated with
        for group in groups(parameters, bits, together):
            self.salient |= dict.fromkeys(group, Salient.of(group, bits, values, self.moments))
        self._required = [(p, p.requires_grad) for p in parameters.values()]
        for name, p in parameters.items():
            p.requires_grad_(name in self.salient)
        self._hooks = [parameters[name].register_post_accumulate_grad_hook(partial(self._take, name))
                       for name in self.salient]  # fmt: skip

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
            self._settle()
            if any(s.grad is not None for s in self._groups()):
                self.apply(self.withdraw())
            if not self._moved():
                raise RuntimeError("The step ended without a gradient: call backward() inside it.")
        finally:
            self._stepping = False
            for s in self._groups():
                s.grad = None
                s.arrived.clear()
            if not self._moved():
                self.steps -= 1

    def _groups(self) -> list[Salient]:
        return list(dict.fromkeys(self.salient.values()))

    def _moved(self) -> bool:
        """Whether this step has changed a weight."""
        return any(s.updated == self.steps for s in self._groups())

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
        self._settle()
        held = {}
        for s in self._groups():
            if s.grad is not None:
                held |= s.by_name(ranks.summed(s.grad))
                s.grad = None
        return held

    def apply(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """The update of a step that holds none, from gradients as `withdraw` gives them; clipped where that is asked
        for, in place. Parameters without one stay as they are. In a run of several processes, each gives the same.

        RuntimeError outside a step, and at a second update in one step. ValueError: a gradient that does not fit its
        parameter in the mask.
        """
        if not self._stepping or self._moved():
            raise RuntimeError("A step takes one update: call apply() once inside `with optimizer.step():`.")
        counts = {name: k for s in self._groups() for name, k in zip(s.parameters, s.counts, strict=True)}
        if odd := [name for name, grad in gradients.items() if counts.get(name) != len(grad)]:
            raise ValueError(f"The mask has not so many weights in {some(odd)}: give gradients as withdraw() does.")
        if gradients and self.clip is not None:
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in gradients.values()]
            norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            for grad in gradients.values():
                grad.mul_(min(1.0, self.clip / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
        for s in self._groups():
            if 0 < len(gradients.keys() & s.parameters.keys()) < len(s.parameters):
                self._split(s)
        for s in dict.fromkeys(self.salient[name] for name in gradients):
            self._apply(s, in_one([gradients[name] for name in s.parameters]))

    def _take(self, name: str, p: nn.Parameter) -> None:
        """The hook that a parameter's gradient is given to as soon as it is made."""
        if not self._stepping:
            p.grad = None
            raise RuntimeError("A gradient came outside a step: put backward() inside `with optimizer.step():`, and "
                               "close() an optimizer of this module that is no longer used.")  # fmt: skip
        s = self.salient[name]
        if not self.holds and (s.updated == self.steps or name in s.arrived):
            raise RuntimeError("A second backward pass in one step: make the optimizer with holds=True.")
        if name in s.arrived:  # an earlier pass had none for some of the others
            self._split(s)
            s = self.salient[name]
        s.arrived[name], p.grad = p.grad.contiguous(), None
        if len(s.arrived) == len(s.parameters):
            self._reduce(s)

    def _reduce(self, s: Salient) -> None:
        """The salient entries of gradients that are all there: an update, or held."""
        grad = s.gather([s.arrived.pop(name) for name in s.parameters])
        if not self.holds:
            self._apply(s, ranks.summed(grad))
        else:
            s.grad = grad if s.grad is None else s.grad.add_(grad)

    def _settle(self) -> None:
        """Where the backward passes had gradients for some parameters and for others not that are updated with them,
        do not wait for the others."""
        for s in self._groups():
            if s.arrived:
                self._split(s)

    def _split(self, s: Salient) -> None:
        """Update each of these parameters alone, from now on."""
        self.salient |= s.apart()
        for name, grad in s.arrived.items():
            self.salient[name].arrived[name] = grad
            self._reduce(self.salient[name])

    @torch.no_grad()
    def _apply(self, s: Salient, grad: torch.Tensor) -> None:
        self.update(s, grad)
        s.updated = self.steps
        s.scatter(s.values)

    def update(self, s: Salient, grad: torch.Tensor) -> None:
        """The rule: change s.values [k] and s.moments in place by a gradient, float32 [k]."""
        raise NotImplementedError

    def are_finite(self) -> bool:
        return all(bool(s.values.isfinite().all()) for s in self._groups())

    def values(self) -> dict[str, torch.Tensor]:
        """The trained values, float32 [k] for each parameter with salient weights, on the CPU."""
        return {name: part.cpu() for s in self._groups() for name, part in s.by_name(s.values).items()}

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
            f"{kind}/{name}": part
            for s in self._groups()
            for kind, t in {"values": s.values, **s.moments}.items()
            for name, part in s.by_name(t).items()
        }

    def restore(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        """Go on after so many steps, from what `state` gave then."""
        self.steps = steps
        for name, part in self.state().items():
            part.copy_(state[name])
        for s in self._groups():
            s.updated = steps
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
