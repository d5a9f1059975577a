"""Data sets of the `datasets` library: of the hub, or of a folder that it can load."""

import re
from pathlib import Path

from salun_sd.errors import SalunError, UsageError

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*){1,2}")  # org/name, or org/name/configuration


def splits_of(name: str) -> dict:
    """Split -> `Dataset` of a data set, an id as HUB_ID has it or a folder. Nothing is decoded.

    Raises UsageError where one of several configurations has to be chosen, and SalunError, with the library's reason,
    for anything that cannot be loaded, also where the library is not installed.
    """
    local, parts = Path(name).is_dir(), name.split("/")
    failure = f"{name}{'' if local else ' is not a folder here and'} cannot be loaded as a data set"
    try:
        from datasets import Dataset, disable_progress_bars, get_dataset_config_names, load_dataset, load_from_disk
        from datasets.exceptions import DatasetGenerationError
    except ImportError as e:
        raise SalunError(f"{failure}: the datasets library is missing, type pip install 'salun-sd[datasets]'") from e
    disable_progress_bars()
    place = [str(Path(name).resolve())] if local else ["/".join(parts[:2]), *parts[2:]]  # [id] or [id, configuration]
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            splits = load_from_disk(name)
        else:
            splits = load_dataset(*place)
    except Exception as e:  # of the network, the hub, the file formats, the library: many types, all with a message
        if "Config name is missing" in str(e):
            names = get_dataset_config_names(*place)
            one = "the folder of one of them" if local else f"one of them, as in {name}/{names[0]}"
            raise UsageError(f"{name} has several configurations, {', '.join(names)}: give {one}.") from e
        cause = e.__cause__ if isinstance(e, DatasetGenerationError) and e.__cause__ else e
        reason = (str(cause) or type(cause).__name__).splitlines()[0].rstrip(".")
        raise SalunError(f"{failure}: {reason}.") from e
    return {str(splits.split or "train"): splits} if isinstance(splits, Dataset) else splits
