"""Checkpoints: find them, read their parts one tensor at a time in diffusers' names, fingerprint and load them."""

import errno
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from salun_sd import families, layout, tensors
from salun_sd.errors import SalunError, UsageError, first_line
from salun_sd.families import Family
from salun_sd.precision import named
from salun_sd.tensors import Lazy, Tensors

POCKET = Path(__file__).parent / "pocket"
SAMPLING = "sampling.json"
FILES = (".safetensors", *tensors.PICKLES)
CONFIGS = {".json", ".txt", ".model"}  # of a pipeline folder, what is not weights
CONFIG_PATTERNS = [f"{folder}*{suffix}" for folder in ("", "*/") for suffix in sorted(CONFIGS)]


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


def find(
    model: str, *, config: str | None = None, revision: str | None = None, variant: str | None = None
) -> Checkpoint:  # fmt: skip
    """`pocket`, a diffusers folder, a single file in the original layout, or a hub id (downloaded and cached).

    Raises UsageError, in a sentence that names what was found, for anything else.
    """
    path = POCKET if model == "pocket" else Path(model)
    if path.is_file():
        return _single_file(model, path, config, revision, variant)
    if config:
        raise UsageError(f"--config is for a single file, and {model} is none.")
    if path.exists():
        if revision:
            raise UsageError(f"--revision is for a hub id, and {model} is a folder here.")
    elif path.suffix in FILES:
        raise UsageError(f"Model file {model} was not found.")
    else:
        path = _from_hub(model, revision, variant)
        revision = path.name  # the commit that it was
    if variant and not any(path.glob(f"unet/*.{variant}*")):
        print(f"{model} has no {variant} UNet; its plain files are read.", file=sys.stderr)
        variant = None
    return _checked(Checkpoint(model, path, path, families.of_folder(path, model), variant, revision))


def _single_file(name: str, file: Path, config: str | None, revision: str | None, variant: str | None) -> Checkpoint:
    if revision or variant:
        raise UsageError(f"--revision and --variant are for a hub id or a folder, and {name} is a single file.")
    if file.suffix not in FILES:
        raise UsageError(f"{name} is no .safetensors or .ckpt file.")
    content, metadata = tensors.read(file)
    if "salun_sd" in metadata and "modelspec.architecture" not in metadata:
        raise UsageError(f"{name} is a mask or a patch of salun-sd: give the checkpoint that it was made for.")
    family, said = families.of_tensors(content, name), _said_prediction(content, metadata)
    if family is families.SD2 and not config and not said:
        raise UsageError(
            f"{name} is {family.name}, and does not say whether it predicts the noise (2.x base, 512 pixels) or v (768 "
            "pixels): give a pipeline folder or hub id of its kind with --config."
        )
    if config == "pocket" or (not config and _is_of_pocket(metadata)):
        folder = POCKET
    else:
        folder = Path(config) if config and Path(config).is_dir() else _config_from_hub(name, config, content)
    of_config = families.of_folder(folder, str(folder))
    if of_config != family:
        raise UsageError(f"{name} is {family.name}, but its config, {folder}, is of {of_config.name}: see --config.")
    found = _checked(Checkpoint(name, file, folder, family))
    if said and said != found.prediction_type:
        other = found.prediction_type
        raise UsageError(f"{name} says that it predicts {said}, but its config, {folder}, {other}: see --config.")
    return found


def _is_of_pocket(header: dict[str, str]) -> bool:
    """Whether a single file of ours was erased from the bundled checkpoint, whose config no hub has."""
    try:
        return json.loads(header["salun_sd"])["base"]["model"] == "pocket"
    except (KeyError, TypeError, ValueError):
        return False


def _said_prediction(content: Tensors, header: dict[str, str]) -> str | None:
    """What a single file says of its prediction type; most say nothing."""
    if families.V_MARK in content or header.get("modelspec.architecture", "").endswith("-v"):
        return "v_prediction"
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(header.get("modelspec.prediction_type", ""))


