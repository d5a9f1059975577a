"""The work of `push`: an erased checkpoint or a patch to the hub, with its card.

The folder `<out>.run` stays here, and so do all images. The mask says where the concept's weights are, and that alone
brings much of the concept back (Roots Beneath the Cut, arXiv 2603.06640).
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from salun_sd.checkpoint import families, places, provenance, sources, tensors
from salun_sd.checkpoint.find import opened
from salun_sd.checkpoint.model import part_files
from salun_sd.edit import patch as patches
from salun_sd.errors import SalunError, UsageError, cut, first_line, some
from salun_sd.runtime.bar import Bar
from salun_sd.runtime.contents import hash_into, no_file
from salun_sd.runtime.texts import check_given

logger = logging.getLogger(__name__)

CARD = "README.md"
TERMS = {"LICENSE", "LICENSE.md", "LICENSE.txt"}
WEIGHTS = (".safetensors", ".bin")
TOKENS = "https://huggingface.co/settings/tokens"


class Pushed(NamedTuple):
    """What `push` sent, or would send."""

    files: dict[str, int]  # the bytes of each, by its name in the repository
    url: str | None  # of the repository; None for a dry run


def push(
    model: str | Path, repo: str, *, public: bool = False, config: str | None = None, dry_run: bool = False
) -> Pushed:  # fmt: skip
    """Send what `erase` or `apply` wrote, with its card, to a repository of the hub, in one commit. Parameters are
    those of `salun-sd push`. The repository is made where there is none; one with files of another model is refused.

    With `dry_run`, nothing is sent and the hub is not asked. Raises UsageError for arguments that are wrong, SalunError
    for anything else that fails, each with a sentence for a person.
    """
    check_given(model=model, repo=repo, config=config)
    place, repo = Path(model), _checked_name(repo)
    record, contents = _contents(place)
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in contents.items()}
    _check_places(place, record)
    if not record.get("audits"):
        logger.warning("The card has no audit: salun-sd evaluate with --record adds its numbers.")
    if dry_run:
        return Pushed(sizes, None)
    api = HfApi(library_name="salun-sd")
    with _hub_failures(repo, api.endpoint):
        _check_token(api)
        _check_repository(api, repo, contents, public)
    if place.is_dir() or record["settings"]["format"] != "patch":  # a patch was read whole
        opened(place, config)
    with _hub_failures(repo, api.endpoint):
        url = api.create_repo(repo, private=not public, exist_ok=True)
        added = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo, added, commit_message=f"{provenance.title(record)}, by salun-sd")
    return Pushed(sizes, str(url))


def _checked_name(repo: str) -> str:
    """The name of a repository. Raises UsageError unless it is one of the hub's, with its owner."""
    try:
        validate_repo_id(repo)
        if "/" in repo:
            return repo
    except HFValidationError:
        pass
    raise UsageError(f"REPO is {repo!r}, which is no name of a repository: give org/name, or your own name for org.")


def _contents(place: Path) -> tuple[dict, dict[str, Path | bytes]]:
    """The record, and what is sent: a file, or bytes, by its name in the repository. Raises UsageError for what
    salun-sd did not erase, and for a file that has no place in a checkpoint."""
    if fault := None if place.is_dir() else no_file(place):
        raise UsageError(f"MODEL {place} {fault}: give what salun-sd erase or apply wrote.")
    record = provenance.read(place) if place.is_dir() else _record_of_file(place)
    if record is None:
        raise UsageError(f"{place} has no record: push is for what salun-sd erase or apply wrote.")
    beside = provenance.run_folder(place) / CARD
    contents = _of_folder(place, record) if place.is_dir() else {place.name: place}
    if not place.is_dir() and beside.is_file():
        contents[CARD] = beside
    return record, {CARD: provenance.model_card(record).encode()} | contents


def _record_of_file(file: Path) -> dict | None:
    """The record of a single file or, with a warning, of a patch; None without one. Raises UsageError for a mask."""
    with sources.meant_as("checkpoint", "give what salun-sd erase or apply wrote."):
        content, header = tensors.read(file)
    if provenance.KEY not in header or "modelspec.architecture" in header:
        return provenance.read(file)
    if not any(name.startswith("new/") for name in content):
        raise UsageError(f"{file} is a mask, and stays here: it says where the concept's weights are, which helps to "
                         "bring the concept back. Give the erased checkpoint.")  # fmt: skip
    logger.warning(f"{file} is a patch, and says where the concept's weights are, which helps to bring the concept "
                   "back. A folder or a single file says less.")  # fmt: skip
    return patches.read(file).record


