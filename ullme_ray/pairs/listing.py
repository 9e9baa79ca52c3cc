"""Which files a `train.data` path means: one file, a glob, a folder, or a Hugging Face dataset folder. Costs one listing.

In a folder with a train split (`train.jsonl`, `data/train-00000-of-00004.parquet`, `train/x.csv`), only that split is taken, as
the datasets library does. Nothing else is passed over but documentation and dataset metadata: an unknown file is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.pairs.readers import KINDS, is_known

_NO_DATA = re.compile(r"(readme|license|notice|citation)(\..*)?|.*\.(md|py|png|lock)|dataset_infos?\.json", re.I)
_SPLITS = {
    "train": re.compile(r"(^|[-._ /])(train|training)[-._ 0-9/]", re.I),
    "other": re.compile(r"(^|[-._ /])(test|testing|eval|evaluation|valid|validation|val|dev)[-._ 0-9/]", re.I),
}


@dataclass(frozen=True)
class DataFiles:
    """Files in the order in which their rows count, and what a person should know of the choice."""

    files: tuple[storage.FileInfo, ...]
    note: str | None = None


def list_data(path: str, position: int) -> DataFiles:
    """The files of `train.data.<position>`.

    Raises:
        DataError: there is none, or one of an unknown kind.
    """
    name = f"train.data.{position}.path = {path}"
    files = storage.list_files(path)
    folder = path.rstrip("/") + "/"
    found = DataFiles(tuple(files))
    if files and all(file.path.startswith(folder) for file in files):
        found = _in_folder({file.path.removeprefix(folder): file for file in files}, name)
    if not found.files:
        raise DataError(f"{name} matches no data file; check the path")
    unknown = [file.path for file in found.files if not is_known(file.path)]
    if unknown:
        raise DataError(f"{name}: {unknown[0]} is none of {KINDS}; narrow the path with a glob, or rename the file")
    return found


def _in_folder(names: dict[str, storage.FileInfo], name: str) -> DataFiles:
    names = {at: file for at, file in names.items() if not any(part.startswith(".") for part in at.split("/"))}
    if "dataset_dict.json" in names:  # datasets.DatasetDict.save_to_disk
        train = {at.removeprefix("train/"): file for at, file in names.items() if at.startswith("train/")}
        if not train:
            splits = sorted({at.split("/")[0] for at in names if "/" in at})
            raise DataError(f"{name} is a dataset without a train split; add one of {', '.join(splits)} to the path")
        return DataFiles(_in_folder(train, name).files, "takes the split train of the dataset")
    if "state.json" in names and any(at.endswith(".arrow") for at in names):  # datasets.Dataset.save_to_disk
        state = names["state.json"].path
        try:
            parts = [str(part["filename"]) for part in json.loads(storage.read_text(state))["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name}: {state} is damaged ({type(error).__name__}: {error}); save the dataset again") from error
        missing = [part for part in parts if part not in names]
        if missing:
            raise DataError(f"{name}: {state} lists {missing[0]}, which is not there; save the dataset again")
        return DataFiles(tuple(names[part] for part in parts))
    data = {at: file for at, file in names.items() if not _NO_DATA.fullmatch(at.rpartition("/")[2])}
    train = {at: file for at, file in data.items() if _SPLITS["train"].search(at)}
    if train and len(train) < len(data):
        left = len(data) - len(train)
        return DataFiles(tuple(train.values()), f"takes the {len(train)} files of the train split; {left} others are not read")
    if data and all(_SPLITS["other"].search(at) for at in data):
        raise DataError(f"{name} holds only test or validation files; to train on them all the same, name them with a glob")
    return DataFiles(tuple(data.values()))
