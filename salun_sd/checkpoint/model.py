"""A checkpoint on disk: its tensors under diffusers' names, read one at a time, and the settings of its configs."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from salun_sd.checkpoint import configs, families, layout, tensors
from salun_sd.checkpoint.classes import Classes
from salun_sd.checkpoint.families import Family
from salun_sd.checkpoint.tensors import Lazy, Tensors
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.contents import file_bytes
from salun_sd.runtime.device import dtype_name
from salun_sd.runtime.documents import read_json

POCKET = Path(__file__).parents[1] / "pocket"
BUNDLED = {"pocket": POCKET, "pocket-ddpm": POCKET / "ddpm"}  # the checkpoints that ship with the package, by name
SAMPLING = "sampling.json"
EMPTY_IS_ZERO = "force_zeros_for_empty_prompt"  # of SDXL's model_index.json; true where it is absent
MOST_SIDE = 8192  # pixels that no Stable Diffusion was made for
LARGE = 100_000_000  # weights of a denoiser, from which on activations are worth recomputing
FILES = (".safetensors", *tensors.PICKLES)
CONFIGS = {".json", ".txt", ".model"}  # the files of a pipeline folder that are not weights


@dataclass(frozen=True)
class Checkpoint:
    """A diffusion model on disk: a pipeline folder, or a single file in the original layout of Stable Diffusion."""

    name: str  # as the person typed it
    path: Path  # the folder or the file
    config: Path  # the folder of the configs, tokenizers and scheduler; equal to `path` for a folder
    family: Family
    variant: str | None = None  # of the files in a folder, such as fp16
    revision: str | None = None  # the commit, for a hub id

    @property
    def is_file(self) -> bool:
        return self.path != self.config

    @cached_property
    def original(self) -> Tensors:
        """The tensors of a single file under the file's own names."""
        return tensors.read(self.path)[0]

    @cached_property
    def header(self) -> dict[str, str]:
        """The metadata in a single file's header; empty for a folder."""
        return tensors.read(self.path)[1] if self.is_file else {}

    @cached_property
    def parts(self) -> dict[str, Tensors]:
        """Part -> its tensors under diffusers' names. Raises SalunError if a file or a tensor is missing or damaged."""
        if not self.is_file:
            return {part: _of_files(part_files(self.path, part, self.variant), part) for part in self.family.parts}
        shapes = {part: self.shapes(part) for part in self.family.parts}
        pieces = layout.original_layout(self.family.key, {part: list(names) for part, names in shapes.items()})
        pieces = layout.as_written(pieces, self.original)
        parts: dict[str, Tensors] = {part: {} for part in self.family.parts}
        for (part, name), (key, which) in layout.inverse(pieces).items():
            if key not in self.original:
                raise SalunError(f"{self.name} has no {key}: it is not complete, or --config is of another model.")
            source = self.original[key]
            shape, dtype = layout.take_meta(pieces[key], which, source.shape, source.dtype)
            if torch.Size(shape) != shapes[part][name]:
                raise SalunError(
                    f"{key} of {self.name} has another shape than its config says: --config is of another model."
                )
            parts[part][name] = Lazy(dtype, torch.Size(shape), partial(_take, pieces[key], which, source))
        return parts

    @property
    def denoiser(self) -> str:
        """The part that is edited, and its folder: the UNet, or the transformer in its place."""
        return self.family.parts[0]

    @property
    def unet(self) -> Tensors:
        """The tensors of the denoiser."""
        return self.parts[self.denoiser]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the UNet's tensors; equal for a folder and a single file of the same weights."""
        return tensors.fingerprint(self.unet)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Part -> SHA-256 over its tensors, as `fingerprint` is for the UNet."""
        _, *others = self.family.parts
        return {self.denoiser: self.fingerprint, **{part: tensors.fingerprint(self.parts[part]) for part in others}}

    @cached_property
    def identity(self) -> str:
        """SHA-256 over all that an image depends on: weights, configs, tokenizers, scheduler, names of classes, and
        how an empty prompt is encoded."""
        unet, *others = self.fingerprints.values()
        digest = hashlib.sha256("".join([*others, unet]).encode())
        if self.classes:  # by which they are asked for
            digest.update(json.dumps(self.classes.labels).encode())
        if not self.index.get(EMPTY_IS_ZERO, True):  # as without the key, "" is drawn as zeros
            digest.update(f"{EMPTY_IS_ZERO} false".encode())
        files = (p for p in self.config.glob("*/*") if p.suffix in CONFIGS and ".index." not in p.name)
        for file in sorted(p for p in files if not p.is_dir()):
            if file.parent.name in self.index:
                of_file = hashlib.sha256(file_bytes(file)).hexdigest()
                digest.update(f"{file.relative_to(self.config)} {of_file}".encode())
        return digest.hexdigest()

    @cached_property
    def index(self) -> dict:
        """The pipeline's own settings, and for each of its parts the library and the class."""
        return read_json(self.config / "model_index.json", families.INDEX, UsageError)

    @cached_property
    def classes(self) -> Classes | None:
        """What a class-conditional model draws; None for one that draws from a text. Raises UsageError for an id2label
        that is not of this model."""
        if self.family.draws_text:
            return None
        settings, labels = self.unet_settings, self.index.get("id2label")
        if odd := next((key for key in labels or () if not re.fullmatch(r"\d{1,9}", key)), None):
            raise UsageError(f"{self.config / 'model_index.json'} is damaged: id2label.{odd} is no number of a class.")
        id2label = labels and {int(key): label for key, label in labels.items()}
        if self.family is families.DIT:  # whose null class stands behind the others, and is not counted
            count = settings["num_embeds_ada_norm"]
            return Classes.of(count + 1, id2label, self.name, null=count)
        return Classes.of(settings["num_class_embeds"], id2label, self.name)

    @property
    def is_guided(self) -> bool:
        """Whether it was trained without a prompt, too, so that guidance can take it away from that."""
        return self.classes is None or self.classes.has_null

    @cached_property
    def sampling(self) -> tuple[int, float]:
        """Denoising steps and guidance scale (diffusers' form) to draw with: those in the folder's sampling.json, which
        the bundled checkpoints have, or else the family's. Raises UsageError if the file is damaged."""
        file = self.config / SAMPLING
        if not os.path.lexists(file):
            return self.family.steps, self.family.guidance if self.is_guided else 1.0
        settings = read_json(file, {"steps": int, "guidance": float}, UsageError)
        if settings["steps"] < 1 or settings["guidance"] < 0:
            raise UsageError(f"{file} is damaged: steps is below 1, or guidance below 0.")
        if settings["guidance"] > 1 and not self.is_guided:
            raise UsageError(f"{file} has a guidance above 1, and {self.name} has no null class: write 1.0.")
        return settings["steps"], settings["guidance"]

    @cached_property
    def noise(self) -> dict:
        """The config of the scheduler, which says what noise the model was trained with. Raises UsageError if it is
        missing or damaged."""
        return configs.scheduler(self.config, self.name)

    @property
    def scheduler(self) -> str:
        """The class in diffusers of the checkpoint's own scheduler."""
        return self.noise["_class_name"]

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, as the scheduler's config says: "epsilon" or "v_prediction"."""
        return self.noise.get("prediction_type") or "epsilon"

    @property
    def timesteps(self) -> int:
        """The number of noise levels that the UNet was trained on: the most steps that it can draw in."""
        return self.noise.get("num_train_timesteps", 1000)

    def settings(self, part: str) -> dict:
        """The config of a part. Raises UsageError if it is missing or damaged."""
        return configs.read(self.config, part, self.name)

    @cached_property
    def unet_settings(self) -> dict:
        """The config of the denoiser."""
        return self.settings(self.denoiser)

    @cached_property
    def vae_settings(self) -> dict | None:
        """The config of the VAE; None for a model that draws pixels."""
        return self.settings("vae") if "vae" in self.family.parts else None

    def skeleton(self, part: str) -> torch.nn.Module:
        """The module that a part's config describes: its weights have no values. Raises UsageError if there is none."""
        return configs.skeleton(self.config, part, self.name)

    def shapes(self, part: str) -> dict[str, torch.Size]:
        """The names and shapes of a part's weights, from its config alone."""
        return {layout.canonical(part, name): p.shape for name, p in self.skeleton(part).named_parameters()}

    @property
    def pixels_per_latent(self) -> int:
        """Pixels of a side that one latent stands for: the VAE's downsampling factor; 1 in pixel space."""
        return 2 ** (len(self.vae_settings["block_out_channels"]) - 1) if self.vae_settings else 1

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that the model was made for: 512, 768 or 1024; 32 for `pocket`. The short side
        where they are no squares, and the VAE's where the UNet's config names none."""
        pixels, latents = self.pixels_per_latent, _side(self.unet_settings)
        if latents is None and self.vae_settings:
            latents = (_side(self.vae_settings) or 0) // pixels
        if not 0 < (latents or 0) * pixels <= MOST_SIDE:
            file = self.config / self.denoiser / "config.json"
            raise UsageError(f"{file} is damaged: its sample_size is {latents or 'missing'}.")
        return latents * pixels

    @property
    def size_multiple(self) -> int:
        """Pixels that both sides of a training image must be a multiple of, so that VAE and UNet can halve them."""
        return self.pixels_per_latent * configs.multiple(self.unet_settings)

    @property
    def weights(self) -> int:
        """The number of weights of the denoiser."""
        return sum(t.shape.numel() for t in self.unet.values())

    @property
    def is_large(self) -> bool:
        """Whether it has so many weights that activations are worth recomputing in the backward pass."""
        return self.weights >= LARGE

    def describe(self) -> str:
        """One line: family, classes, prediction type, image size, number of weights of the denoiser and their dtype."""
        dtypes = sorted({dtype_name(t.dtype) for t in self.unet.values()})
        classes = ""
        if self.classes:
            classes = f", {len(self.classes.labels)} classes with{'' if self.classes.has_null else 'out'} a null class"
        return (
            f"{self.name}: {self.family.name}{classes}, predicts {self.prediction_type.removesuffix('_prediction')}, "
            f"{self.image_size} x {self.image_size} pixels, {self.weights:,} {self.denoiser.replace('unet', 'UNet')} "
            f"weights in {', '.join(dtypes)}"
        )


def part_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors files of a part, one or several shards, in a fixed order. Raises SalunError if one is missing."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    has_variant = variant and any((folder / part).glob(f"{stem}.*{variant}*"))  # some parts have one form only
    dotted = f".{variant}" if has_variant else ""
    index = folder / part / f"{stem}.safetensors.index{dotted}.json"
    names = [f"{stem}{dotted}.safetensors"]
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
    files = [folder / part / name for name in names]
    for file in files:
        if not os.path.lexists(file):  # of what is there but is no file, tensors.read says what it is
            present = sorted(p.name for p in (folder / part).glob(f"{stem}*.safetensors"))
            hint = f"there is {', '.join(present)}, see --variant" if present else "weights must be in safetensors"
            if index.is_file():
                hint = f"{index.name} names it, so download or save the model again"
            raise SalunError(f"{file} is missing: {hint}.")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of the shard that holds it. Raises SalunError if the index is damaged."""
    shards = read_json(index, {"weight_map": {str: str}})["weight_map"]
    if odd := next((key for key, shard in shards.items() if shard != Path(shard).name or not shard), None):
        raise SalunError(f"{index} is damaged: weight_map.{odd} is no name of a file.")
    return shards


def _of_files(files: list[Path], part: str) -> Tensors:
    """The tensors of a part's files under canonical names."""
    by_name = {name: t for file in files for name, t in tensors.read(file)[0].items()}
    return {known: t for name, t in by_name.items() if (known := layout.canonical(part, name)) is not None}


def _side(settings: dict) -> int | None:
    """The short side of a config's sample_size."""
    size = settings.get("sample_size")
    return min(size) if isinstance(size, list) else size


def _take(piece: layout.Piece, which: int, source: Lazy) -> torch.Tensor:
    return layout.take(piece, which, source.read())
