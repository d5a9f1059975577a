"""What a pocket checkpoint draws for an audit of a class, as the pocket judge sees it, and what it predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from kept_rows import FLOAT32
from PIL import Image

from salun_sd.audit.classify import Classifier
from salun_sd.audit.features import ImageModel
from salun_sd.audit.request import JUDGE
from salun_sd.audit.vision import BATCH
from salun_sd.checkpoint.find import find
from salun_sd.checkpoint.load import load_pipeline
from salun_sd.cli import app as cli
from salun_sd.cli.demo import photo_of
from salun_sd.core.diffusion import add_noise, on_device, predict
from salun_sd.draw import prompts
from salun_sd.draw.encode import encode_prompts
from salun_sd.draw.generate import file_of
from salun_sd.edit.resources import schedule_of
from salun_sd.pocket.fashion import CLASSES, load_split
from salun_sd.pocket.stable_diffusion import encode

KEPT = 50  # images of each other class; of the class itself 100
TIMESTEPS = range(50, 1000, 100)  # where noise predictions are compared
EXAMPLES = 63  # of the class, and as many of the others, seven of each


@dataclass(frozen=True)
class Drawn:
    """The images of one model for `audited_prompts`, in their order; `data` is the folder of Fashion-MNIST."""

    audit: Path
    model: str
    concept: str
    data: Path

    @cached_property
    def images(self) -> list[Image.Image]:
        return [Image.open(self.audit / file_of(p, 0)).convert("RGB") for p in audited_prompts(self.concept)]

    @cached_property
    def pixels(self) -> np.ndarray:
        """[N, height, width, 3], 0 to 1."""
        return np.stack([np.asarray(image, np.float64) / 255 for image in self.images])

    @cached_property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        return seen(self.images)

    @cached_property
    def predictions(self) -> np.ndarray:
        """What the model predicts in noised images of the test split under their own prompts, the class's and then the
        others': [timesteps, 2 x EXAMPLES, ...]. Each model has its own text encoder."""
        model = find(self.model)
        schedule, pipeline = schedule_of(model), load_pipeline(model)
        x0, labels = examples(self.data, self.concept, bool(model.classes))
        condition = encode_prompts(pipeline, CLASSES if model.classes else [photo_of(name) for name in CLASSES])
        device = pipeline.unet.device
        condition = on_device({key: of_classes.cpu()[labels] for key, of_classes in condition.items()}, device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
        times, x0 = [torch.full((len(x0),), t, device=device) for t in TIMESTEPS], x0.to(device)
        with torch.no_grad():
            found = [predict(pipeline.unet, add_noise(schedule, x0, noise, t), t, condition) for t in times]
            return torch.stack(found).cpu().numpy()


def draw(here: Path, model: str, concept: str, data: Path, shifted: int = 0) -> Drawn:
    """Draw by an audit without detectors; the seeds of the prompts are `shifted`. A class-conditional model gets the
    name of a class in place of each prompt."""
    by_class = bool(find(model).classes)
    rows = [p._replace(seed=p.seed + shifted, text=p.label if by_class else p.text) for p in audited_prompts(concept)]
    here.mkdir(parents=True, exist_ok=True)
    (here / "prompts.csv").write_text(prompts.as_csv(rows))
    cli.run(["evaluate", model, "--prompts", str(here / "prompts.csv"), "--detector", "none", *FLOAT32, "--no-images",
             "--out", str(here / "audit")])  # fmt: skip
    return Drawn(here / "audit", model, concept, data)


@cache
def audited_prompts(concept: str) -> list[prompts.Prompt]:
    """All 100 prompts of the class, then the first ones of each other class."""
    rows = prompts.read("pocket")
    others = [[p for p in rows if p.label == name][:KEPT] for name in CLASSES if name != concept]
    return [p for p in rows if p.label == concept] + [p for some in others for p in some]


@cache
def seen_in_data(data: Path, concept: str) -> np.ndarray:
    """The features of as many images of the test split as are drawn of each kept class, [450, D]."""
    images, labels = load_split(data, "t10k")
    rows = torch.cat([images[labels == n][:KEPT] for n, name in enumerate(CLASSES) if name != concept])
    pixels = rows.permute(0, 2, 3, 1).add(1).mul(127.5).round().byte().numpy()
    return seen([Image.fromarray(image) for image in pixels])[1]


@cache
def examples(data: Path, concept: str, by_class: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of images of the test split, or for a class-conditional model their grey values, and their labels: first
    the class's, then the others'."""
    images, labels = load_split(data, "t10k")
    number = CLASSES.index(concept)
    each = EXAMPLES // (len(CLASSES) - 1)
    rows = torch.cat([torch.nonzero(labels == number)[:EXAMPLES, 0]]
                     + [torch.nonzero(labels == n)[:each, 0] for n in range(len(CLASSES)) if n != number])  # fmt: skip
    x0 = images[rows, :1] if by_class else encode(load_pipeline(find("pocket")).vae, images[rows])
    return x0, labels[rows]


def seen(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """The pocket judge's probabilities [N, classes] and features [N, D] of images."""
    classifier, extractor = judge()
    tensors = [classifier.prepare(image) for image in images]
    batches = [tensors[start : start + BATCH] for start in range(0, len(tensors), BATCH)]
    probabilities = [classifier.probabilities(batch)[1].numpy() for batch in batches]
    return np.concatenate(probabilities), np.concatenate([extractor(batch) for batch in batches])


@cache
def judge() -> tuple[Classifier, ImageModel]:
    return Classifier(JUDGE, CLASSES), ImageModel(JUDGE)
