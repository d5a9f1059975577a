"""The bytes that a forward and backward pass holds at its peak, measured on the meta device, whose tensors have a shape
and no values: every tensor is made and freed as in the run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def peak_of(models: list[nn.Module], run_pass: Callable[[], None], made_from: Callable[[nn.Parameter], int]) -> int:
    """Bytes beside the models' weights at the peak of a pass. Each gradient of a weight is freed as soon as it is made,
    and with it the bytes that are made from it, `made_from` its parameter."""
    weights = [p for model in models for p in model.parameters()]
    with Live(weights) as live, _fused_attention():

        def take(p: nn.Parameter) -> None:
            live.peak = max(live.peak, live.bytes + made_from(p))
            p.grad = None

        for p in filter(lambda p: p.requires_grad, weights):
            p.register_post_accumulate_grad_hook(take)
        run_pass()
    return live.peak


class Live(TorchDispatchMode):
    """Counts the bytes of the live tensors that are made while it is entered, now and at their peak."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = {id(t.untyped_storage()) for t in known}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        for t in results if isinstance(results, tuple | list) else (results,):
            if isinstance(t, torch.Tensor):
                self._count(t.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as devices compute it, without the L x L matrix that torch would make on the meta device."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v
    )[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
