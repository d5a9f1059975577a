"""Load a checkpoint into memory: the whole pipeline, the UNet or the scheduler."""

import errno

import torch

from salun_sd.checkpoint import families, layout
from salun_sd.checkpoint.model import Checkpoint
from salun_sd.errors import SalunError, first_line
from salun_sd.runtime.device import default_device


def load_unet(model: Checkpoint, dtype: torch.dtype = torch.float32):
    """The UNet on `default_device()`, frozen; each weight is rounded to `dtype` as it is read.

    Raises SalunError if a weight is missing.
    """
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        unet = diffusers.UNet2DConditionModel.from_config(model.settings("unet"))
    _check_complete(model, "unet", unet)
    names = {layout.canonical("unet", name): name for name, _ in unet.named_parameters()}
    unet.load_state_dict({names[name]: t.read().to(dtype) for name, t in model.unet.items()}, assign=True)
    return unet.requires_grad_(False).eval().to(default_device())


def load_scheduler(model: Checkpoint):
    """The checkpoint's own scheduler, an object of diffusers."""
    import diffusers

    return getattr(diffusers, model.scheduler).from_pretrained(model.config / "scheduler")


def _check_complete(model: Checkpoint, name: str, part: torch.nn.Module) -> None:
    """Raise SalunError unless a file has all weights of a part, in their shapes, and for the UNet no others."""
    wanted = {layout.canonical(name, n): p for n, p in part.named_parameters()}
    on_disk = model.parts[name]
    odd = [n for n, p in wanted.items() if n not in on_disk or on_disk[n].shape != p.shape]
    odd += [n for n in on_disk if name == "unet" and n not in wanted]
    if odd:
        raise SalunError(f"The {name} of {model.name} does not match its config: {min(odd)} is missing or odd.")


def load_pipeline(model: Checkpoint, *, unet: torch.nn.Module | bool = True):
    """The pipeline in float32 on `default_device()`, frozen and without a safety checker.

    `unet` is another UNet to use, or False for a pipeline without one. Raises SalunError if a part is missing or
    damaged, or if a file lacks a weight: diffusers would draw it at random and only warn.
    """
    import diffusers
    import transformers

    diffusers.logging.disable_progress_bar()  # a bar for each file would hide ours
    transformers.logging.disable_progress_bar()
    left_out = ["unet"] if unet is False else []
    settings: dict = {"local_files_only": True}
    if model.family is families.SDXL:
        settings["add_watermarker"] = False  # it would mark images wherever its package is installed
    else:
        left_out += ["safety_checker"]
    if not any((model.config / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise SalunError(f"{model.name} has no vocabulary in {model.config / 'tokenizer'}: download or save it again.")
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
        part.requires_grad_(False).eval().to(default_device(), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
