"""Checkpoints on disk: their parts, read one tensor at a time under diffusers' names, and what their configs say."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from salun_sd.checkpoint import families, layout, tensors
from salun_sd.checkpoint.families import Family
from salun_sd.checkpoint.tensors import Lazy, Tensors
from salun_sd.errors import SalunError
from salun_sd.runtime.device import named

POCKET = Path(__file__).parents[1] / "pocket"
SAMPLING = "sampling.json"
FILES = (".safetensors", *tensors.PICKLES)
CONFIGS = {".json", ".txt", ".model"}  # of a pipeline folder, what is not weights


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion model on disk, a pipeline folder or a single file in the original layout."""

    name: str  # as the person gave it
    path: Path  # the folder or the file
    config: Path  # the folder with the configs, tokenizers and scheduler; for a folder, itself
    family: Family
    variant: str | None = None  # of the files in a folder, such as fp16
    revision: str | None = None  # of a hub id, the commit

    @property
    def is_file(self) -> bool:
        return self.path != self.config

    @cached_property
    def original(self) -> Tensors:
        """For a single file: its tensors under their own names."""
        return tensors.read(self.path)[0]

    @cached_property
    def header(self) -> dict[str, str]:
        """For a single file: what its header says beside the tensors."""
        return tensors.read(self.path)[1] if self.is_file else {}

    @cached_property
    def parts(self) -> dict[str, Tensors]:
        """The tensors of each component under diffusers' names. Raises SalunError for a damaged or missing file."""
        if not self.is_file:
            return {part: _of_files(part_files(self.path, part, self.variant), part) for part in self.family.parts}
        shapes = {part: _shapes(self.config, part) for part in self.family.parts}
        pieces = layout.original_layout(self.family.key, {part: list(names) for part, names in shapes.items()})
        parts: dict[str, Tensors] = {part: {} for part in self.family.parts}
        for (part, name), (key, which) in layout.inverse(pieces).items():
            if key not in self.original:
                raise SalunError(f"{self.name} has no {key}: it is not whole, or --config is of another model.")
            source = self.original[key]
            shape, dtype = layout.taken(pieces[key], which, source.shape, source.dtype)
            if torch.Size(shape) != shapes[part][name]:
                raise SalunError(
                    f"{key} of {self.name} has another shape than its config says: --config is of another model."
                )
            read = partial(_take, pieces[key], which, source)
            parts[part][name] = Lazy(dtype, torch.Size(shape), read)
        return parts

    @property
    def unet(self) -> Tensors:
        return self.parts["unet"]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the UNet's tensors, the same for a folder and a single file of the same weights."""
        return tensors.fingerprint(self.unet)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over everything that an image depends on: all weights, configs, tokenizers and the scheduler."""
        whole = hashlib.sha256(
            "".join(tensors.fingerprint(self.parts[part]) for part in self.family.parts[1:]).encode()
        )
        whole.update(self.fingerprint.encode())
        for file in sorted(p for p in self.config.glob("*/*") if p.suffix in CONFIGS and ".index." not in p.name):
            if file.parent.name in self._components:
                text = file.read_bytes()
                whole.update(f"{file.relative_to(self.config)} {hashlib.sha256(text).hexdigest()}".encode())
        return whole.hexdigest()

    @cached_property
    def _components(self) -> dict:
        return json.loads((self.config / "model_index.json").read_text(encoding="utf-8"))

    @cached_property
    def sampling(self) -> tuple[int, float]:
        """The usual number of denoising steps and classifier-free guidance scale for drawing: 50 and 7.5 for Stable
        Diffusion; a folder may say otherwise in a file sampling.json, as `pocket` does."""
        file = self.config / SAMPLING
        usual = json.loads(file.read_text()) if file.is_file() else {"steps": 50, "guidance": 7.5}
        return usual["steps"], usual["guidance"]

    @cached_property
    def _scheduler(self) -> dict:
        file = self.config / "scheduler" / "scheduler_config.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as e:
            raise SalunError(f"{self.name} has no readable {file.relative_to(self.config)}.") from e

    @property
    def scheduler(self) -> str:
        """The class in diffusers of the checkpoint's own scheduler."""
        return self._scheduler.get("_class_name", "unknown")

    @property
    def prediction_type(self) -> str:
        """What the UNet was trained to predict, as the scheduler says: "epsilon" or "v_prediction"."""
        return self._scheduler.get("prediction_type", "epsilon")

    @property
    def timesteps(self) -> int:
        """How many levels of noise the UNet was trained on, the most steps that it can draw in."""
        return self._scheduler.get("num_train_timesteps", 1000)

    def settings(self, part: str) -> dict:
        """A part's config."""
        return families.config(self.config, part, self.name)

    @property
    def pixels(self) -> int:
        """Of a side that a latent stands for: what the VAE halves."""
        return 2 ** (len(self.settings("vae")["block_out_channels"]) - 1)

    @property
    def image_size(self) -> int:
        """Pixels of a side, as the family draws them: 512, 768 or 1024; 32 for `pocket`."""
        return self.settings("unet")["sample_size"] * self.pixels

    @property
    def least_size(self) -> int:
        """The least side of an image in pixels, of which every side has to be a multiple: what the VAE and the UNet
        halve."""
        return self.pixels * 2 ** (len(self.settings("unet")["block_out_channels"]) - 1)

    def describe(self) -> str:
        """One line: what was found, and what it decides."""
        dtypes = sorted({named(t.dtype) for t in self.unet.values()})
        weights = sum(t.shape.numel() for t in self.unet.values())
        return (
            f"{self.name}: {self.family.name}, predicts {self.prediction_type.removesuffix('_prediction')}, "
            f"{self.image_size} x {self.image_size} pixels, {weights:,} UNet weights in {', '.join(dtypes)}"
        )


def part_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors files of a pipeline's part, one or sharded, in a fixed order. Raises SalunError if missing."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    has_variant = variant and any((folder / part).glob(f"{stem}.*{variant}*"))  # some parts come in one form only
    dotted = f".{variant}" if has_variant else ""
    index = folder / part / f"{stem}.safetensors.index{dotted}.json"
    names = [f"{stem}{dotted}.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [folder / part / name for name in names]
    for file in files:
        if not file.is_file():
            there = sorted(p.name for p in (folder / part).glob(f"{stem}*.safetensors"))
            hint = f"there is {', '.join(there)}, see --variant" if there else "weights have to be in safetensors"
            raise SalunError(f"{file} is missing: {hint}.")
    return files


def _of_files(files: list[Path], part: str) -> Tensors:
    found = {name: t for file in files for name, t in tensors.read(file)[0].items()}
    return {own: t for name, t in found.items() if (own := layout.canonical(part, name)) is not None}


def _shapes(config: Path, part: str) -> dict[str, torch.Size]:
    """The names and shapes of a part's weights, from its config alone."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    settings = families.config(config, part, str(config))
    with init_empty_weights():
        if part.startswith("text_encoder"):
            kind = transformers.CLIPTextModelWithProjection if part == "text_encoder_2" else transformers.CLIPTextModel
            model = kind(transformers.CLIPTextConfig.from_dict(settings))
        else:
            kind = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
            model = kind.from_config(settings)
    return {layout.canonical(part, name): p.shape for name, p in model.named_parameters()}


def _take(piece: layout.Piece, which: int, source: Lazy) -> torch.Tensor:
    return layout.take(piece, which, source.read())
