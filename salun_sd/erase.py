"""Masked fine-tuning: the concept's prediction becomes the anchor's, the retain loss keeps the rest."""

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import cycle

import torch
from torch import nn

from salun_sd.diffusion import Examples, Schedule, add_noise, joined, moved, mse, predict, target
from salun_sd.errors import SalunError
from salun_sd.mask import Bits

# A prediction of zero scores 1 under the retain loss, whatever the target; ten times that is no model any more.
EXPLODED = 10.0


class SalientWeights:
    """The weights that a mask lets move, as compact float32 parameters that any torch optimizer can hold.

    An optimizer never sees the other weights, so neither weight decay nor momentum can move them: theta_u equals
    theta_o outside the mask by construction (SalUn, arXiv 2310.12508, eq. 4), whichever optimizer is used.
    """

    def __init__(self, unet: nn.Module, bits: Bits):
        self.entries = []  # (parameter, its bits [n] bool in flat order, values [k] float32)
        for name, p in unet.named_parameters():
            salient = bits[name].view(-1).to(p.device)
            p.requires_grad_(bool(salient.any()))
            if p.requires_grad:
                values = nn.Parameter(p.detach().view(-1)[salient].float())
                p.register_post_accumulate_grad_hook(partial(self._gather, salient, values))
                self.entries.append((p, salient, values))

    @staticmethod
    def _gather(salient: torch.Tensor, values: nn.Parameter, p: nn.Parameter) -> None:
        """As soon as a dense gradient is made, keep its salient entries and free it."""
        values.grad = p.grad.view(-1)[salient].float()
        p.grad = None

    def parameters(self) -> list[nn.Parameter]:
        return [values for _, _, values in self.entries]

    @torch.no_grad()
    def scatter(self) -> None:
        """Write the compact values back into the UNet."""
        for p, salient, values in self.entries:
            p.view(-1)[salient] = values.to(p.dtype)

    def are_finite(self) -> bool:
        return all(bool(values.isfinite().all()) for values in self.parameters())


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches [size] over n examples: one shuffled pass after another, nothing dropped."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(n, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


def balanced(concepts: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches [size] over examples of several concepts, concepts [N] int64: each in turn gives one, so
    that in a batch their numbers differ by one at most; each goes through its own in shuffled passes."""
    members = [(concepts == c).nonzero().squeeze(1) for c in concepts.unique()]
    turns = cycle([(m, batches(len(m), 1, generator)) for m in members])
    while True:
        yield torch.cat([m[next(one)] for m, one in (next(turns) for _ in range(size))])


def erase(
    unet: nn.Module,
    bits: Bits,
    schedule: Schedule,
    forget: Examples,
    anchors: torch.Tensor,
    concepts: torch.Tensor,
    retain: Examples,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    retain_weight: float,
    anchor_from: str,
    seed: int,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> Iterator[dict]:
    """Fine-tune the UNet in place; yields {"step", "forget", "retain", "loss"} after each update.

    loss = mean ||e(x_t|c') - e(x_t|c)||^2 over D_f + retain_weight * MSE over D_r (SalUn, section 4, and the
    authors' nsfw_removal.py). forget: images of the concept c with its prompt; anchors [N] int64: the row of
    forget.prompts that is c' for each of them; concepts [N] int64: which concept each shows, batches are balanced over
    them; retain: images with their own prompts. Both branches see the same x_t (the authors' code encodes twice).
    No gradient flows through the anchor branch; anchor_from says whose prediction it is: the weights being trained
    ("current", as the authors do) or the ones before training ("base").
    Raises SalunError when a loss is not finite or explodes, naming the step and what to lower.
    """
    device = unet.device
    generator = torch.Generator().manual_seed(seed)
    teacher = deepcopy(unet).requires_grad_(False) if anchor_from == "base" else unet
    salient = SalientWeights(unet, bits)
    updater = optimizer(salient.parameters(), lr=lr)
    of_forget, of_retain = balanced(concepts, batch_size, generator), batches(len(retain), batch_size, generator)

    for step in range(1, steps + 1):
        f, r = next(of_forget), next(of_retain)
        x0 = torch.cat([forget.latents[f], retain.latents[r]])  # [2B, 4, h, w]
        condition = moved(joined(forget.condition(f), retain.condition(r)), device)
        anchor = moved(forget.condition(f, anchors[f]), device)
        t = torch.randint(len(schedule.alphas_cumprod), (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x0, t, noise = x0.to(device), t.to(device), noise.to(device)
        x_t = add_noise(schedule, x0, noise, t)

        with torch.no_grad():
            wanted = predict(teacher, x_t[:batch_size], t[:batch_size], anchor)
        wanted = torch.cat([wanted, target(schedule, x0, noise, t)[batch_size:]])
        losses = mse(predict(unet, x_t, t, condition), wanted)  # [2B]
        forget_loss, retain_loss = losses[:batch_size].mean(), losses[batch_size:].mean()
        loss = forget_loss + retain_weight * retain_loss
        if not math.isfinite(loss.item()) or max(forget_loss.item(), retain_loss.item()) > EXPLODED:
            raise SalunError(
                f"The loss exploded at step {step} (forget {forget_loss.item():.3g}, retain {retain_loss.item():.3g})"
                f": lower --lr, now {lr:g}."
            )
        loss.backward()
        updater.step()
        salient.scatter()
        if not salient.are_finite():
            raise SalunError(f"A weight is no longer finite after step {step}: lower --lr, now {lr:g}.")
        yield {"step": step, "forget": forget_loss.item(), "retain": retain_loss.item(), "loss": loss.item()}
