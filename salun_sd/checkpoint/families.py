"""Which model a folder or a file holds: Stable Diffusion 1.x, 2.x, SDXL base, or one that is not supported."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from salun_sd.checkpoint.tensors import Tensors
from salun_sd.errors import UsageError

SUPPORTED = "salun-sd edits Stable Diffusion 1.x, 2.x and SDXL base"


class Family(NamedTuple):
    key: str  # of layout.FAMILIES
    name: str
    pipeline: str  # the class in diffusers
    parts: tuple[str, ...]  # the components with weights
    encoder_prefix: str  # of its text encoder's tensors in a single file; no other family has such names


SD1 = Family(
    "sd1", "Stable Diffusion 1.x", "StableDiffusionPipeline", ("unet", "vae", "text_encoder"),
    "cond_stage_model.transformer.",
)  # fmt: skip
SD2 = Family(
    "sd2", "Stable Diffusion 2.x", "StableDiffusionPipeline", ("unet", "vae", "text_encoder"), "cond_stage_model.model."
)
SDXL = Family(
    "sdxl", "SDXL base", "StableDiffusionXLPipeline", ("unet", "vae", "text_encoder", "text_encoder_2"),
    "conditioner.embedders.1.model.",
)  # fmt: skip

UNET = "model.diffusion_model."
V_MARK = "v_pred"  # an empty tensor of this name in a single file means that the model predicts v
# Files that are not supported: a pattern of tensor names, and what a file with such a name is. The first match counts.
UNSUPPORTED = [
    (r"lora_|\.lora|\.hada_|\.lokr_", "a LoRA, which only adds to a model: give the checkpoint it was trained for"),
    (r"\.double_blocks\.|^double_blocks\.|single_transformer_blocks\.", "a Flux model"),
    (r"joint_blocks\.|joint_attn", "a Stable Diffusion 3 model"),
    (r"^control_model\.|controlnet_|^input_hint_block", "a ControlNet"),
    (r"^(unet\.)?(down|up)_blocks\.", "a UNet alone in diffusers' names: give the folder of the whole pipeline"),
    (r"^(string_to_param|emb_params|clip_[lg])$", "a textual inversion"),
]  # fmt: skip
VAE = r"^(first_stage_model\.)?(encoder|decoder|quant_conv|post_quant_conv)\."


def of_folder(folder: Path, name: str) -> Family:
    """The family of a pipeline folder, which errors call `name`. Raises UsageError for anything else, and says what."""
    index = folder / "model_index.json"
    if not index.is_file():
        component = _class_of(folder / "config.json")
        what = f"it is one component, {component}" if component else "it has no model_index.json"
        raise UsageError(f"{name} is not a Stable Diffusion pipeline folder: {what}.")
    pipeline = _class_of(index)
    if pipeline is None:
        raise UsageError(f"{index} is damaged: it names no pipeline class.")
    if pipeline not in (SD1.pipeline, SDXL.pipeline):
        raise UsageError(f"{name} is a {pipeline}; {SUPPORTED}.")
    unet = config(folder, "unet", name)
    if unet.get("in_channels") != 4:
        raise UsageError(_odd_input(name, unet.get("in_channels")))
    if pipeline == SDXL.pipeline:
        if unet.get("addition_embed_type") != "text_time" or not (folder / "text_encoder").is_dir():
            raise UsageError(f"{name} is an SDXL refiner, without the first text encoder; {SUPPORTED}.")
        return SDXL
    # OpenAI's CLIP (1.x) was trained with quick_gelu, OpenCLIP (2.x) with gelu
    return SD1 if config(folder, "text_encoder", name).get("hidden_act", "quick_gelu") == "quick_gelu" else SD2


def of_tensors(tensors: Tensors, name: str) -> Family:
    """The family of a single file in the original layout. Raises UsageError for anything else, and says what it is."""
    for pattern, what in UNSUPPORTED:
        if any(re.search(pattern, key) for key in tensors):
            raise UsageError(f"{name} is {what}. {SUPPORTED[0].upper()}{SUPPORTED[1:]}.")
    entry = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if entry is None:
        if tensors and all(re.search(VAE, key) for key in tensors):
            raise UsageError(f"{name} is a VAE, which has no UNet to edit; {SUPPORTED}.")
        raise UsageError(f"{name} has no Stable Diffusion UNet (first tensor: {next(iter(tensors), 'none')}).")
    if entry.shape[1] != 4:
        raise UsageError(_odd_input(name, entry.shape[1]))
    for family in (SDXL, SD2, SD1):
        if any(key.startswith(family.encoder_prefix) for key in tensors):
            return family
    if any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
        raise UsageError(f"{name} is an SDXL refiner; {SUPPORTED}.")
    raise UsageError(f"{name} has a UNet but no text encoder: give the whole checkpoint.")


def config(folder: Path, part: str, name: str) -> dict:
    """config.json of one part of a pipeline. Raises UsageError if it is missing or damaged."""
    file = folder / part / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict):
            return settings
    except FileNotFoundError as e:
        raise UsageError(f"{name} has no {part}/config.json: it is not a whole pipeline folder.") from e
    except ValueError as e:
        raise UsageError(f"{file} is damaged: {e}.") from e
    raise UsageError(f"{file} is damaged: it holds no settings.")


def _class_of(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _odd_input(name: str, channels: int | None) -> str:
    kind = {9: "an inpainting UNet", 8: "an image-editing UNet", 5: "a depth UNet"}.get(channels, "another UNet")
    return f"{name} has {kind}, {channels} input channels instead of 4; {SUPPORTED}."
