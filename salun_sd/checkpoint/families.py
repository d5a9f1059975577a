"""Which model a folder or a file holds: Stable Diffusion 1.x, 2.x, SDXL base, a class-conditional model, or one that is
not supported."""

import re
from pathlib import Path
from typing import NamedTuple

from salun_sd.checkpoint import configs
from salun_sd.checkpoint.tensors import Tensors
from salun_sd.errors import SalunError, UsageError
from salun_sd.runtime.documents import read_json

SUPPORTED = "salun-sd edits Stable Diffusion 1.x, 2.x and SDXL base, and class-conditional DDPM and DiT"


class Family(NamedTuple):
    key: str  # of layout.FAMILIES, where it has a single file
    name: str
    pipeline: str  # the class in diffusers
    parts: tuple[str, ...]  # the components with weights; the first is the one that is edited
    encoder_prefix: str = ""  # of its text encoder's tensors in a single file; no other family has such names
    hub: str = ""  # a hub id whose configs fit a single file of the family
    steps: int = 50  # of denoising, to draw with
    guidance: float = 7.5  # guidance scale to draw with, in diffusers' form
    saliency_guidance: float = 7.5  # w of the saliency

    @property
    def draws_text(self) -> bool:
        """Whether it draws from a text; a class-conditional model draws from a class."""
        return "text_encoder" in self.parts


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

# SalUn's authors guide the saliency with w = 7.5 for texts, and both saliency and images with w = 2 for classes. They
# have no DiT: its guidance to draw with is that of diffusers' pipeline.
DDPM = Family(
    "ddpm", "class-conditional DDPM", "DDPMPipeline", ("unet",), steps=100, guidance=3.0, saliency_guidance=2.0
)  # fmt: skip
DIT = Family("dit", "DiT", "DiTPipeline", ("transformer", "vae"), guidance=4.0, saliency_guidance=2.0)
BY_CLASS = {"DDPMPipeline": DDPM, "DDIMPipeline": DDPM, "DiTPipeline": DIT}

# The shape of model_index.json.
INDEX = {"_class_name": str, "force_zeros_for_empty_prompt?": bool, "id2label?": ({str: str}, None)}
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
        if _is_classifier(folder / "config.json"):
            what = f"it is an image classifier: type salun-sd classifier {name} to make it forget images"
        raise UsageError(f"{name} is not a pipeline folder: {what}.")
    pipeline = read_json(file, INDEX, UsageError)["_class_name"]
    if pipeline in BY_CLASS:
        return _by_class(folder, BY_CLASS[pipeline], name)
    if pipeline not in (SD1.pipeline, SDXL.pipeline):
        raise UsageError(f"{name} is a {pipeline}; {SUPPORTED}.")
    unet = configs.read(folder, "unet", name)
    if unet["_class_name"] != configs.UNET.kind:
        raise UsageError(f"{name} is a {pipeline} with a {unet['_class_name']}: its config is of another model.")
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


def _by_class(folder: Path, family: Family, name: str) -> Family:
    """The family itself. Raises UsageError where a model draws no classes, or its parts do not fit one another."""
    settings = configs.read(folder, family.parts[0], name)
    inputs, outputs = settings["in_channels"], settings.get("out_channels") or settings["in_channels"]
    if family is DDPM:
        if settings["_class_name"] != configs.UNET_BY_CLASS.kind:
            raise UsageError(f"{name} has a {settings['_class_name']}, and a {family.pipeline} needs a "
                             f"{configs.UNET_BY_CLASS.kind}.")  # fmt: skip
        if settings.get("class_embed_type") is not None or not settings.get("num_class_embeds"):
            raise UsageError(f"{name} draws no classes (its UNet has no num_class_embeds), so there is none to erase; "
                             f"{SUPPORTED}.")  # fmt: skip
        if inputs not in (1, 3):
            raise UsageError(f"The unet of {name} has {inputs} channels, and an image has 1 or 3: its config is of "
                             "another model.")  # fmt: skip
        wanted = {inputs}
    else:
        latents, wanted = configs.read(folder, "vae", name).get("latent_channels", 4), {inputs, 2 * inputs}
        if inputs != latents:
            raise UsageError(f"The transformer of {name} has {inputs} input channels, and its vae {latents}: a config "
                             "is of another model.")  # fmt: skip
    if outputs not in wanted:
        raise UsageError(f"The {family.parts[0]} of {name} gives {outputs} channels for {inputs}: its config is "
                         "damaged.")  # fmt: skip
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


def _is_classifier(file: Path) -> bool:
    """Whether a config is of an image classifier of transformers."""
    try:
        names = read_json(file, {"architectures": [str]})["architectures"]
    except (OSError, SalunError):
        return False
    return any(name.endswith("ForImageClassification") for name in names)


def _odd_input(name: str, channels: int | None) -> str:
    kind = {9: "an inpainting UNet", 8: "an image-editing UNet", 5: "a depth UNet"}.get(channels, "another UNet")
    return f"{name} has {kind}, {channels} input channels instead of 4; {SUPPORTED}."
