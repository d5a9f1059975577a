"""The authors' recipe, written plainly on diffusers' UNet, to compare with (OPTML-Group/Unlearn-Saliency, SD/).

    python benchmarks/reference.py --arch pocket --steps 5

As generate_mask.py and nsfw_removal.py do it: float32; dense gradients, summed in a second dense set on the host; the
threshold by two argsorts of all weights; a mask of int64; images encoded by the VAE at every use, those to forget
twice a step; a forward each for retain, forget and anchor, the anchor's cut off after its graph was built; dense Adam;
each step moves the whole mask to the device.

Left out, in its favour: the text encoder, which theirs runs for each of them and keeps in memory, CompVis' attention,
which stores its matrices (here it is diffusers' default), and a pause of 0.1 s a step. Theirs recomputes activations
(use_checkpoint); here that is a choice.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import ARCHS, SCHEDULE, Case, built, clock, now, random_mask
from torch import Tensor

from salun_sd.core.diffusion import Condition, Schedule, add_noise, guide, on_device, predict
from salun_sd.runtime import memory


def encoded(vae, images: Tensor) -> Tensor:
    """[B, 3, H, W] => [B, 4, h, w], a sample of the posterior."""
    with torch.no_grad():
        return vae.encode(images.to(vae.device)).latent_dist.sample() * vae.config.scaling_factor


def noised(schedule: Schedule, x0: Tensor) -> tuple[Tensor, Tensor]:
    """A timestep and noise for each image."""
    return torch.randint(len(schedule.alphas_cumprod), (len(x0),), device=x0.device), torch.randn_like(x0)


def accumulate(
    sums: dict[str, Tensor], unet, vae, batches: Iterator[Tensor], concept: Condition, empty: Condition,
    guidance: float = 7.5,
) -> Iterator[None]:  # fmt: skip
    """Add the gradient of each batch of images to the sums, which are on the host."""
    named = dict(unet.requires_grad_(True).named_parameters())
    sums.update(dict.fromkeys(named, 0))
    for images in batches:
        unet.zero_grad()
        x0 = encoded(vae, images)
        encoded(vae, images)  # for the empty prompt; not used
        t, noise = noised(SCHEDULE, x0)
        x_t = add_noise(SCHEDULE, x0, noise, t)
        prediction = guide(predict(unet, x_t, t, concept), predict(unet, x_t, t, empty), guidance)
        (-F.mse_loss(noise, prediction)).backward()
        for name, p in named.items():
            sums[name] += p.grad.cpu()
        yield


def threshold_by_argsort(saliency: list[Tensor], density: float) -> list[Tensor]:
    """int64 masks: 1 where the rank of |g| among all weights, counted from the largest, is below density x weights."""
    together = torch.cat([s.flatten() for s in saliency])
    ranks = torch.argsort(torch.argsort(together, descending=True))
    below = int(len(together) * density)
    masks = []
    for s, own in zip(saliency, ranks.split([s.numel() for s in saliency]), strict=True):
        m = torch.zeros_like(own)
        m[own < below] = 1
        masks.append(m.view(s.shape))
    return masks


def erase(
    unet, vae, masks: dict[str, Tensor], batches: Iterator[tuple[Tensor, Tensor]], concept: Condition,
    anchor: Condition, lr: float = 1e-5, retain_weight: float = 0.1,
) -> Iterator[float]:  # fmt: skip
    """One step for each pair of image batches, to forget and to retain; yields its loss."""
    adam = torch.optim.Adam(unet.requires_grad_(True).parameters(), lr=lr)
    for forget, retain in batches:
        adam.zero_grad()
        x0 = encoded(vae, retain)
        t, noise = noised(SCHEDULE, x0)
        retain_loss = F.mse_loss(predict(unet, add_noise(SCHEDULE, x0, noise, t), t, anchor), noise)

        x0, x0_of_anchor = encoded(vae, forget), encoded(vae, forget)
        t, noise = noised(SCHEDULE, x0)
        prediction = predict(unet, add_noise(SCHEDULE, x0, noise, t), t, concept)
        wanted = predict(unet, add_noise(SCHEDULE, x0_of_anchor, noise, t), t, anchor).detach()
        loss = F.mse_loss(prediction, wanted) + retain_weight * retain_loss
        loss.backward()
        for name, p in unet.named_parameters():
            p.grad *= masks[name].to(p.device)
        adam.step()
        yield loss.item()


def _models(case: Case) -> tuple:
    """UNet, VAE, and what the UNet is told for the concept, the anchor and the empty prompt."""
    unet, vae, data = case.unet("float32"), built(case.arch, "vae", torch.float32), case.examples(case.batch)
    rows, prompts = torch.arange(case.batch), [torch.full((case.batch,), i) for i in range(3)]
    return unet, vae, [on_device(data.condition(rows, which), unet.device) for which in prompts]


def time_mask(case: Case, steps: int, density: float) -> tuple[float, float, int]:
    """Seconds an image, seconds of the threshold, peak bytes."""
    unet, vae, (concept, _, empty) = _models(case)
    images, sums = torch.rand(case.batch, 3, case.pixels, case.pixels), {}
    seconds = clock(accumulate(sums, unet, vae, iter([images] * (steps + 1)), concept, empty)) / case.batch
    start = now()
    threshold_by_argsort([s.abs_() for s in sums.values()], density)
    return seconds, now() - start, memory.peak()


def time_erase(case: Case, steps: int, density: float) -> tuple[float, int]:
    """Seconds a step, peak bytes."""
    masks = {name: b.long() for name, b in random_mask(case.arch, density).items()}
    unet, vae, (concept, anchor, _) = _models(case)
    pair = tuple(torch.rand(2, case.batch, 3, case.pixels, case.pixels))
    return clock(erase(unet, vae, masks, iter([pair] * (steps + 1)), concept, anchor)), memory.peak()


def main(
    arch: Annotated[str, typer.Option(help=f"One of {', '.join(ARCHS)}.")] = "pocket",
    latents: Annotated[int | None, typer.Option(help="Side of the latents; default the architecture's own.")] = None,
    batch: Annotated[int, typer.Option(help="Images to forget in a step, and as many to retain.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps that are timed, after one that is not.")] = 3,
    density: Annotated[float, typer.Option(help="Share of weights to keep.")] = 0.5,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
) -> None:
    case = Case(arch, latents or ARCHS[arch]["unet"]["sample_size"], batch, "float32", checkpointing)
    seconds, peak = time_erase(case, steps, density)
    print(f"erase: {seconds:.3g} s a step, peak {peak / 2**30:.2f} GiB")
    seconds, cut, peak = time_mask(case, steps, density)
    print(f"mask: {seconds:.3g} s an image, {cut:.3g} s the threshold, peak of both {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
