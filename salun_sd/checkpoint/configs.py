"""The configs of a pipeline folder: read, checked, and the modules that they describe."""

import json
from collections.abc import Iterator
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from salun_sd.errors import UsageError, first_line
from salun_sd.runtime.documents import Shape, read_json

SIDE = (int, [int], None)  # of the images or latents that a part was made for; [height, width] where they differ
MOST_TIMESTEPS = 100_000
MOST, MOST_LAYERS, MOST_VALUES = 1_000_000, 1000, 100  # what no config of a real model has more of


class Part(NamedTuple):
    """What the config of a part has to say: every value that no shape of a weight tells."""

    shape: Shape
    key: str  # that names the kind of model
    kind: str


UNET = Part(
    {"in_channels": int, "out_channels?": int, "block_out_channels": [int], "attention_head_dim": (int, [int], None),
     "cross_attention_dim": int, "sample_size?": SIDE},
    "_class_name", "UNet2DConditionModel",
)  # fmt: skip
UNET_BY_CLASS = Part(
    {"in_channels": int, "out_channels": int, "block_out_channels": [int], "sample_size": SIDE,
     "attention_head_dim?": (int, None), "num_class_embeds?": (int, None), "class_embed_type?": (str, None)},
    "_class_name", "UNet2DModel",
)  # fmt: skip
DIT = Part(
    {"in_channels": int, "out_channels?": (int, None), "num_attention_heads": int, "attention_head_dim": int,
     "num_layers": int, "patch_size": int, "sample_size": int, "num_embeds_ada_norm": int},
    "_class_name", "DiTTransformer2DModel",
)  # fmt: skip
VAE = Part(
    {"block_out_channels": [int], "latent_channels?": int, "sample_size?": SIDE, "scaling_factor?": float,
     "latents_mean?": ([float], None), "latents_std?": ([float], None)},
    "_class_name", "AutoencoderKL",
)  # fmt: skip
TEXT_ENCODER = Part(
    {"vocab_size": int, "hidden_size": int, "intermediate_size": int, "projection_dim?": (int, None),
     "num_hidden_layers": int, "num_attention_heads": int, "max_position_embeddings": int, "hidden_act": str,
     "layer_norm_eps?": float, "bos_token_id?": (int, None), "eos_token_id?": (int, None),
     "pad_token_id?": (int, None)},
    "model_type", "clip_text_model",
)  # fmt: skip
OLD = {"Transformer2DModel": DIT.kind}  # as DiT was published: diffusers had no class of its own for it
# The kinds of each part that salun-sd knows; a config that names none is of the first.
PARTS = {"unet": (UNET, UNET_BY_CLASS), "transformer": (DIT,), "vae": (VAE,), "text_encoder": (TEXT_ENCODER,),
         "text_encoder_2": (TEXT_ENCODER,)}  # fmt: skip
_CHECKED: dict[tuple[str, str], nn.Module] = {}  # of `checked`: a part and its config
# The variances of the noise, and what the UNet predicts. Each class of diffusers has its own other settings.
SCHEDULER = {
    "_class_name": str, "prediction_type?": (str, None), "num_train_timesteps?": int, "beta_start?": float,
    "beta_end?": float, "beta_schedule?": str, "trained_betas?": ([float], None), "rescale_betas_zero_snr?": bool,
}  # fmt: skip


def read(folder: Path, part: str, name: str) -> dict:
    """The config of one part of a pipeline, which errors call `name`. Raises UsageError if it is missing or damaged, or
    of another kind of model."""
    file, known = folder / part / "config.json", {known.kind: known for known in PARTS[part]}
    key, usual = PARTS[part][0].key, PARTS[part][0].kind
    kind = _settings(file, {f"{key}?": str}, name).get(key, usual)
    if (kind := OLD.get(kind, kind)) not in known:
        raise UsageError(f"{file} is of a {kind}, and salun-sd knows only {' and '.join(known)} as the {part} of a "
                         "pipeline.")  # fmt: skip
    shape = known[kind].shape
    settings = _settings(file, shape, name) | {key: kind}
    for k, value in settings.items():
        if fault := _fault(k, value, is_known=k in shape or f"{k}?" in shape):
            raise UsageError(f"{file} is damaged: {k} {fault}.")
    return settings


def multiple(settings: dict) -> int:
    """What both sides of the latents have to be a multiple of, so that the denoiser with this config can halve them, or
    cut them into patches."""
    return settings.get("patch_size") or 2 ** (len(settings["block_out_channels"]) - 1)


def _settings(file: Path, shape: Shape, name: str) -> dict:
    """What a config file of the pipeline `name` holds. Raises UsageError if it is missing or has another shape."""
    try:
        return read_json(file, shape, UsageError)
    except FileNotFoundError as e:
        raise UsageError(f"{name} has no {file.parent.name}/{file.name}: it is not a whole pipeline folder.") from e


