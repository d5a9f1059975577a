"""Load a checkpoint into memory: the whole pipeline, a part of it, the tokenizers or the scheduler."""

import json
from dataclasses import dataclass
from typing import Any

import torch

from salun_sd.checkpoint import configs, families, layout
from salun_sd.checkpoint.classes import Classes
from salun_sd.checkpoint.model import EMPTY_IS_ZERO, Checkpoint
from salun_sd.errors import SalunError, UsageError, first_line
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.contents import check_files
from salun_sd.runtime.device import default_device
from salun_sd.runtime.documents import read_json
from salun_sd.runtime.finite import finite

TOKENIZER = {"tokenizer_class?": (str, None), "model_max_length?": (float, None)}
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


def check(model: Checkpoint) -> None:
    """Raise SalunError unless each part's files hold the weights that its config describes, in their shapes, and the
    tokenizers fit the text encoders: all that can be known before a weight is read."""
    for part in model.family.parts:
        _names(model, part, configs.checked(model.config, part, model.name))
    load_tokenizers(model)


def load_part(model: Checkpoint, part: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A part on `default_device()`, frozen; each weight is rounded to `dtype` as it is read.

    Raises SalunError if a weight is missing, odd or not finite. No code and no class of a checkpoint's own is used.
    """
    module = model.skeleton(part)
    names = _names(model, part, module)
    weights = {
        names[name]: _sound(t.read(), model, part, name).to(dtype)
        for name, t in Bar(model.parts[part].items(), desc=f"load {part}", unit="tensor", leave=None) if name in names
    }  # fmt: skip
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval().to(default_device())


def _names(model: Checkpoint, part: str, module: torch.nn.Module) -> dict[str, str]:
    """Canonical name -> the module's own name of each weight of a part. Raises SalunError unless the part's files have
    all of them, in their shapes, and for the denoiser no others."""
    wanted = {layout.canonical(part, name): (name, p.shape) for name, p in module.named_parameters()}
    on_disk = model.parts[part]
    odd = [n for n, (_, shape) in wanted.items() if n not in on_disk or on_disk[n].shape != shape]
    odd += [n for n in on_disk if part == model.denoiser and n not in wanted]
    if odd:
        file = model.config / part / "config.json"
        raise SalunError(f"The {part} of {model.name} does not match {file}: {min(odd)} is missing or odd.")
    return {canonical: name for canonical, (name, _) in wanted.items()}


def scheduler_class(name: str) -> type:
    """A scheduler's class by its name in diffusers. Raises UsageError if diffusers has no such scheduler; ImportError
    where it needs a package that is not installed."""
    from diffusers import SchedulerMixin, schedulers
    from diffusers.utils import DummyObject

    kind = getattr(schedulers, name, None) if name.isidentifier() else None
    if isinstance(kind, DummyObject):  # it stands for a class, and any use of it raises
        kind()
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise UsageError(f"diffusers has no scheduler {name}")
    return kind


def load_scheduler(model: Checkpoint):
    """The checkpoint's own scheduler, an object of diffusers. Where this cannot be made here, DDIM with its noise: it
    does not draw the same, and gives its config to a scheduler that is named."""
    from diffusers import DDIMScheduler

    try:
        return scheduler_class(model.scheduler).from_config(model.noise)
    except Exception:  # a scheduler's settings can be wrong in many ways
        return DDIMScheduler.from_config(model.noise, clip_sample=False)


def alphas_cumprod(model: Checkpoint) -> torch.Tensor:
    """[T] float32: the share of signal variance left at each training timestep (DDPM, arXiv 2006.11239, eq. 4). Raises
    UsageError if the scheduler's config describes no such noise."""
    from diffusers import DDPMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    try:
        scheduler = DDPMScheduler.from_config({key: model.noise[key] for key in keys if key in model.noise})
        if len(scheduler.betas) != model.timesteps or not ((scheduler.betas >= 0) & (scheduler.betas <= 1)).all():
            raise ValueError("its betas are not between 0 and 1, one for each timestep")
    except Exception as e:  # of diffusers, for values that it does not know
        file = model.config / "scheduler" / "scheduler_config.json"
        raise UsageError(f"{file} is damaged: it describes no noise ({first_line(e)}).") from e
    return scheduler.alphas_cumprod.float()


def load_tokenizers(model: Checkpoint) -> dict:
    """The tokenizers by their names in the pipeline, one for each text encoder. None reads more tokens than its encoder
    has places for. Raises SalunError where one is missing or damaged, or of another encoder."""
    encoders = [part for part in model.family.parts if part.startswith("text_encoder")]
    return {part.replace("text_encoder", "tokenizer"): _load_tokenizer(model, part) for part in encoders}


def _load_tokenizer(model: Checkpoint, encoder: str):
    from transformers import CLIPTokenizer

    name = encoder.replace("text_encoder", "tokenizer")
    folder, settings = model.config / name, model.settings(encoder)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise SalunError(f"{model.name} has no vocabulary in {folder}: download or save it again.")
    check_files(folder)
    try:
        config = read_json(folder / "tokenizer_config.json", TOKENIZER)
        if (kind := config.get("tokenizer_class") or TOKENIZERS[0]) not in TOKENIZERS:
            raise SalunError(f"it is a {kind}, and salun-sd knows {TOKENIZERS[0]}")
        if (length := config.get("model_max_length")) is not None and length < 1:
            raise SalunError("its model_max_length is not positive")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            raise SalunError("it has no token for the beginning, the end or the padding")
        _check_vocabulary(tokenizer, settings["vocab_size"])
    except Exception as e:  # each of its files can be damaged, in many types
        raise SalunError(f"The {name} of {model.name} is damaged ({first_line(e)}): download or save it again.") from e
    tokenizer.model_max_length = min(tokenizer.model_max_length, settings["max_position_embeddings"])
    return tokenizer


def _check_vocabulary(tokenizer, size: int) -> None:
    """Raise SalunError unless an encoder of `size` tokens has a row for each token, and every token of several letters
    comes from a merge: those that merges.txt lost would be read letter by letter."""
    vocabulary = tokenizer.get_vocab()
    if (largest := max(vocabulary.values())) >= size:
        raise SalunError(f"it has a token {largest}, and the text encoder knows {size}")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    made = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in backend["model"]["merges"]}
    given = made | {token["content"] for token in backend["added_tokens"]}
    if lost := [token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and token not in given]:
        raise SalunError(f"no merge makes its token {lost[0]}")


