"""Images to features, from which FID and KID are computed."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from salun_sd.audit.clip import Clip, is_clip
from salun_sd.audit.vision import BATCH, Vision, batched, loaded, prepared
from salun_sd.draw.images import Unreadable
from salun_sd.errors import SalunError, UsageError, first_line
from salun_sd.runtime.finite import finite

if TYPE_CHECKING:
    import torch


class Extractor(Protocol):
    """What made features: `name` and `resize` are in names of metrics; the same `digest` gives the same features."""

    name: str
    resize: str
    digest: str


class ImageModel(Vision):
    """The features of any transformers image model, in float32 on `device`: its pooled output.

    A model without a trained pooler gives the mean of its last hidden states; a CLIP gives its image embedding, not
    normalised, as in clean-fid (Parmar et al. 2022, `clip_features.py`). Names of metrics have `name` and `resize`,
    which is what its own image processor (the PIL version) does to an image's size.
    """

    def __init__(self, model: str | Path, device: str = "cpu", name: str | None = None):
        self.name = name or str(model)
        self.clip = Clip(model, device, option="--fid") if is_clip(model) else None
        if self.clip:
            self.model, self.processor, self.name = self.clip.model, self.clip.processor, f"{self.name} image embedding"
        else:
            from transformers import AutoModel

            advice = "Give --fid `pocket`, `inception`, or a transformers image model by folder or hub id."
            # the file of a classifier has no weights for the pooler that some kinds of models have
            self.processor, self.model, self.is_pooled = loaded(
                AutoModel, model, device, what="image model", advice=advice, optional="pooler"
            )
        self.resize = resize_of(self.processor)

    def __call__(self, images: "list[torch.Tensor]") -> np.ndarray:
        """Prepared images => features [B, D], float32."""
        import torch

        if self.clip:
            return self.clip.embedded(images).numpy()
        with torch.inference_mode():
            output = self.model(pixel_values=batched(images).to(self.model.device))
        pooled = getattr(output, "pooler_output", None) if self.is_pooled else None
        pooled = _mean(output.last_hidden_state) if pooled is None else pooled.flatten(1)
        return pooled[: len(images)].float().cpu().numpy()


def _mean(hidden: "torch.Tensor") -> "torch.Tensor":
    """The mean over positions of (B, D, height, width) or (B, positions, D)."""
    return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden.mean(dim=1)


def resize_of(processor) -> str:
    """What an image processor does to an image's size, as in names of metrics: `32x32 bilinear`."""
    steps = []
    size, crop = (getattr(processor, name, None) or {} for name in ("size", "crop_size"))
    if getattr(processor, "do_resize", False):
        sides = (
            f"{size['width']}x{size['height']}" if "height" in size else f"shortest side {size.get('shortest_edge')}"
        )
        share = getattr(processor, "crop_pct", None)
        resampling = Image.Resampling(processor.resample).name.lower()
        steps.append(f"{sides} {resampling}" + (f", crop share {share:g}" if share else ""))
    if getattr(processor, "do_center_crop", False):
        steps.append(f"crop {crop['width']}x{crop['height']}")
    return ", ".join(steps) or "no resize"


class Inception(Vision):
    """The 2048 features that FID is published with: the Inception of Heusel et al. from torch-fidelity, on images
    resized to 299 x 299 as in TensorFlow 1. Needs the extra `salun-sd[fid]`; weights are downloaded at first use.

    The model itself resizes, and its batches have images of one size. So each image goes through alone, in the thread
    that read it, and large images are not held.
    """

    name, resize = "inception", "299x299 bilinear of TensorFlow 1"

    def __init__(self, device: str = "cpu"):
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as e:
            raise UsageError("--fid inception needs torch-fidelity: type `pip install 'salun-sd[fid]'`, or give "
                             "--fid pocket or a transformers image model.") from e  # fmt: skip
        try:
            self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
        except Exception as e:
            raise SalunError(f"The weights of --fid inception could not be downloaded ({first_line(e)}): try again "
                             "with access to github.com.") from e  # fmt: skip
        self.device = device

    def prepare(self, image: Image.Image) -> "torch.Tensor":
        """RGB image => its features [2048], float32."""
        import torch

        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, height, width), uint8
        with torch.inference_mode():
            return self.model(pixels[None].to(self.device))[0][0].float().cpu()

    def __call__(self, images: "list[torch.Tensor]") -> np.ndarray:
        """Prepared images => features [B, 2048], float32."""
        return np.stack(images)


def extractor(name: str, judge: Path, device: str = "cpu") -> ImageModel | Inception:
    """The extractor called `pocket` (the model in the folder `judge`), `inception`, or a transformers image model by
    folder or hub id."""
    if name == "inception":
        return Inception(device)
    return ImageModel(judge, device, name="pocket judge") if name == "pocket" else ImageModel(name, device)


def features(extractor: ImageModel | Inception, files: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    """Each readable file and its features [D], float32, in order; unreadable files are left out. Raises NotFinite where
    the extractor gives no such values."""
    import torch

    files = list(files)
    read = zip(files, prepared(extractor.prepare, files), strict=True)
    readable = ((file, image) for file, image in read if not isinstance(image, Unreadable))
    while batch := list(islice(readable, BATCH)):
        vectors = extractor([image for _, image in batch])
        finite(torch.from_numpy(vectors), f"The output of --fid {extractor.name}")
        yield from zip([file for file, _ in batch], vectors, strict=True)
