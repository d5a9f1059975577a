"""SalUn (arXiv 2310.12508): the forgetting loss whose gradient is the saliency, and the masked fine-tuning that makes
the concept's prediction the anchor's while a retain loss keeps the rest."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import cycle

import torch
from torch import nn

from salun_sd.core.diffusion import (
    Condition,
    Examples,
    Schedule,
    add_noise,
    guide,
    joined,
    mse,
    noise_for,
    on_device,
    predict,
    target,
)
from salun_sd.core.masked import Masked
from salun_sd.errors import SalunError
from salun_sd.runtime import ranks
from salun_sd.runtime.finite import NotFinite, finite

# A prediction of zero scores 1 under the retain loss, whatever the target; ten times that is no model any more.
EXPLODED = 10.0


def forget_loss(
    unet, schedule: Schedule, x0, condition: Condition, empty: Condition, noise, t, guidance: float
) -> torch.Tensor:
    """l_f = -MSE(noise, prediction at x_t for the concept), one value per image: [B].

    SalUn's paper (arXiv 2310.12508, section 4) has the plain conditional prediction, guidance 0. The authors'
    generate_mask.py guides inside the loss, (1 + w) e(x_t|c) - w e(x_t|""), with w = 7.5, gradients through both.
    x0 and noise [B, 4, h, w], t [B]; empty: the prompt "", one row. The unconditional prediction has the image's own
    size and crop.
    """
    x_t = add_noise(schedule, x0, noise, t)
    if guidance:  # one forward pass for both: each parameter then has one gradient, which is freed at once
        nothing = condition | {k: v.expand_as(condition[k]) for k, v in empty.items()}
        both = predict(unet, torch.cat([x_t, x_t]), torch.cat([t, t]), joined(condition, nothing))
        prediction = guide(*both.chunk(2), guidance)
    else:
        prediction = predict(unet, x_t, t, condition)
    return -mse(prediction, target(schedule, x0, noise, t))


def forget_gradient(
    unet: nn.Module, schedule: Schedule, forget: Examples, empty: Condition, *, guidance: float, seed: int,
    batch_size: int, name: str = "the model",
) -> Iterator[int]:  # fmt: skip
    """Backward passes of the forgetting loss over the forget set, for a GradientSum of the UNet. Yields how many images
    are done, estimated over all processes.

    Each image's timestep and noise depend on (seed, its position), so the batch size changes only the rounding. Several
    processes take batches in turn. Raises NotFinite where a loss is not finite; errors call the model `name`.
    """
    device, empty = unet.device, on_device(empty, unet.device)
    for start in range(ranks.rank() * batch_size, len(forget), ranks.count() * batch_size):
        index = range(start, min(start + batch_size, len(forget)))
        x0 = forget.latents[start : index.stop].to(device)
        condition = on_device(forget.condition(torch.arange(start, index.stop)), device)
        t, noise = noise_for(index, x0.shape[1:], len(schedule.alphas_cumprod), seed)
        losses = forget_loss(unet, schedule, x0, condition, empty, noise.to(device), t.to(device), guidance)
        finite(losses, f"The loss of the UNet of {name}").sum().backward()
        yield min(len(forget), (start // batch_size + ranks.count() - ranks.rank()) * batch_size)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches [size] over n examples: one shuffled pass after another; no example is dropped."""
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(n, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


def balanced(concepts: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches [size] over examples of several concepts, concepts [N] int64. Concepts give one example in
    turn, so their numbers in a batch differ by one at most. Each goes through its own examples in shuffled passes."""
    members = [(concepts == c).nonzero().squeeze(1) for c in concepts.unique()]
    turns = cycle([(m, batches(len(m), 1, generator)) for m in members])
    while True:
        yield torch.cat([m[next(one)] for m, one in (next(turns) for _ in range(size))])


def erase(
    unet: nn.Module,
    adam: Masked,
    schedule: Schedule,
    forget: Examples,
    anchors: torch.Tensor,
    concepts: torch.Tensor,
    retain: Examples,
    *,
    steps: int,
    batch_size: int,
    retain_weight: float,
    anchor_from: str,
    seed: int,
    parts: int = 1,
    name: str = "the model",
) -> Iterator[dict]:
    """Fine-tune the UNet in place; yields {"step", "forget", "retain", "loss"} after each update.

    loss = mean ||e(x_t|c') - e(x_t|c)||^2 over D_f + retain_weight * MSE over D_r (SalUn, section 4, and the
    authors' nsfw_removal.py). forget: images of the concept c with its prompt; anchors [N] int64: the row of
    forget.prompts that is c' for each of them; concepts [N] int64: which concept each shows, batches are balanced over
    them; retain: images with their own prompts. Both branches see the same x_t (the authors' code encodes twice).
    No gradient flows through the anchor branch; anchor_from says whose prediction it is: the weights being trained
    ("current", as the authors do) or the ones before training ("base", for which adam keeps them).

    A batch is shared among the processes, and each works through its share in `parts`: the same update, to rounding.
    Where adam has steps behind it, goes on after them: the random numbers before are drawn again and not used.
    Raises NotFinite when the model, which errors call `name`, gives no usable loss or gradient before it is changed;
    SalunError when that happens later, naming the step and what to lower.
    """
    device = unet.device
    generator = torch.Generator().manual_seed(seed)
    of_forget, of_retain = balanced(concepts, batch_size, generator), batches(len(retain), batch_size, generator)
    share = torch.arange(batch_size)[ranks.rank() :: ranks.count()]

    for step in range(1, steps + 1):
        f, r = next(of_forget), next(of_retain)
        shape = (2 * batch_size, *forget.latents.shape[1:])
        t = torch.randint(len(schedule.alphas_cumprod), (2 * batch_size,), generator=generator)
        noise = torch.randn(shape, generator=generator)
        if step <= adam.steps:
            continue
        means = torch.zeros(2, dtype=torch.float64)
        with adam.step():
            for part in (share[i::parts] for i in range(parts)):
                rows = torch.cat([part, batch_size + part])  # of t and noise: first those to forget
                x0 = torch.cat([forget.latents[f[part]], retain.latents[r[part]]]).to(device)  # [2n, 4, h, w]
                condition = on_device(joined(forget.condition(f[part]), retain.condition(r[part])), device)
                anchor = on_device(forget.condition(f[part], anchors[f[part]]), device)
                n, at, e = len(part), t[rows].to(device), noise[rows].to(device)
                x_t = add_noise(schedule, x0, e, at)
                with torch.no_grad(), adam.base() if anchor_from == "base" else nullcontext():
                    wanted = predict(unet, x_t[:n], at[:n], anchor)
                wanted = torch.cat([wanted, target(schedule, x0, e, at)[n:]])
                losses = mse(predict(unet, x_t, at, condition), wanted)  # [2n]
                shares = torch.stack([losses[:n].sum(), losses[n:].sum()]) / batch_size
                of_part = ranks.summed(shares.detach().double().cpu())
                means += of_part
                _check_losses(of_part * parts, step, adam.lr, name)
                (shares[0] + retain_weight * shares[1]).backward()
        if step in (1, steps):
            _check_weights(adam, step, retain_weight, name)
        of_forgetting, of_retaining = means.tolist()
        yield {"step": step, "forget": of_forgetting, "retain": of_retaining,
               "loss": of_forgetting + retain_weight * of_retaining}  # fmt: skip


def _check_losses(losses: torch.Tensor, step: int, lr: float, name: str) -> None:
    """Raise an error unless the losses [2] of a step, to forget and to retain, are those of a model that works. At the
    first step the weights are still the model's own."""
    if losses.isfinite().all() and losses.max() <= EXPLODED:
        return
    words = "forget {:.3g}, retain {:.3g}".format(*losses.tolist())
    if step == 1:
        raise NotFinite(f"The UNet of {name} is damaged: before training, its losses are {words}. Use another copy of "
                        "this model.")  # fmt: skip
    raise SalunError(f"The loss exploded at step {step} ({words}): lower --lr, now {lr:g}.")


def _check_weights(adam: Masked, step: int, retain_weight: float, name: str) -> None:
    """Raise an error unless all weights are finite after a step. No learning rate makes the first step infinite."""
    if adam.are_finite():
        return
    if step == 1:
        raise NotFinite(f"The gradient of the UNet of {name} is not finite: lower --retain-weight, now "
                        f"{retain_weight:g}, or use another copy of this model.")  # fmt: skip
    raise SalunError(f"A weight is no longer finite after step {step}: lower --lr, now {adam.lr:g}.")