@dataclass
class ClassPipeline:
    """What draws a class, with the names that diffusers' Stable Diffusion pipelines have for the same things."""

    name_or_path: str  # by which errors call it
    classes: Classes
    channels: int  # of an image, or of a latent
    vae_scale_factor: int
    scheduler: Any
    unet: torch.nn.Module | None  # the denoiser
    image_processor: Any
    vae: torch.nn.Module | None = None  # None: it draws pixels


def held_in(model: Checkpoint, part: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a part in a pipeline that draws in `dtype`: float32 for text encoders, which run once a prompt, and
    for a VAE whose config says that it overflows in half (`force_upcast`)."""
    is_wide = part.startswith("text_encoder") or (part == "vae" and model.vae_settings.get("force_upcast"))
    return torch.float32 if is_wide else dtype


def load_pipeline(model: Checkpoint, *, unet: torch.nn.Module | bool = True, dtype: torch.dtype = torch.float32):
    """The pipeline on `default_device()`, frozen and without a safety checker: one of diffusers, or a ClassPipeline.
    Each part is in the dtype that it is `held_in`.

    `unet` is another denoiser to use, or False for a pipeline without one. Raises SalunError if a part is missing or
    damaged, if a weight is not finite, or if a file lacks one.
    """
    import diffusers

    others = [part for part in model.family.parts if part != model.denoiser]
    parts = {part: load_part(model, part, held_in(model, part, dtype)) for part in others}
    parts["unet"] = load_part(model, model.denoiser, dtype) if unet is True else unet or None
    parts |= load_tokenizers(model) | {"scheduler": load_scheduler(model)}
    if model.classes:
        return ClassPipeline(
            model.name, model.classes, model.unet_settings["in_channels"], model.pixels_per_latent,
            image_processor=diffusers.image_processor.VaeImageProcessor(), **parts,
        )  # fmt: skip
    if model.family is families.SDXL:  # a watermarker would mark images wherever its package is installed
        empty_is_zero = model.index.get(EMPTY_IS_ZERO, True)
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=empty_is_zero, add_watermarker=False
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_name_or_path=model.name)  # by which errors call it
    return pipeline


def _sound(weight: torch.Tensor, model: Checkpoint, part: str, name: str) -> torch.Tensor:
    """The weight itself. Raises NotFinite, which names it, if it is not finite."""
    words = {"unet": "UNet", "vae": "VAE"}.get(part, part.replace("_", " "))
    return finite(weight, f"{name} in the {words} of {model.name}")
