"""Checkpoints: find, load, fingerprint and save. The only file that knows how they lie on disk."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from salun_sd.errors import SalunError, UsageError
from salun_sd.mask import Bits

POCKET = Path(__file__).parent / "pocket"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
SAMPLING = "sampling.json"


def resolve(model: str) -> Path:
    """The folder of a StableDiffusionPipeline: for `pocket`, a diffusers folder, or a hub id (downloaded and cached).

    Raises UsageError, in a sentence that names what was found, for anything else.
    """
    folder = POCKET if model == "pocket" else Path(model)
    if folder.is_file():
        raise UsageError(
            f"{model} is a single file; single-file checkpoints are not read yet. Convert it to a folder with "
            "diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(...)."
        )
    if not folder.exists():
        folder = _from_hub(model)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(f"{model} is not a Stable Diffusion pipeline folder: it has no model_index.json.")
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{index} is damaged: it does not name a pipeline class.") from e
    if found != "StableDiffusionPipeline":
        raise UsageError(f"{model} is a {found}; salun-sd reads a StableDiffusionPipeline (Stable Diffusion 1.x, 2.x).")
    return folder


def _from_hub(model: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise UsageError(
            f"Model {model} was not found: give `pocket`, a diffusers folder or a hub id such as org/name."
        )
    from diffusers import StableDiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(StableDiffusionPipeline.download(model, use_safetensors=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        reason = _first_line(e)
        raise UsageError(
            f"Model {model} is no folder here, and the hub did not give it ({reason}). "
            "Check the name, the network and, for a gated model: hf auth login"
        ) from e


def _first_line(e: Exception) -> str:
    return str(e).strip().partition("\n")[0].rstrip(".") or type(e).__name__


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: Path):
    """The pipeline in float32 on `device()`, the safety checker off.

    Raises SalunError if a part is missing or damaged, or if the UNet's file lacks a weight (diffusers would draw it
    at random and only warn).
    """
    import diffusers
    import transformers
    from diffusers import StableDiffusionPipeline

    diffusers.logging.disable_progress_bar()  # a bar for each file read is noise beside ours
    transformers.logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        raise SalunError(f"{folder} could not be loaded as a Stable Diffusion pipeline: {_first_line(e)}.") from e
    of_file, of_unet = unet_shapes(folder), {name: p.shape for name, p in pipeline.unet.named_parameters()}
    if odd := sorted(name for name in of_file.keys() | of_unet.keys() if of_file.get(name) != of_unet.get(name)):
        raise SalunError(f"The UNet of {folder} is not what its config says: {odd[0]} is missing, extra or reshaped.")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().to(device(), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling(folder: Path) -> tuple[int, float]:
    """The usual number of denoising steps and classifier-free guidance scale for drawing from a checkpoint: 50 and
    7.5 for Stable Diffusion; a folder may say otherwise in a file sampling.json, as `pocket` does."""
    file = folder / SAMPLING
    usual = json.loads(file.read_text()) if file.is_file() else {"steps": 50, "guidance": 7.5}
    return usual["steps"], usual["guidance"]


def unet_files(folder: Path) -> list[Path]:
    """The safetensors files of a pipeline folder's UNet, one or sharded, in a fixed order."""
    index = folder / "unet" / INDEX
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [SINGLE]
    files = [folder / "unet" / name for name in names]
    for file in files:
        if not file.is_file():
            raise SalunError(f"{file} is missing: the UNet has to be in safetensors, as diffusers saves it.")
    return files


@contextmanager
def _opened(file: Path) -> Iterator:
    """A safetensors file; that it is damaged, at whatever point this shows, is a SalunError."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except SafetensorError as e:
        raise SalunError(f"{file} is truncated or damaged ({e}): fetch or save it again.") from e


def tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one at a time, as they are on disk."""
    with _opened(file) as f:
        for name in f.keys():
            yield name, f.get_tensor(name)


def unet_shapes(folder: Path) -> dict[str, torch.Size]:
    """Name and shape of every weight in the UNet's files, without reading the weights."""
    shapes = {}
    for file in unet_files(folder):
        with _opened(file) as f:
            shapes |= {name: torch.Size(f.get_slice(name).get_shape()) for name in f.keys()}
    return shapes


