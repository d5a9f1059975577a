"""Train the pocket checkpoint, a small and complete Stable Diffusion model of Fashion-MNIST, and its judge.

    python -m salun_sd.pocket.train --data /usr/share/datasets/fashion-mnist --out pocket

There are four stages: judge, VAE, tokenizer, then text encoder and UNet together. Each can be resumed: a batch depends
only on the seed and the step, so that a killed run ends at the same weights as an undisturbed one. All stages train on
the train split alone, and the judge never sees a generated image.
"""

import gzip
import json
import os
import random
from copy import deepcopy
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
)

from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.checkpoint.model import SAMPLING
from salun_sd.draw.sample import Row, Sampler

# Class names in the order of the data set's labels, and a synonym of each, which a fifth of its captions use.
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SYNONYMS = ["tee", "pants", "sweater", "gown", "jacket", "flip-flop", "blouse", "trainer", "purse", "bootie"]
TEMPLATES = [
    "{}",
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "image of {}",
    "a black and white photo of a {}",
    "a product photo of a {}",
    "a {} on a black background",
    "a close-up photo of one {}",
    "a catalogue picture of a {} for sale",
    "this is a {}",
]
CONTEXT = 24  # tokens in a prompt, the most


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array, of any rank, in a gzipped idx file, the format of MNIST's data sets."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_split(data: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, 32, 32] float32 in [-1, 1], padded with black, and labels [N] int64, of "train" or "t10k"."""
    pixels = torch.from_numpy(read_idx(data / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(data / f"{split}-labels-idx1-ubyte.gz").copy()).long()
    images = F.pad(pixels, (2, 2, 2, 2)).float().div(127.5).sub(1)
    return images[:, None].expand(-1, 3, -1, -1), labels


def caption(label: int, rng: random.Random) -> str:
    """A random template with the class's name, or in a fifth of the cases its synonym."""
    name = SYNONYMS[label] if rng.random() < 0.2 else CLASSES[label]
    return rng.choice(TEMPLATES).format(name).replace(" a ankle", " an ankle")


class Stage:
    """One training loop. It saves its state every 100 steps; a new object of the same name and `out` resumes it."""

    def __init__(self, name: str, out: Path, modules: dict, steps: int, lr: float, seed: int, ema: float | None = None):
        self.name, self.steps, self.seed, self.modules = name, steps, seed, modules
        self.params = [p for m in modules.values() for p in m.parameters()]
        self.file = out / f".{name}.pt"
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps, pct_start=0.1)
        self.ema_decay, self.ema, self.done = ema, deepcopy(modules) if ema else modules, 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for part, stored in zip(self._stateful(), state["parts"], strict=True):
                part.load_state_dict(stored)
            self.done = state["done"]

    def _stateful(self) -> list:
        averaged = list(self.ema.values()) if self.ema_decay else []
        return [*self.modules.values(), *averaged, self.optimizer, self.schedule]

    def save(self) -> None:
        partial = self.file.with_suffix(".partial")
        torch.save({"done": self.done, "parts": [s.state_dict() for s in self._stateful()]}, partial)
        os.replace(partial, self.file)

    def run(self, step) -> dict:
        """Train with step(generator) -> loss to the end. Gives the modules, or their moving average with `ema`, in eval
        mode."""
        bar = tqdm(range(self.done, self.steps), initial=self.done, total=self.steps, desc=self.name)
        for i in bar:
            loss = step(torch.Generator().manual_seed(self.seed * 1_000_003 + i))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            if self.ema_decay:
                decay = min(self.ema_decay, (1 + i) / (10 + i))
                with torch.no_grad():
                    for key, module in self.modules.items():
                        for average, value in zip(self.ema[key].parameters(), module.parameters(), strict=True):
                            average.lerp_(value, 1 - decay)
            self.done = i + 1
            if self.done % 100 == 0 or self.done == self.steps:
                bar.set_postfix(loss=f"{loss.item():.4f}")
                self.save()
        return {key: module.eval() for key, module in self.ema.items()}


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
        batch = F.pad(images[index], (2, 2, 2, 2), value=-1.0)[:, :, dy : dy + 32, dx : dx + 32]
        logits = judge(batch.flip(-1) if flip else batch).logits
        return F.cross_entropy(logits, labels[index], label_smoothing=0.05)

    return Stage("judge", out, {"judge": judge}, steps, 3e-3, seed).run(step)["judge"]