def _fault(key: str, value: object, is_known: bool) -> str | None:
    """What is wrong with a value from which no module could be built, or not without end or room."""
    numbers, most = list(_numbers(value)), MOST_LAYERS if "layers" in key else MOST
    if max(len(numbers), len(value) if isinstance(value, list) else 0) > MOST_VALUES:
        return f"has more than {MOST_VALUES} values"
    if not all(abs(n) <= most for n in numbers):
        return f"is larger than {most}, or no number"
    if is_known and not key.endswith(("_id", "_mean", "_std")) and (value == [] or any(n <= 0 for n in numbers)):
        return "is not positive"
    return None


def _numbers(value: object) -> Iterator[float]:
    """The numbers in a value."""
    if isinstance(value, int | float):
        yield value
    for inner in value if isinstance(value, list) else ():
        yield from _numbers(inner)


def skeleton(folder: Path, part: str, name: str) -> nn.Module:
    """The module that a part's config describes: its weights have names and shapes, and no values.

    Only these classes of diffusers and transformers are built, whatever class a file names. Raises UsageError as `read`
    does, and if there is no such module.
    """
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    settings = read(folder, part, name)
    try:
        with init_empty_weights():
            if part.startswith("text_encoder"):
                known = [key.rstrip("?") for key in TEXT_ENCODER.shape]
                config = transformers.CLIPTextConfig(**{key: settings[key] for key in known if key in settings})
                with_projection = part == "text_encoder_2"
                kind = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
                return kind(config)
            kind = getattr(diffusers, settings["_class_name"])
            parameters = signature(kind).parameters
            known = {key: value for key, value in settings.items() if key in parameters}
            if odd := [key for key, value in known.items() if not _is_like(value, parameters[key].default)]:
                raise TypeError(f"{odd[0]} is {known[odd[0]]!r}")
            return kind.from_config(known)
    except Exception as e:  # every layer has its own types
        file = folder / part / "config.json"
        raise UsageError(f"{file} is damaged: it describes no {settings[PARTS[part][0].key]} ({first_line(e)}).") from e


def checked(folder: Path, part: str, name: str) -> nn.Module:
    """The skeleton of a part, to be read only: configs that say the same have the same one. Raises UsageError as
    `skeleton` does, and unless tensors pass through it."""
    said = part, json.dumps(read(folder, part, name))
    if said not in _CHECKED:
        module = skeleton(folder, part, name)
        _check_pass(folder, part, module)
        _CHECKED[said] = module
    return _CHECKED[said]


@torch.no_grad()
def _check_pass(folder: Path, part: str, module: nn.Module) -> None:
    """Raise UsageError unless tensors pass through a part's skeleton. On the meta device: nothing is computed."""
    config, file = module.config, folder / part / "config.json"
    try:
        with torch.device("meta"):
            if part.startswith("text_encoder"):
                module(torch.zeros(1, 2, dtype=torch.int64))
            elif part == "vae":
                side = 8 << len(config.block_out_channels)
                module(torch.empty(1, 3, side, side))
            elif type(module).__name__ != UNET.kind:
                side = 4 * multiple(config)
                x, number = torch.empty(1, config.in_channels, side, side), torch.zeros(1, dtype=torch.int64)
                deepcopy(module).to("meta")(x, number, class_labels=number)  # some have buffers
            else:
                side, times = 1 << len(config.block_out_channels), config.addition_time_embed_dim or 0
                pooled = (config.projection_class_embeddings_input_dim or 0) - 6 * times
                sizes = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)} if times else {}
                context = torch.empty(1, 2, config.cross_attention_dim)
                module(torch.empty(1, 4, side, side), torch.zeros(1), context, added_cond_kwargs=sizes)
    except Exception as e:  # every layer has its own types
        raise UsageError(f"{file} is damaged: no tensor passes its {type(module).__name__} ({first_line(e)}).") from e


def _is_like(value: object, default: object) -> bool:
    """Whether a value is of the kind of a parameter's default, or a list of them: layers take a value of another kind,
    and fail with it later."""
    if value is None or default is None:
        return not isinstance(default, float)
    likes = {bool: bool | list, int: int | list, float: int | float, str: str}
    return isinstance(value, likes.get(type(default), object))


def scheduler(folder: Path, name: str) -> dict:
    """The config of a pipeline's scheduler. Raises UsageError if it is missing or damaged, or without the betas that
    say what noise the model was trained with."""
    file = folder / "scheduler" / "scheduler_config.json"
    settings = _settings(file, SCHEDULER, name)
    betas = ("trained_betas",) if settings.get("trained_betas") else ("beta_start", "beta_end", "beta_schedule")
    if missing := [key for key in betas if key not in settings]:
        raise UsageError(f"{name} was trained for {settings['_class_name']}, and {file} has no {missing[0]}; salun-sd "
                         "edits models that were trained with the noise of DDPM.")  # fmt: skip
    if not 1 <= settings.get("num_train_timesteps", 1000) <= MOST_TIMESTEPS:
        raise UsageError(f"{file} is damaged: num_train_timesteps is not between 1 and {MOST_TIMESTEPS}.")
    return settings
