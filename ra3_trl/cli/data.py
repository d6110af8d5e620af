"""Where the commands get their text from: a data set by name or path, a folder of code, or the standard library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, get_dataset

from ..segmentation import load_code_directory


STANDARD_LIBRARY = "the Python standard library"
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_HELD_OUT_FRACTION, _HELD_OUT_MOST = 0.05, 64
Splits = dict[str, Dataset | IterableDataset] | DatasetDict | IterableDatasetDict


def load_splits(
    dataset_name: str | None, code_dir: str | None, split: str, config: str | None = None, streaming: bool = False
) -> Splits:
    """Loads the corpus by split; `split` is among them.

    Args:
        dataset_name (`str`, *optional*):
            A Hub id, a folder saved by `save_to_disk`, or a json, jsonl, parquet or csv file.
        code_dir (`str`, *optional*):
            A folder of .py files. With neither it is the standard library of the running Python.
        split (`str`):
            The split that is wanted; a slice such as `"train[:100]"` works where `load_dataset` reads.
        config (`str`, *optional*), streaming (`bool`, *optional*, defaults to `False`):
            As in `datasets.load_dataset`.
    """
    if dataset_name and code_dir:
        raise ValueError(f"`dataset_name` is {dataset_name!r} and `code_dir` is {code_dir!r}; pass one of the two.")
    if not dataset_name:
        return {split: load_code_directory(code_dir)}
    data = _load(dataset_name, config, split, streaming)
    if isinstance(data, (Dataset, IterableDataset)):
        return {split: data}
    if split not in data:
        raise ValueError(
            f"`dataset_name` {dataset_name!r} has no split {split!r}; it has {', '.join(map(repr, data))}."
        )
    return data


def _reader(path: Path) -> str | None:
    """The reader of `datasets` for a file, by its name: `rows.jsonl.gz` -> `"json"`."""
    return _READERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _load(name: str, config: str | None, split: str, streaming: bool) -> Any:
    try:
        return _load_rows(Path(name), name, config, split, streaming)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"`dataset_name` is {name!r}, which can't be read: {cause}") from error


def _load_rows(path: Path, name: str, config: str | None, split: str, streaming: bool) -> Any:
    part = split if "[" in split else None  # a slice has to be told to `load_dataset`; else all splits are wanted
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return load_from_disk(name)
    if path.name.removesuffix(".gz").endswith(".py"):
        raise ValueError(
            f"{name!r} is a single program; give its folder, or a file with a row for each text (.jsonl)."
        )
    if reader := _reader(path):
        if not path.is_file():
            raise ValueError(f"`dataset_name` is {name!r}, but there is no such file.")
        if not path.stat().st_size:
            raise ValueError(f"`dataset_name` is {name!r}, an empty file; give one with rows.")
        return load_dataset(reader, data_files={"train": name}, split=part or "train", streaming=streaming)
    if path.is_dir() and not streaming and any(path.glob("**/*.py")) and not any(path.glob("**/*.json*")):
        raise ValueError(f"`dataset_name` is {name!r}, a folder of Python files; pass it as `code_dir`.")
    return load_dataset(name, config, split=part, streaming=streaming)


def load_mixture(mixture: DatasetMixtureConfig, seed: int) -> Splits:
    """Loads the split `train` of a mixture, and `test` where it has a `test_split_size`.

    As `trl.get_dataset`, but a json, jsonl, parquet or csv file may stand as `path`, and the split is keyed by `seed`:
    trl's is another one in every process and after every resume.
    """
    size = mixture.test_split_size
    if size is not None and mixture.streaming:
        raise ValueError(
            f"`test_split_size` is {size} and `streaming` is true, but a stream can't be split; set `eval_documents`."
        )
    sources = []
    for i, source in enumerate(mixture.datasets):
        reader = None if source.data_files else _reader(Path(source.path))
        if reader and not Path(source.path).is_file():
            raise ValueError(f"`datasets[{i}].path` is {source.path!r}, but there is no such file.")
        sources.append(replace(source, path=reader, data_files=source.path) if reader else source)
    try:
        whole = get_dataset(replace(mixture, datasets=sources, test_split_size=None))["train"]  # not split by trl
    except FileNotFoundError as error:
        raise ValueError(f"`datasets`: {error}; each `path`, or its `data_files`, must exist.") from error
    except ValueError as error:
        cure = (
            " Where pandas wrote `large_string`, write the file with "
            '`datasets.Dataset.from_pandas(frame).cast_column("text", datasets.Value("string")).to_parquet(path)`.'
        )
        raise ValueError(f"`datasets`: {error}{cure if 'large_string' in str(error) else ''}") from error
    if size is None:
        return {"train": whole}
    return whole.train_test_split(size if size < 1 else int(size), seed=seed)


def hold_out(
    data: Dataset | IterableDataset, documents: int | None, fraction: float | None, seed: int
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Splits off held-out rows: training rows and these, `None` when nothing is held out.

    Without `documents` and `fraction` it is one row in twenty, at most 64. Rows of one file (column `path`) stay
    together where that is possible, so that no function is judged by its neighbours; the count may then fall short.
    """
    if not isinstance(data, Dataset):
        return (data.skip(documents), data.take(documents)) if documents else (data, None)
    if documents is None:
        few = min(round(_HELD_OUT_FRACTION * len(data)), _HELD_OUT_MOST)
        documents = few if fraction is None else round(fraction * len(data))
    if not documents:
        return data, None
    if documents >= len(data):
        raise ValueError(
            f"{documents} documents would be held out of {len(data)}; lower `eval_documents` or `eval_fraction`."
        )
    order = np.random.default_rng(seed).permutation(len(data))
    rows: list[int] = []
    if "path" in data.column_names:
        paths = np.array(data["path"][:])
        for path in dict.fromkeys(paths[order]):
            of_file = np.flatnonzero(paths == path).tolist()
            rows += of_file if len(rows) + len(of_file) <= documents else []
    held_out = sorted(rows or order[:documents].tolist())
    return data.select(np.setdiff1d(np.arange(len(data)), held_out)), data.select(held_out)


def limit(data: Dataset | IterableDataset | None, documents: int | None) -> Dataset | IterableDataset | None:
    """Takes the first `documents` rows of a split that is there for evaluation (`None`: at most 64)."""
    documents = _HELD_OUT_MOST if documents is None else documents
    if data is None or not documents:
        return None
    return data.select(range(min(documents, len(data)))) if isinstance(data, Dataset) else data.take(documents)