def train_vae(images, out: Path, steps: int, seed: int) -> AutoencoderKL:
    """Train with L1 + 1e-3 KL per latent. The scaling factor gives the train latents a standard deviation of 1."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
    )

    def step(g):
        batch = images[torch.randint(len(images), (64,), generator=g)]
        posterior = vae.encode(batch).latent_dist
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(vae.decode(posterior.sample(g)).sample, batch) + 1e-3 * kl

    vae = Stage("vae", out, {"vae": vae}, steps, 2e-3, seed).run(step)["vae"]
    vae.register_to_config(scaling_factor=1 / encode(vae, images[:4096], unit=1.0).std().item())
    return vae


@torch.no_grad()
def encode(vae, images, unit=None) -> torch.Tensor:
    """Images [N, 3, 32, 32] => latents [N, 4, 8, 8], times `unit` or, if it is None, the VAE's scaling factor."""
    scale = vae.config.scaling_factor if unit is None else unit
    return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(500)]) * scale


def train_tokenizer(out: Path) -> CLIPTokenizer:
    """Train a byte-level BPE on all possible captions; other texts become pieces and bytes."""
    words = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|startoftext|>", "<|endoftext|>"]
    corpus = [t.format(n) for t in TEMPLATES for n in CLASSES + SYNONYMS]
    # CLIPTokenizer splits words without their leading space, so the trainer gets the corpus word by word.
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator((w for c in corpus for w in c.replace("-", " - ").split()), trainer)
    model = json.loads(words.to_str())["model"]
    vocab = model["vocab"]
    for letter in pre_tokenizers.ByteLevel.alphabet():
        for token in (letter, letter + "</w>"):
            vocab.setdefault(token, len(vocab))
    merges = [tuple(m) for m in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(out / "tokenizer")
    return tokenizer


def train_unet(latents, labels, tokenizer: CLIPTokenizer, scheduler, out: Path, steps: int, seed: int):
    """Train text encoder and UNet together to predict epsilon; a tenth of the captions are empty."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
    ).to(memory_format=torch.channels_last)

    def step(g):
        index = torch.randint(len(latents), (128,), generator=g)
        rng = random.Random(g.initial_seed())
        texts = ["" if rng.random() < 0.1 else caption(label, rng) for label in labels[index].tolist()]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(latents[index].shape, generator=g)
        t = torch.randint(1000, (len(index),), generator=g)
        noisy = scheduler.add_noise(latents[index], noise, t)
        return F.mse_loss(unet(noisy, t, text_encoder(ids)[0]).sample, noise)

    stage = Stage("unet", out, {"text_encoder": text_encoder, "unet": unet}, steps, 1.5e-3, seed, ema=0.999)
    return stage.run(step)


def draw_grid(out: Path) -> None:
    """Draw grid.png: a row of ten seeds for each class."""
    checkpoint = find(str(out))
    steps, guidance = checkpoint.sampling
    sampler = Sampler(load_pipeline(checkpoint), steps)
    grid = Image.new("RGB", (320, 320))
    for row, name in enumerate(CLASSES):
        rows = [Row(f"a photo of {name}", seed, guidance, (32, 32)) for seed in range(10)]
        for column, image in enumerate(sampler.draw(rows, len(rows))):
            grid.paste(image, (32 * column, 32 * row))
    grid.save(out / "grid.png")


def train(
    data: Annotated[
        Path, typer.Option(help="Folder with the four Fashion-MNIST idx .gz files.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; run again to resume.")],
    judge_steps: Annotated[int, typer.Option(help="Batches of 128 for the judge.")] = 2400,
    vae_steps: Annotated[int, typer.Option(help="Batches of 64 for the VAE.")] = 800,
    unet_steps: Annotated[int, typer.Option(help="Batches of 128 for the text encoder and UNet.")] = 2600,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
) -> None:
    """Train the pocket checkpoint and its judge; about an hour on two CPU cores."""
    if (out / "model_index.json").is_file():
        print(f"{out} holds a finished checkpoint: there is nothing to do.")
        return
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = load_split(data, "train")

    judge = train_judge(images, labels, out, judge_steps, seed)
    test_images, test_labels = load_split(data, "t10k")
    with torch.no_grad():
        guesses = torch.cat([judge(part).logits.argmax(1) for part in test_images.split(500)])
    print(f"judge: {(guesses == test_labels).sum().item()} of {len(test_labels)} test images right")
    judge.half().save_pretrained(out / "judge")
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        out / "judge"
    )

    vae = train_vae(images, out, vae_steps, seed + 1)
    latents = encode(vae, images)
    print(f"vae: L1 {F.l1_loss(vae.decode(encode(vae, test_images[:1000], 1.0)).sample, test_images[:1000]):.4f}")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )
    trained = train_unet(latents, labels, train_tokenizer(out), scheduler, out, unet_steps, seed + 2)
    StableDiffusionPipeline(
        vae=vae,
        **trained,
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(out)
    config = out / "text_encoder" / "config.json"  # or transformers would load it in float16, beside a float32 UNet
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (out / SAMPLING).write_text('{"steps": 25, "guidance": 3.0}\n')
    draw_grid(out)
    for state in out.glob(".*.pt"):
        state.unlink()


if __name__ == "__main__":
    typer.run(train)
