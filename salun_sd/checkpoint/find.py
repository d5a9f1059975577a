"""Find a checkpoint by name, path or hub id, and reject what is not supported, with a sentence that says why."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from salun_sd.checkpoint import families, layout, provenance, tensors
from salun_sd.checkpoint.model import BUNDLED, CONFIGS, FILES, POCKET, Checkpoint
from salun_sd.checkpoint.tensors import Tensors
from salun_sd.errors import SalunError, UsageError, first_line, some
from salun_sd.runtime.documents import parse_json
from salun_sd.runtime.files import is_full

logger = logging.getLogger(__name__)
EDITED = {torch.float32, torch.float16, torch.bfloat16}
CONFIG_PATTERNS = [f"{folder}*{suffix}" for folder in ("", "*/") for suffix in sorted(CONFIGS)]


def opened(
    model: str | Path | Checkpoint, config: str | None = None, revision: str | None = None, variant: str | None = None
) -> Checkpoint:  # fmt: skip
    """The checkpoint itself, or the one that `find` finds by its name; logs what was detected.

    Raises UsageError as `find` does, and for options of a name that are given with a Checkpoint; SalunError where the
    record of an erased checkpoint is not of these weights.
    """
    checkpoint = model
    if isinstance(model, Checkpoint):
        if config or revision or variant:
            raise UsageError(f"--config, --revision and --variant are for a model by name, and {model.name} is found "
                             "already: give them to find().")  # fmt: skip
    else:
        checkpoint = find(str(model), config=config, revision=revision, variant=variant)
    logger.info(checkpoint.describe())
    provenance.check(checkpoint)
    return checkpoint


def find(
    model: str, *, config: str | None = None, revision: str | None = None, variant: str | None = None
) -> Checkpoint:  # fmt: skip
    """A checkpoint of BUNDLED, a diffusers folder, a single file in the original layout, or a hub id (cached).

    Raises UsageError, which says what `model` is, for anything else; SalunError for a damaged one.
    """
    path = BUNDLED.get(model, Path(model))
    if os.path.lexists(path) and not path.is_dir():
        return _single_file(model, path, config, revision, variant)
    if config:
        raise UsageError(f"--config is for a single file, and {model} is not one.")
    if path.exists():
        if revision:
            raise UsageError(f"--revision is for a hub id, and {model} is a folder on this disk.")
    elif path.suffix.lower() in FILES:
        raise UsageError(f"Model file {model} was not found: give the path of a file that is there.")
    else:
        path = _from_hub(model, revision, variant)
        revision = path.name  # the commit
    family = families.of_folder(path, model)
    if variant and not any(path.glob(f"{family.parts[0]}/*.{variant}*")):
        logger.warning(f"{model} has no {variant} weights; its plain files are read instead.")
        variant = None
    return _checked(Checkpoint(model, path, path, family, variant, revision))


def _single_file(name: str, file: Path, config: str | None, revision: str | None, variant: str | None) -> Checkpoint:
    if revision or variant:
        raise UsageError(f"--revision and --variant are for a hub id or a folder, and {name} is a single file.")
    if file.suffix.lower() not in FILES:
        raise UsageError(f"{name} is not a .safetensors or .ckpt file: give one, or a pipeline folder.")
    content, metadata = tensors.read(file)
    if "salun_sd" in metadata and "modelspec.architecture" not in metadata:
        raise UsageError(f"{name} is a mask or a patch of salun-sd: give the checkpoint that it was made for.")
    family, prediction = families.of_tensors(content, name), _prediction_type(content, metadata)
    if family is families.SD2 and not config and not prediction:
        raise UsageError(
            f"{name} is {family.name}, and does not say whether it predicts the noise (2.x base, 512 pixels) or v (768 "
            "pixels): give a pipeline folder or a hub id of the same kind with --config."
        )
    folder = _config_folder(name, family, config, metadata)
    of_config = families.of_folder(folder, str(folder))
    if of_config != family:
        raise UsageError(f"{name} is {family.name}, but its config, {folder}, is of {of_config.name}: give another "
                         "--config.")  # fmt: skip
    checkpoint = _checked(Checkpoint(name, file, folder, family))
    if prediction and prediction != checkpoint.prediction_type:
        raise UsageError(f"{name} says that it predicts {prediction}, but its config, {folder}, says "
                         f"{checkpoint.prediction_type}: give another --config.")  # fmt: skip
    _check_noise(checkpoint)
    _log_oddities(checkpoint)
    return checkpoint


def _config_folder(name: str, family: families.Family, config: str | None, header: dict[str, str]) -> Path:
    """The folder of configs for a single file: `config`, which may be a hub id, or else that of its family."""
    if config == "pocket" or (not config and _is_of_pocket(header)):
        return POCKET
    if config and Path(config).is_dir():
        return Path(config)
    from huggingface_hub import snapshot_download

    repo = config or family.hub
    with _hub_failures(
        f"{name} is a single file, and its config {repo} could not be downloaded",
        "Give a pipeline folder of the same kind of model, or a hub id that is cached here: --config FOLDER",
    ):
        return Path(snapshot_download(repo, allow_patterns=CONFIG_PATTERNS))


def _check_noise(checkpoint: Checkpoint) -> None:
    """Compare a single file's mark of zero terminal SNR with its config. Raises UsageError where only the file has
    it; logs a warning where only the config has it, as files without marks are common."""
    name, marks = checkpoint.name, [m for m in (families.V_MARK, families.ZERO_SNR_MARK) if m in checkpoint.original]
    is_rescaled = bool(checkpoint.noise.get("rescale_betas_zero_snr"))
    if families.ZERO_SNR_MARK in marks and not is_rescaled:
        raise UsageError(f"{name} has zero terminal SNR (its tensor {families.ZERO_SNR_MARK} says so), but its config, "
                         f"{checkpoint.config}, has no rescale_betas_zero_snr: give another --config.")  # fmt: skip
    if marks == [families.V_MARK] and is_rescaled:
        logger.warning(f"The config of {name} has rescale_betas_zero_snr, and the file has no tensor "
                       f"{families.ZERO_SNR_MARK}: A1111 and ComfyUI draw it with other noise.")  # fmt: skip


def _log_oddities(checkpoint: Checkpoint) -> None:
    """Warn of a UNet that a single file holds in an uncommon form, or together with what is not used."""
    names = {part: list(content) for part, content in checkpoint.parts.items()}
    known = layout.original_layout(checkpoint.family.key, names)
    if families.ENTRY not in checkpoint.original:
        logger.warning(f"{checkpoint.name} holds only the moving average (EMA) of a UNet, which is read as the UNet.")
    prefixes = (families.UNET, "control_model.")
    if extra := [key for key in checkpoint.original if key.startswith(prefixes) and key not in known]:
        logger.warning(f"{checkpoint.name} has tensors that no UNet of {checkpoint.family.name} has, and nothing here "
                       f"uses them: {some(extra)}.")  # fmt: skip


def _is_of_pocket(header: dict[str, str]) -> bool:
    """Whether a file was erased from the bundled checkpoint, whose config is not on the hub."""
    try:
        record = parse_json(header["salun_sd"], "", {"base": {"model": str}})
    except (KeyError, SalunError):
        return False
    return record["base"]["model"] == "pocket"


def _prediction_type(content: Tensors, header: dict[str, str]) -> str | None:
    """The prediction type that a single file states; None for most files, which state none."""
    if families.V_MARK in content or header.get("modelspec.architecture", "").endswith("-v"):
        return "v_prediction"
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(header.get("modelspec.prediction_type", ""))


def _from_hub(model: str, revision: str | None, variant: str | None) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise UsageError(
            f"Model {model} was not found: give {', '.join(BUNDLED)}, a diffusers folder, a single file or a hub id "
            "such as org/name."
        )
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    with _hub_failures(
        f"Model {model} is not a folder here, and could not be downloaded from the hub",
        "Check the name, --revision, --variant and the network; for a gated model, run hf auth login",
    ):  # configs first: an unsupported model is rejected before its weights are downloaded
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=CONFIG_PATTERNS))
        if (folder / "model_index.json").is_file():
            families.of_folder(folder, model)
        return Path(DiffusionPipeline.download(model, revision=folder.name, variant=variant, use_safetensors=True))


@contextmanager
def _hub_failures(failure: str, advice: str) -> Iterator[None]:
    """Raise UsageError, with the failure, its reason and the advice, for anything that fails in a download but a full
    disk: the network, the hub and a wrong name raise many types."""
    try:
        yield
    except SalunError:
        raise
    except Exception as e:
        if is_full(e):
            raise
        raise UsageError(f"{failure} ({first_line(e)}). {advice}") from e


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint. Raises UsageError for a dtype, prediction type or VAE that is not supported."""
    name = checkpoint.name
    for part, content in checkpoint.parts.items():
        for key, t in content.items():
            if t.dtype not in EDITED and (part == checkpoint.denoiser or key.endswith((".weight", ".bias"))):
                raise UsageError(f"{key} in the {part} of {name} is in {t.dtype}; salun-sd edits float32, float16 and "
                                 "bfloat16.")  # fmt: skip
    scheduler, prediction = checkpoint.scheduler, checkpoint.prediction_type
    vae = checkpoint.vae_settings or {}
    if scheduler.startswith("EDM"):
        raise UsageError(f"{name} was trained with the noise of EDM ({scheduler}); {families.SUPPORTED}.")
    if prediction not in ("epsilon", "v_prediction"):
        raise UsageError(f"{name} was trained for {scheduler} with prediction type {prediction}; salun-sd edits models "
                         "that predict epsilon or v.")  # fmt: skip
    if vae.get("latents_mean") or vae.get("latents_std"):
        raise UsageError(f"{name} has a VAE with shifted latents, as Playground has; {families.SUPPORTED}.")
    return checkpoint
