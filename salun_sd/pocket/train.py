"""Train a bundled checkpoint, a small and complete model of Fashion-MNIST, and for `pocket` its judge, too.

    python -m salun_sd.pocket.train --data /usr/share/datasets/fashion-mnist --out pocket
    python -m salun_sd.pocket.train --data /usr/share/datasets/fashion-mnist --out pocket-ddpm --kind ddpm
    python -m salun_sd.pocket.train --data /usr/share/datasets/fashion-mnist --out no-sneaker --without sneaker

Each stage can be resumed: a batch depends only on the seed and the step, so that on a CPU a killed run ends at the same
weights as an undisturbed one, and on a GPU at the same to rounding. All stages train on the train split alone, and the
judge never sees a generated image.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import SAMPLING
from salun_sd.draw.sample import Row, Sampler
from salun_sd.pocket import ddpm, stable_diffusion
from salun_sd.pocket.fashion import CLASSES, load_split
from salun_sd.pocket.stage import Stage


class Kind(str, Enum):
    stable_diffusion = "stable-diffusion"
    ddpm = "ddpm"


def train_judge(images, labels, out: Path, steps: int, seed: int):
    """Train a classifier [B, 3, 32, 32] -> [B, 10] with random flips and shifts of up to two pixels."""
    names = dict(enumerate(CLASSES))
    config = ResNetConfig(
        embedding_size=48,
        hidden_sizes=[48, 96, 160],
        depths=[2, 2, 2],
        layer_type="basic",
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    judge = ResNetForImageClassification(config)

    def step(g):
        index = torch.randint(len(images), (128,), generator=g)
        dy, dx, flip = (int(torch.randint(n, (), generator=g)) for n in (5, 5, 2))
        batch = F.pad(images[index].to(judge.device), (2, 2, 2, 2), value=-1.0)[:, :, dy : dy + 32, dx : dx + 32]
        logits = judge(batch.flip(-1) if flip else batch).logits
        return F.cross_entropy(logits, labels[index].to(judge.device), label_smoothing=0.05)

    return Stage("judge", out, {"judge": judge}, steps, 3e-3, seed).run(step)["judge"]


def draw_grid(out: Path) -> None:
    """Draw grid.png: a row of ten seeds for each class."""
    checkpoint = find(str(out))
    steps, guidance = checkpoint.sampling
    sampler = Sampler(load_pipeline(checkpoint), steps)
    grid = Image.new("RGB", (320, 320))
    for row, name in enumerate(CLASSES):
        text = name if checkpoint.classes else f"a photo of {name}"
        rows = [Row(text, seed, guidance, (32, 32)) for seed in range(10)]
        for column, image in enumerate(sampler.draw(rows, len(rows))):
            grid.paste(image, (32 * column, 32 * row))
    grid.save(out / "grid.png")


def save_judge(images, labels, test_images, test_labels, out: Path, steps: int, seed: int) -> None:
    """Train the judge, print how many test images it classifies correctly, and write it in float16."""
    judge = train_judge(images, labels, out, steps, seed)
    with torch.no_grad():
        guesses = torch.cat([judge(part.to(judge.device)).logits.argmax(1).cpu() for part in test_images.split(500)])
    print(f"judge: {(guesses == test_labels).sum().item()} of {len(test_labels)} test images right")
    judge.half().save_pretrained(out / "judge")
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        out / "judge"
    )


def train(
    data: Annotated[
        Path, typer.Option(help="Folder with the four Fashion-MNIST idx .gz files.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; run again to resume.")],
    kind: Annotated[
        Kind, typer.Option(help="stable-diffusion: pocket, with its judge. ddpm: pocket-ddpm.")
    ] = Kind.stable_diffusion,
    judge_steps: Annotated[int, typer.Option(help="Batches of 128 for the judge.")] = 2400,
    vae_steps: Annotated[int, typer.Option(help="Batches of 64 for the VAE.")] = 800,
    unet_steps: Annotated[int, typer.Option(help="Batches of 128 for the text encoder and UNet.")] = 2600,
    ddpm_steps: Annotated[int, typer.Option(help="Batches of 64 for the UNet of ddpm.")] = ddpm.STEPS,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    without: Annotated[
        str | None, typer.Option(help="A class whose images are left out. VAE and tokenizer are then pocket's own.")
    ] = None,
) -> None:
    """Train a bundled checkpoint; about an hour on two CPU cores, or on one for ddpm. With a GPU it trains there."""
    if without is not None and without not in CLASSES:
        raise typer.BadParameter(f"there is no class {without!r}: give one of {', '.join(CLASSES)}.")
    if (out / "model_index.json").is_file():
        print(f"{out} holds a finished checkpoint: there is nothing to do.")
        return
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = load_split(data, "train")
    if without:
        kept = labels != CLASSES.index(without)
        images, labels = images[kept], labels[kept]
    if kind is Kind.ddpm:
        ddpm.save(ddpm.train_pipeline(images[:, :1].contiguous(), labels, out, ddpm_steps, seed), out)
    elif without:
        stable_diffusion.save(stable_diffusion.retrain(images, labels, out, unet_steps, seed), out)
    else:
        test_images, test_labels = load_split(data, "t10k")
        save_judge(images, labels, test_images, test_labels, out, judge_steps, seed)
        pipeline = stable_diffusion.train_pipeline(images, test_images, labels, out, vae_steps, unet_steps, seed)
        stable_diffusion.save(pipeline, out)
    steps = 25 if kind is Kind.ddpm else stable_diffusion.STEPS
    (out / SAMPLING).write_text(f'{{"steps": {steps}, "guidance": 3.0}}\n')
    draw_grid(out)
    for state in out.glob(".*.pt"):
        state.unlink()


if __name__ == "__main__":
    typer.run(train)