def _config_from_hub(name: str, config: str | None, content: Tensors) -> Path:
    """The configs that go with a single file: of the hub id given, or of the one that diffusers knows for its kind."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    repo = config or fetch_diffusers_config(content)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repo, allow_patterns=CONFIG_PATTERNS))
    except Exception as e:  # of the network, of the hub, of the name: many types
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        raise UsageError(
            f"{name} is a single file, and its config could not be had from the hub as {repo} ({first_line(e)}). Give "
            "a pipeline folder of the same kind of model, or a hub id that is cached here: --config FOLDER"
        ) from e


def _from_hub(model: str, revision: str | None, variant: str | None) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise UsageError(
            f"Model {model} was not found: give `pocket`, a diffusers folder, a single file or a hub id such as "
            "org/name."
        )
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:  # the configs first: what is not for us is refused before its weights are fetched
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=CONFIG_PATTERNS))
        if (folder / "model_index.json").is_file():
            families.of_folder(folder, model)
        return Path(DiffusionPipeline.download(model, revision=folder.name, variant=variant, use_safetensors=True))
    except UsageError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        raise UsageError(
            f"Model {model} is no folder here, and the hub did not give it ({first_line(e)}). "
            "Check the name, --revision, --variant, the network and, for a gated model: hf auth login"
        ) from e


def _checked(found: Checkpoint) -> Checkpoint:
    odd = {t.dtype for t in found.unet.values()} - {torch.float32, torch.float16, torch.bfloat16}
    if odd:
        raise UsageError(f"The UNet of {found.name} is in {odd.pop()}; salun-sd edits float32, float16 and bfloat16.")
    vae = found.settings("vae")
    if found.prediction_type not in ("epsilon", "v_prediction") or found.scheduler.startswith("EDM"):
        what = f"{found.scheduler} with prediction type {found.prediction_type}"
        raise UsageError(f"{found.name} was trained for {what}; salun-sd edits models that predict epsilon or v.")
    if vae.get("latents_mean") or vae.get("latents_std"):
        raise UsageError(f"{found.name} has a VAE with shifted latents, as Playground; {families.SUPPORTED}.")
    return found


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


def device() -> str:
    """The GPU if there is one, and accelerate's config does not say otherwise."""
    from accelerate.utils import parse_flag_from_env

    return "cuda" if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"


def load_unet(model: Checkpoint, dtype: torch.dtype = torch.float32):
    """The UNet alone on `device()`, its weights rounded to a dtype as each is read. Raises SalunError if one is
    missing."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        unet = diffusers.UNet2DConditionModel.from_config(model.settings("unet"))
    _check_complete(model, "unet", unet)
    names = {layout.canonical("unet", name): name for name, _ in unet.named_parameters()}
    unet.load_state_dict({names[name]: t.read().to(dtype) for name, t in model.unet.items()}, assign=True)
    return unet.requires_grad_(False).eval().to(device())


def load_scheduler(model: Checkpoint):
    """The checkpoint's own scheduler, of diffusers."""
    import diffusers

    return getattr(diffusers, model.scheduler).from_pretrained(model.config / "scheduler")


def _check_complete(model: Checkpoint, name: str, part: torch.nn.Module) -> None:
    """Raise SalunError unless a part's weights are those of its file."""
    wanted = {layout.canonical(name, n): p for n, p in part.named_parameters()}
    there = model.parts[name]
    odd = [n for n, p in wanted.items() if n not in there or there[n].shape != p.shape]
    odd += [n for n in there if name == "unet" and n not in wanted]
    if odd:
        raise SalunError(f"The {name} of {model.name} is not what its config says: {min(odd)} is missing or odd.")


def load(model: Checkpoint, *, unet: torch.nn.Module | bool = True):
    """The pipeline in float32 on `device()`, the safety checker off; with another UNet, or, where False, without one.

    Raises SalunError if a part is missing or damaged, or if a file lacks a weight (diffusers would draw it at random
    and only warn).
    """
    import diffusers
    import transformers

    diffusers.logging.disable_progress_bar()  # a bar for each file read is noise beside ours
    transformers.logging.disable_progress_bar()
    left_out = ["unet"] if unet is False else []
    settings: dict = {"local_files_only": True}
    if model.family is families.SDXL:
        settings["add_watermarker"] = False  # it marks images where a package happens to be installed
    else:
        left_out += ["safety_checker"]
    if not any((model.config / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise SalunError(f"{model.name} has no vocabulary in {model.config / 'tokenizer'}: fetch or save it again.")
    settings |= dict.fromkeys(left_out)
    if isinstance(unet, torch.nn.Module):
        settings["unet"] = unet
    kind = getattr(diffusers, model.family.pipeline)
    try:
        if model.is_file:
            pipeline = kind.from_single_file(str(model.path), config=str(model.config), **settings)
        else:
            pipeline = kind.from_pretrained(model.path, variant=model.variant, use_safetensors=True, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        raise SalunError(f"{model.name} could not be loaded as {model.family.name}: {first_line(e)}.") from e
    for name in model.family.parts:
        if name in settings:
            continue
        part = getattr(pipeline, name)
        _check_complete(model, name, part)
        part.requires_grad_(False).eval().to(device(), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
