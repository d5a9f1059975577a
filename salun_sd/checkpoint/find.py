"""Find a checkpoint by name, path or hub id, and reject what is not supported, with a sentence that says why."""

import errno
import json
import logging
import re
from pathlib import Path

import torch

from salun_sd.checkpoint import families, tensors
from salun_sd.checkpoint.model import CONFIGS, FILES, POCKET, Checkpoint
from salun_sd.checkpoint.tensors import Tensors
from salun_sd.errors import UsageError, first_line

logger = logging.getLogger(__name__)
CONFIG_PATTERNS = [f"{folder}*{suffix}" for folder in ("", "*/") for suffix in sorted(CONFIGS)]


def opened(
    model: str | Path | Checkpoint, config: str | None = None, revision: str | None = None, variant: str | None = None
) -> Checkpoint:  # fmt: skip
    """The checkpoint itself, or the one that `find` finds by its name; logs what was detected.

    Raises UsageError as `find` does, and for options of a name that are given with a Checkpoint.
    """
    checkpoint = model
    if isinstance(model, Checkpoint):
        if config or revision or variant:
            raise UsageError(f"--config, --revision and --variant are for a model by name, and {model.name} is found "
                             "already: give them to find().")  # fmt: skip
    else:
        checkpoint = find(str(model), config=config, revision=revision, variant=variant)
    logger.info(checkpoint.describe())
    return checkpoint


def find(
    model: str, *, config: str | None = None, revision: str | None = None, variant: str | None = None
) -> Checkpoint:  # fmt: skip
    """The checkpoint `pocket`, a diffusers folder, a single file in the original layout, or a hub id (cached).

    Raises UsageError, which says what `model` is, for anything else.
    """
    path = POCKET if model == "pocket" else Path(model)
    if path.is_file():
        return _single_file(model, path, config, revision, variant)
    if config:
        raise UsageError(f"--config is for a single file, and {model} is not one.")
    if path.exists():
        if revision:
            raise UsageError(f"--revision is for a hub id, and {model} is a folder on this disk.")
    elif path.suffix in FILES:
        raise UsageError(f"Model file {model} was not found.")
    else:
        path = _from_hub(model, revision, variant)
        revision = path.name  # the commit
    if variant and not any(path.glob(f"unet/*.{variant}*")):
        logger.warning(f"{model} has no {variant} UNet; its plain files are read instead.")
        variant = None
    return _checked(Checkpoint(model, path, path, families.of_folder(path, model), variant, revision))


def _single_file(name: str, file: Path, config: str | None, revision: str | None, variant: str | None) -> Checkpoint:
    if revision or variant:
        raise UsageError(f"--revision and --variant are for a hub id or a folder, and {name} is a single file.")
    if file.suffix not in FILES:
        raise UsageError(f"{name} is not a .safetensors or .ckpt file.")
    content, metadata = tensors.read(file)
    if "salun_sd" in metadata and "modelspec.architecture" not in metadata:
        raise UsageError(f"{name} is a mask or a patch of salun-sd: give the checkpoint that it was made for.")
    family, prediction = families.of_tensors(content, name), _prediction_type(content, metadata)
    if family is families.SD2 and not config and not prediction:
        raise UsageError(
            f"{name} is {family.name}, and does not say whether it predicts the noise (2.x base, 512 pixels) or v (768 "
            "pixels): give a pipeline folder or a hub id of the same kind with --config."
        )
    if config == "pocket" or (not config and _is_of_pocket(metadata)):
        folder = POCKET
    else:
        folder = Path(config) if config and Path(config).is_dir() else _config_from_hub(name, config, content)
    of_config = families.of_folder(folder, str(folder))
    if of_config != family:
        raise UsageError(f"{name} is {family.name}, but its config, {folder}, is of {of_config.name}: give another "
                         "--config.")  # fmt: skip
    checkpoint = _checked(Checkpoint(name, file, folder, family))
    if prediction and prediction != checkpoint.prediction_type:
        raise UsageError(f"{name} says that it predicts {prediction}, but its config, {folder}, says "
                         f"{checkpoint.prediction_type}: give another --config.")  # fmt: skip
    return checkpoint


def _is_of_pocket(header: dict[str, str]) -> bool:
    """Whether a file was erased from the bundled checkpoint, whose config is not on the hub."""
    try:
        return json.loads(header["salun_sd"])["base"]["model"] == "pocket"
    except (KeyError, TypeError, ValueError):
        return False


def _prediction_type(content: Tensors, header: dict[str, str]) -> str | None:
    """The prediction type that a single file states; None for most files, which state none."""
    if families.V_MARK in content or header.get("modelspec.architecture", "").endswith("-v"):
        return "v_prediction"
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(header.get("modelspec.prediction_type", ""))


def _config_from_hub(name: str, config: str | None, content: Tensors) -> Path:
    """The folder of configs for a single file: of the hub id `config`, or else the one that diffusers chooses."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    repo = config or fetch_diffusers_config(content)["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repo, allow_patterns=CONFIG_PATTERNS))
    except Exception as e:  # the network, the hub and a wrong name raise many types
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        raise UsageError(
            f"{name} is a single file, and its config {repo} could not be downloaded ({first_line(e)}). Give a "
            "pipeline folder of the same kind of model, or a hub id that is cached here: --config FOLDER"
        ) from e


def _from_hub(model: str, revision: str | None, variant: str | None) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise UsageError(
            f"Model {model} was not found: give pocket, a diffusers folder, a single file or a hub id such as org/name."
        )
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:  # configs first: an unsupported model is rejected before its weights are downloaded
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
            f"Model {model} is not a folder here, and could not be downloaded from the hub ({first_line(e)}). Check "
            "the name, --revision, --variant and the network; for a gated model, run hf auth login"
        ) from e


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint. Raises UsageError for a dtype, prediction type or VAE that is not supported."""
    name = checkpoint.name
    odd = {t.dtype for t in checkpoint.unet.values()} - {torch.float32, torch.float16, torch.bfloat16}
    if odd:
        raise UsageError(f"The UNet of {name} is in {odd.pop()}; salun-sd edits float32, float16 and bfloat16.")
    vae, scheduler, prediction = checkpoint.settings("vae"), checkpoint.scheduler, checkpoint.prediction_type
    if prediction not in ("epsilon", "v_prediction") or scheduler.startswith("EDM"):
        raise UsageError(f"{name} was trained for {scheduler} with prediction type {prediction}; salun-sd edits models "
                         "that predict epsilon or v.")  # fmt: skip
    if vae.get("latents_mean") or vae.get("latents_std"):
        raise UsageError(f"{name} has a VAE with shifted latents, as Playground has; {families.SUPPORTED}.")
    return checkpoint
