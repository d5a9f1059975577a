"""Image classifiers: built, opened, and called on pixels from 0 to 1."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from salun_sd.checkpoint.classes import names_of
from salun_sd.checkpoint.model import BUNDLED
from salun_sd.classifier.small_resnet import SmallResNetConfig, SmallResNetForImageClassification
from salun_sd.errors import SalunError, UsageError, first_line, some
from salun_sd.runtime.contents import check_files, hash_into
from salun_sd.runtime.documents import read_json
from salun_sd.runtime.finite import finite

AutoConfig.register(SmallResNetConfig.model_type, SmallResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallResNetConfig, SmallResNetForImageClassification, exist_ok=True)
disable_progress_bar()

DEPTHS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # architecture => layers
UNNAMED = "LABEL_"  # how transformers calls the classes of a model that has no names for them


class Classifier:
    """A transformers image classifier: `net`, and what its image processor does to pixels.

    Calling it with pixels, float32 [b, 3, h, w] from 0 to 1, gives logits, float32 [b, classes]. In memory the channels
    come last, the layout in which convolutions are computed.
    """

    def __init__(self, net: nn.Module, processor, device: str):
        self.net, self.processor, self.device = net.to(device), processor, device
        size = dict(processor.size)
        self.size = (size.get("height") or size["shortest_edge"], size.get("width") or size["shortest_edge"])
        normal = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in normal)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        pixels = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.net(pixel_values=pixels).logits.float()

    @property
    def classes(self) -> list[str]:
        """The names of its classes, in their order."""
        return [self.net.config.id2label[i] for i in range(self.net.config.num_labels)]

    def copy(self) -> "Classifier":
        return Classifier(copy.deepcopy(self.net), self.processor, self.device)

    def fresh(self, seed: int) -> "Classifier":
        """The same architecture with new random weights."""
        torch.manual_seed(seed)
        net = AutoModelForImageClassification.from_config(self.net.config, dtype=torch.float32)
        return Classifier(net, self.processor, self.device)

    def save(self, folder: Path) -> None:
        """Write a folder that AutoModelForImageClassification opens."""
        try:
            self.net.save_pretrained(folder)
        except SafetensorError as e:  # of a full disk, too
            raise SalunError(f"The model cannot be written: {first_line(e)}.") from e
        self.processor.save_pretrained(folder)


def build(architecture: str, width: int, size: int, classes: Sequence[str], seed: int, device: str) -> Classifier:
    """A ResNet for images of size x size pixels with random weights: `width` channels in its first stage, twice as many
    in each one after. resnet18 of width 64 is the field's: 11,173,962 weights for 10 classes."""
    config = SmallResNetConfig(
        embedding_size=width, hidden_sizes=[width * 2**i for i in range(4)], depths=list(DEPTHS[architecture]),
        layer_type="basic", id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)},
    )  # fmt: skip
    torch.manual_seed(seed)
    half = [0.5] * 3
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half)
    return Classifier(SmallResNetForImageClassification(config), processor, device)


def opened(model: str, device: str) -> Classifier:
    """The classifier in a folder or hub id. Raises UsageError for a model that draws, SalunError for anything else that
    is no trained image classifier."""
    folder = Path(model)
    if model in BUNDLED or (folder / "model_index.json").is_file() or folder.suffix in (".safetensors", ".ckpt"):
        raise UsageError(
            f"MODEL {model} draws images, and names none: type salun-sd erase {model} to erase a concept of it."
        )
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"MODEL {model} has no config.json: give the folder of an image classifier, or its hub id."
            )
        check_files(folder)
    try:
        processor = AutoImageProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)
        net, loading = AutoModelForImageClassification.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        classifier = Classifier(net, processor, device)
        with torch.inference_mode():
            net.eval()(pixel_values=torch.zeros(1, 3, *classifier.size, device=device))
    except Exception as e:  # absent, of another kind, cut short: each has a type of its own
        raise SalunError(f"MODEL {model} is no image classifier that transformers opens ({first_line(e)}). Give the "
                         "folder or hub id of one.") from e  # fmt: skip
    if missing := sorted(loading["missing_keys"]):
        raise SalunError(f"MODEL {model} is no trained image classifier: its weights lack {some(missing)}.")
    if names_of(net.config.id2label) is None:
        raise SalunError(f"MODEL {model} is damaged: the id2label of its config has to name each class, from 0 on.")
    for name, weight in net.named_parameters():
        finite(weight, f"{name} of {model}")
    return classifier


def in_order_of(classifier: Classifier, classes: Sequence[str], model: str) -> torch.Tensor:
    """The place in the model's classes of each class of the data, int64. A model without names for its classes has them
    in the order of the data.

    Raises UsageError where the two do not have the same classes.
    """
    own = classifier.classes
    if len(own) == len(classes) and all(name.startswith(UNNAMED) for name in own):
        return torch.arange(len(classes))
    if lacking := sorted(set(classes) ^ set(own)):
        raise UsageError(f"MODEL {model} has {len(own)} classes and --data {len(classes)}, and they differ in "
                         f"{some(lacking)}: give the data that the model was trained for.")  # fmt: skip
    return torch.tensor([own.index(name) for name in classes])


def digest_of(folder: Path) -> str:
    """SHA-256, in hex, of the config and the weights in a model's folder. Raises SalunError for a damaged config."""
    whole = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hash_into(whole, file)
    config = read_json(folder / "config.json", dict)
    whole.update(json.dumps(config, sort_keys=True).encode())
    return whole.hexdigest()