def _check_places(place: Path, record: dict) -> None:
    """Raise UsageError where a record or a config names folders of this machine, as those of earlier versions may."""
    for config in places.in_configs(place) if place.is_dir() else ():
        raise UsageError(f"{config} names a folder of this machine, as an earlier version copied it, so nothing is "
                         "sent: erase or apply again, to another --out.")  # fmt: skip
    before, after = (
        {*json.dumps(each, ensure_ascii=False).split('"')} for each in (record, places.without_places(record))
    )
    if paths := sorted(before - after, key=len):
        again = "what salun-sd apply makes of it names none"
        if record["settings"]["format"] != "patch":
            again = f"salun-sd evaluate {place} --prompts ... --record writes it without them"
        raise UsageError(f"The record in {place} is of an earlier version, and names folders of this machine "
                         f"({cut(paths[0])}), so nothing is sent: {again}.")  # fmt: skip


def _of_folder(folder: Path, record: dict) -> dict[str, Path]:
    """The files of an erased pipeline folder: its card and record, the configs that this names, and the weights that a
    pipeline loads. Hidden files stay here. Raises UsageError for any other file: it may be a mask, or an image."""
    parts, configs = families.of_folder(folder, str(folder)).parts, record.get("files", {})
    weights = {file.relative_to(folder).as_posix() for part in parts for file in part_files(folder, part, None)}
    own = {CARD, provenance.FILE, *TERMS, *configs, *weights}
    others = {name.partition("/")[0] for name in configs} - {*parts}  # such as a safety checker
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: file for name, file in files.items() if not name.startswith(".") and "/." not in name}
    of_others = {name for name in files if name.partition("/")[0] in others and name.endswith(WEIGHTS)}
    if odd := sorted(files.keys() - own - of_others):
        raise UsageError(f"{folder} holds {some(odd)}, which is not of the checkpoint: move it elsewhere, as it would "
                         "be sent, too.")  # fmt: skip
    return files


def _check_token(api: HfApi) -> None:
    """Raise SalunError for a token that may only read."""
    token = api.whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise SalunError(f"Your token may only read: make one that may write at {TOKENS}, and run hf auth login.")


def _check_repository(api: HfApi, repo: str, contents: Mapping[str, Path | bytes], public: bool) -> None:
    """Raise UsageError where a repository exists and is of the other visibility, or holds what these contents do not.
    Weights have to be the same; the other files are replaced."""
    try:
        there = api.repo_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        return
    if there.private == public:
        kind, advice = ("private", "leave out --public") if public else ("public", "give --public")
        raise UsageError(f"{repo} exists, and is {kind}: {advice}, or give another name.")
    for file in Bar(there.siblings or (), desc="compare", unit="file", leave=None):
        name, content = file.rfilename, contents.get(file.rfilename)
        if name == ".gitattributes" or (content is not None and not name.endswith(WEIGHTS)):
            continue
        if content is None or not file.lfs or file.lfs.sha256 != _sha256(content):
            raise UsageError(f"{repo} exists, and its {name} is not of this checkpoint: give another name.")


def _sha256(file: Path) -> str:
    whole = hashlib.sha256()
    hash_into(whole, file)
    return whole.hexdigest()


@contextmanager
def _hub_failures(repo: str, endpoint: str) -> Iterator[None]:
    """Raise SalunError, in words, for what the hub refuses and for a network that fails, by many types."""
    try:
        yield
    except SalunError:
        raise
    except LocalTokenNotFoundError as e:
        raise SalunError(f"There is no token for {endpoint}: run hf auth login, or set HF_TOKEN.") from e
    except Exception as e:
        status = getattr(getattr(e, "response", None), "status_code", None)
        if status == 401:
            text = f"{endpoint} does not know your token: run hf auth login, or set HF_TOKEN to another."
        elif status == 403:
            text = f"Your token has no right to write {repo}: make one that has at {TOKENS}, and run hf auth login."
        else:
            text = (f"{repo} could not be sent to {endpoint} ({first_line(e)}). Check the network, and run the same "
                    "command again: what is there is not sent twice.")  # fmt: skip
        raise SalunError(text) from e
