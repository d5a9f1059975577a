"""Which model a folder or a file holds: Stable Diffusion 1.x, 2.x, SDXL base, or one that is not supported."""

import re
from pathlib import Path
from typing import NamedTuple

from salun_sd.checkpoint import configs
from salun_sd.checkpoint.tensors import Tensors
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.documents import read_json

SUPPORTED = "salun-sd edits Stable Diffusion 1.x, 2.x and SDXL base"


class Family(NamedTuple):
    key: str  # of layout.FAMILIES
    name: str
    pipeline: str  # the class in diffusers
    parts: tuple[str, ...]  # the components with weights
    encoder_prefix: str  # of its text encoder's tensors in a single file; no other family has such names
    hub: str  # a hub id whose configs fit a single file of the family


SD1 = Family(
    "sd1", "Stable Diffusion 1.x", "StableDiffusionPipeline", ("unet", "vae", "text_encoder"),
    "cond_stage_model.transformer.", "stable-diffusion-v1-5/stable-diffusion-v1-5",
)  # fmt: skip
SD2 = Family(
    "sd2", "Stable Diffusion 2.x", "StableDiffusionPipeline", ("unet", "vae", "text_encoder"),
    "cond_stage_model.model.", "stabilityai/stable-diffusion-2-1",
)  # fmt: skip
SDXL = Family(
    "sdxl", "SDXL base", "StableDiffusionXLPipeline", ("unet", "vae", "text_encoder", "text_encoder_2"),
    "conditioner.embedders.1.model.", "stabilityai/stable-diffusion-xl-base-1.0",
)  # fmt: skip

INDEX = {"_class_name": str, "force_zeros_for_empty_prompt?": bool}  # the shape of model_index.json
OTHER_INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
UNET, EMA = "model.diffusion_model.", "model_ema."  # prefixes in a single file: of the UNet, and of its moving average
ENTRY = f"{UNET}input_blocks.0.0.weight"
# Empty tensors of these names in a single file mean that the model predicts v, and that its noise ends without signal.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
# Files that are not supported: a pattern of tensor names, and what a file with such a name is. The first match counts.
OTHER_KINDS = [  # these have a UNet in the original layout
    (r"^edm_(mean|std|vpred)", "a model of EDM noise, as Playground 2.5 and CosXL are"),
    (r"^(embedder|noise_augmentor)\.", "an unCLIP model, which draws from images"),
]
UNSUPPORTED = [  # these have none
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
    file = folder / "model_index.json"
    if not file.is_file() and not file.is_symlink():
        component = _class_of(folder / "config.json")
        what = f"it is one component, {component}" if component else "it has no model_index.json"
        raise UsageError(f"{name} is not a Stable Diffusion pipeline folder: {what}.")
    pipeline = read_json(file, INDEX, UsageError)["_class_name"]
    if pipeline not in (SD1.pipeline, SDXL.pipeline):
        raise UsageError(f"{name} is a {pipeline}; {SUPPORTED}.")
    unet = configs.read(folder, "unet", name)
    if unet["in_channels"] != 4:
        raise UsageError(_odd_input(name, unet["in_channels"]))
    if pipeline == SDXL.pipeline:
        if unet.get("addition_embed_type") != "text_time" or not (folder / "text_encoder").is_dir():
            raise UsageError(f"{name} is an SDXL refiner, without the first text encoder; {SUPPORTED}.")
        family = SDXL
    else:  # OpenAI's CLIP (1.x) was trained with quick_gelu, OpenCLIP (2.x) with gelu
        family = SD1 if configs.read(folder, "text_encoder", name)["hidden_act"] == "quick_gelu" else SD2
    _check_fit(family, {part: configs.read(folder, part, name) for part in family.parts}, name)
    return family


def _check_fit(family: Family, settings: dict[str, dict], name: str) -> None:
    """Raise UsageError where the parts' configs ask for inputs that the family has not, or do not fit one another."""
    unet, vae = settings["unet"], settings["vae"]
    inputs = [key for key in OTHER_INPUTS if unet.get(key) is not None]
    if family is not SDXL and unet.get("addition_embed_type") is not None:
        inputs.append("addition_embed_type")
    if inputs:
        raise UsageError(f"{name} has a UNet with an input of its own, {inputs[0]} {unet[inputs[0]]!r}; {SUPPORTED}.")
    encoders = [settings[part] for part in family.parts if part.startswith("text_encoder")]
    sizes = {  # of a thing in two configs
        "out_channels of the unet": (unet.get("out_channels", 4), 4),
        "latent_channels of the vae": (vae.get("latent_channels", 4), 4),
        "cross_attention_dim of the unet": (unet["cross_attention_dim"], sum(e["hidden_size"] for e in encoders)),
    }
    if family is SDXL:
        if "scaling_factor" not in vae:  # the default of diffusers is that of 1.x
            raise UsageError(f"The config of the vae of {name} is damaged: it has no scaling_factor.")
        time, pooled = unet.get("addition_time_embed_dim"), unet.get("projection_class_embeddings_input_dim")
        wanted = 6 * time + (encoders[1].get("projection_dim") or 512) if isinstance(time, int) else None
        sizes["projection_class_embeddings_input_dim of the unet"] = pooled, wanted
    for what, (size, wanted) in sizes.items():
        if size != wanted:
            raise UsageError(f"The {what} of {name} is {size}, and its other parts need {wanted}: a config is of "
                             "another model.")  # fmt: skip


def of_tensors(tensors: Tensors, name: str) -> Family:
    """The family of a single file in the original layout. Raises UsageError for anything else, and says what it is."""
    entry = tensors.get(ENTRY, tensors.get(averaged(ENTRY)))
    for pattern, what in OTHER_KINDS if entry else UNSUPPORTED:
        if any(re.search(pattern, key) for key in tensors):
            raise UsageError(f"{name} is {what}. {SUPPORTED[0].upper()}{SUPPORTED[1:]}.")
    if entry is None:
        if tensors and all(re.search(VAE, key) for key in tensors):
            raise UsageError(f"{name} is a VAE, which has no UNet to edit; {SUPPORTED}.")
        raise UsageError(f"{name} has no Stable Diffusion UNet (first tensor: {next(iter(tensors), 'none')}).")
    if len(entry.shape) != 4:
        raise UsageError(f"{name} is damaged: {ENTRY} has the shape {list(entry.shape)}, and is no convolution.")
    if entry.shape[1] != 4:
        raise UsageError(_odd_input(name, entry.shape[1]))
    for family in (SDXL, SD2, SD1):
        if any(key.startswith(family.encoder_prefix) for key in tensors):
            return family
    if any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
        raise UsageError(f"{name} is an SDXL refiner; {SUPPORTED}.")
    raise UsageError(f"{name} has a UNet but no text encoder: give the whole checkpoint.")


def averaged(key: str) -> str:
    """The name that a single file gives to the moving average (EMA) of a tensor of its UNet."""
    return EMA + key.removeprefix("model.").replace(".", "")


def _class_of(file: Path) -> str | None:
    """The class that a component's config names; None where it names none."""
    try:
        return read_json(file, {"_class_name": str})["_class_name"]
    except (OSError, SalunError):
        return None


def _odd_input(name: str, channels: int | None) -> str:
    kind = {9: "an inpainting UNet", 8: "an image-editing UNet", 5: "a depth UNet"}.get(channels, "another UNet")
    return f"{name} has {kind}, {channels} input channels instead of 4; {SUPPORTED}."