def fingerprint(folder: Path) -> str:
    """SHA-256 over the UNet's tensors as saved: name, dtype, shape and bytes of each, in the order of names."""
    digests = {
        name: hashlib.sha256(f"{t.dtype} {list(t.shape)} ".encode() + t.view(-1).view(torch.uint8).numpy().data)
        for file in unet_files(folder)
        for name, t in tensors(file)
    }
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(name.encode() + b" " + digests[name].digest())
    return whole.hexdigest()


def identity(folder: Path) -> str:
    """SHA-256 over everything that an image depends on: the UNet's fingerprint and the files of the other parts."""
    whole = hashlib.sha256(fingerprint(folder).encode())
    for file in sorted(p for part in _parts(folder) for p in (folder / part).rglob("*") if p.is_file()):
        with file.open("rb") as f:
            whole.update(f"{file.relative_to(folder)} {hashlib.sha256(f.read()).hexdigest()}".encode())
    return whole.hexdigest()


def _parts(folder: Path) -> list[str]:
    """The pipeline's components beside the UNet that have a folder."""
    return [k for k in json.loads((folder / "model_index.json").read_text()) if k != "unet" and (folder / k).is_dir()]


def save_erased(base: Path, unet, bits: Bits, out: Path) -> None:
    """Write the pipeline folder `out`: the base's files, and the UNet merged from the base and the trained weights.

    Every tensor starts as the base's own, in its own dtype; only the entries where the mask is 1 take the trained
    value. So outside the mask the bytes are the base's. No other copy of the base UNet comes along.
    """
    for file in ("model_index.json", SAMPLING):
        if (base / file).is_file():
            shutil.copy(base / file, out)
    for part in _parts(base):
        shutil.copytree(base / part, out / part)
    (out / "unet").mkdir()
    trained = dict(unet.named_parameters())
    for file in unet_files(base):
        merged = {}
        for name, t in tensors(file):
            if name in bits:
                t = t.clone()
                t[bits[name]] = trained[name].detach().cpu()[bits[name]].to(t.dtype)
                if not t.isfinite().all():
                    raise SalunError(f"{name} does not fit into {t.dtype} any more: lower --lr.")
            merged[name] = t
        try:
            save_file(merged, out / "unet" / file.name, {"format": "pt"})
        except SafetensorError as e:  # a full disk, in safetensors' words
            raise SalunError(f"The erased UNet could not be written to {out.parent}: {e}.") from e
        (out / "unet" / file.name).chmod(0o666 & ~_umask())  # safetensors makes its files private
    for extra in ("config.json", INDEX):
        if (base / "unet" / extra).is_file():
            shutil.copy(base / "unet" / extra, out / "unet")


def count_changes(base: Path, erased: Path, bits: Bits) -> dict[str, int]:
    """Read both UNets back from disk and count the weights whose bytes differ: {"inside": n, "outside": n}.

    A tensor that the mask does not know counts as outside. Raises SalunError if a tensor is missing or reshaped.
    """
    new = {name: t for file in unet_files(erased) for name, t in tensors(file)}
    inside = outside = 0
    for file in unet_files(base):
        for name, old in tensors(file):
            other = new.pop(name, None)
            if other is None or other.shape != old.shape or other.dtype != old.dtype:
                raise SalunError(f"The saved UNet lost {name}, or its shape or dtype changed.")
            width = old.element_size()
            differs = (old.reshape(-1, 1).view(torch.uint8) != other.reshape(-1, 1).view(torch.uint8)).view(-1, width)
            differs = differs.any(1)
            salient = bits[name].view(-1) if name in bits else torch.zeros(old.numel(), dtype=torch.bool)
            inside += int((differs & salient).sum())
            outside += int((differs & ~salient).sum())
    if new:
        raise SalunError(f"The saved UNet has a tensor that the base has not: {next(iter(new))}.")
    return {"inside": inside, "outside": outside}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write beside the place and rename into it: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`; it becomes `out` at the end, or is removed if anything goes wrong.

    `out` may be there if it is empty. What runs that were killed have left beside it is removed.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        if not _is_running(stale.name.split(".")[-2]):
            shutil.rmtree(stale, ignore_errors=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
