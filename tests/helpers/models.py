"""Real pipelines with random weights, on disk: tiny, or of the true architectures of SD 1.5, SD 2.1 and SDXL base."""

import json
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from salun_sd.checkpoint import layout
from salun_sd.checkpoint.model import POCKET

CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def blocks(attention: str) -> dict:
    """attention: one letter a level from the fine end, "x" with cross-attention, "." without."""
    down = {"x": "CrossAttnDownBlock2D", ".": "DownBlock2D"}
    up = {"x": "CrossAttnUpBlock2D", ".": "UpBlock2D"}
    return {
        "down_block_types": [down[a] for a in attention],
        "up_block_types": [up[a] for a in reversed(attention)],
    }


def _unet(attention: str, **settings) -> dict:
    return {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, **blocks(attention), **settings}


def _vae(**settings) -> dict:
    levels = len(settings["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"latent_channels": 4, **types, **settings}


def _text(width: int, layers: int, heads: int, length: int = 77, vocabulary: int = 49408, **settings) -> dict:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # of the pocket's tokenizer
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": length, "vocab_size": vocabulary, **ids, **settings,
    }  # fmt: skip


_SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_CLIP_L = _text(768, 12, 12, hidden_act="quick_gelu", projection_dim=768)
FULL = {
    "sd1": {  # stable-diffusion-v1-5
        "unet": _unet("xxx.", block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
                      sample_size=64),
        "vae": _vae(**_SD_VAE, sample_size=512, scaling_factor=0.18215, force_upcast=False),
        "text_encoder": _CLIP_L,
    },
    "sd2": {  # stable-diffusion-2-1
        "unet": _unet("xxx.", block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
                      attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, upcast_attention=True,
                      sample_size=96),
        "vae": _vae(**_SD_VAE, sample_size=768, scaling_factor=0.18215),
        "text_encoder": _text(1024, 23, 16, hidden_act="gelu", projection_dim=512),
    },
    "sdxl": {  # stable-diffusion-xl-base-1.0
        "unet": _unet(".xx", block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
                      attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
                      use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                      projection_class_embeddings_input_dim=2816, sample_size=128),
        "vae": _vae(**_SD_VAE, sample_size=1024, scaling_factor=0.13025),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _text(1280, 32, 20, hidden_act="gelu", projection_dim=1280),
    },
}  # fmt: skip

_TINY_UNET = {"layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4, "sample_size": 8}
_TINY_VAE = _vae(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=32)
TINY = {  # latents of 8 x 8, images of 32 x 32
    "sd1": {
        "unet": _unet("x.", block_out_channels=(16, 32), cross_attention_dim=32, **_TINY_UNET),
        "vae": _TINY_VAE,
        "text_encoder": _text(32, 2, 4, 24, 644, hidden_act="quick_gelu", projection_dim=32),
    },
    "sd2": {
        "unet": _unet(".x.", block_out_channels=(16, 32, 32), cross_attention_dim=32, use_linear_projection=True,
                      **_TINY_UNET),
        "vae": _TINY_VAE,
        "text_encoder": _text(32, 2, 4, 24, 644, hidden_act="gelu", projection_dim=16),
    },
    "sdxl": {
        "unet": _unet(".x", block_out_channels=(16, 32), cross_attention_dim=32 + 48, use_linear_projection=True,
                      transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
                      projection_class_embeddings_input_dim=6 * 8 + 40, **_TINY_UNET),
        "vae": _TINY_VAE,
        "text_encoder": _text(32, 2, 4, 24, 644, hidden_act="quick_gelu", projection_dim=32),
        "text_encoder_2": _text(48, 2, 4, 24, 644, hidden_act="gelu", projection_dim=40),
    },
}  # fmt: skip

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS = {
    "sd1": ("PNDMScheduler", {**_NOISE, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "sd2": ("DDIMScheduler", {**_NOISE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "sdxl": ("EulerDiscreteScheduler", {**_NOISE, "timestep_spacing": "leading", "steps_offset": 1}),
}


def skeleton(part: str, settings: dict) -> torch.nn.Module:
    """A part on the meta device: names, shapes and config, no values."""
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            return CLASSES[part](CLIPTextConfig(**settings))
        return CLASSES[part](**settings)


def shapes(family: str, *, full: bool = False) -> dict[str, dict[str, torch.Size]]:
    """Part -> name of each tensor in its file -> shape."""
    parts = (FULL if full else TINY)[family]
    return {part: {n: t.shape for n, t in skeleton(part, s).state_dict().items()} for part, s in parts.items()}


def write_pipeline(
    folder: Path,
    family: str,
    *,
    full: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    prediction: str = "epsilon",
    shards: bool = False,
    variant: str | None = None,
) -> Path:
    """A whole diffusers pipeline folder; a smaller dtype is the same weights rounded. No more memory than one part."""
    g = torch.Generator().manual_seed(seed)
    parts = (FULL if full else TINY)[family]
    for part, settings in parts.items():
        model, is_text = skeleton(part, settings), part.startswith("text_encoder")
        if is_text:
            model.config.dtype = dtype
            model.config.save_pretrained(folder / part)
        else:
            model.save_config(folder / part)
        tensors = {name: _drawn(name, t.shape, g).to(dtype) for name, t in model.state_dict().items()}
        stem = "model" if is_text else "diffusion_pytorch_model"
        _save(folder / part, stem, tensors, 2 if shards and part == "unet" else 1, variant)
        del tensors
    for tokenizer in [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]:
        shutil.copytree(POCKET / "tokenizer", folder / tokenizer)
    scheduler, settings = SCHEDULERS[family]
    getattr(diffusers, scheduler)(**settings, prediction_type=prediction).save_config(folder / "scheduler")
    _write_index(folder, family, scheduler)
    return folder


def _drawn(name: str, shape: torch.Size, g: torch.Generator) -> torch.Tensor:
    """Norms near 1, biases near 0, and weights with the variance of torch's own default, 1 / (3 fan-in)."""
    t = torch.empty(shape).normal_(generator=g)
    if t.ndim > 1:
        return t.mul_((3 * t[0].numel()) ** -0.5)
    return t.mul_(0.02).add_(float(name.endswith("weight")))


def _save(folder: Path, stem: str, tensors: dict[str, torch.Tensor], shards: int, variant: str | None) -> None:
    dotted = f".{variant}" if variant else ""
    if shards == 1:
        save_file(tensors, folder / f"{stem}{dotted}.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"{stem}{dotted}-{i + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index{dotted}.json").write_text(json.dumps(index, indent=2))


def _write_index(folder: Path, family: str, scheduler: str) -> None:
    nothing = [None, None]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if family == "sdxl":
        index["_class_name"] = "StableDiffusionXLPipeline"
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        index["force_zeros_for_empty_prompt"] = True
    else:
        index["safety_checker"] = nothing
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def family_of(folder: Path) -> str:
    if (folder / "text_encoder_2").is_dir():
        return "sdxl"
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    return "sd1" if config["hidden_act"] == "quick_gelu" else "sd2"


def load_parts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> canonical name -> tensor, of a pipeline folder."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for part in layout.FAMILIES[family_of(folder)]:
        loaded = [pair for file in sorted((folder / part).glob("*.safetensors")) for pair in load_file(file).items()]
        parts[part] = {c: t for name, t in loaded if (c := layout.canonical(part, name)) is not None}
    return parts


def single_file_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline folder in the original layout."""
    parts = load_parts(folder)
    pieces = layout.original_layout(family_of(folder), {part: list(tensors) for part, tensors in parts.items()})
    return {key: layout.make(p, [parts[p.part][name] for name in p.names]) for key, p in pieces.items()}


def write_single_file(folder: Path, file: Path) -> Path:
    """A checkpoint in the original layout for a pipeline folder; the ending says .safetensors or .ckpt."""
    tensors = single_file_tensors(folder)
    if file.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file, {"format": "pt"})
    return file


def damage(folder: Path, part: str, name: str, value: float) -> None:
    """Fill the tensors of a pipeline folder's part whose names end so with a value."""
    [file] = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith(name)]:
        tensors[key].fill_(value)
    save_file(tensors, file, {"format": "pt"})


def write_classifier(folder: Path, labels: list[str], seed: int = 0) -> Path:
    """A tiny random image classifier of images of 16 x 16, in half precision."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    model = ResNetForImageClassification(config)
    model.classifier[-1].weight.data.mul_(50)  # far from uniform, so that images differ in class
    model.half().save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A tiny random CLIP, with the pocket checkpoint's tokenizer, of 24 tokens, and images of 16 x 16."""
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    written = json.loads((POCKET / "text_encoder" / "config.json").read_text())
    words = {key: written[key] for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")}
    model = CLIPModel(CLIPConfig(
        text_config=small | words | {"pad_token_id": words["eos_token_id"]},
        vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=24,
    ))  # fmt: skip
    for half in (model.visual_projection, model.text_projection):
        half.weight.data.normal_()  # far from equal vectors
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(POCKET / "tokenizer").save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=sides).save_pretrained(folder)
    return folder
