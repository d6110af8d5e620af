"""What `ra3 report` reads: training runs and annotated corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub.repocard import metadata_load
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from yaml import YAMLError

from ..config_file import read_settings
from ..files import naming, parse_json, public_name, read_lines, require_form


MIDTRAINING, RLVR = "mid-training", "RLVR"
_ROW = {"annotated_text": str, "latents": list[dict[str, Any]]}
_PLACE = {"path": str | None, "line": int | None}  # where a program comes from, as `load_code_directory` says it
_LATENT = {"line": int, "gain": float | None}
_NUMBERS = ("estep/", "mstep/", "eval_", "reward", "pass_rate", "think_rate", "latent_length")  # begin so
_MOST = 1e30  # what is drawn, in size
PEAK_MEMORY = "peak_memory_bytes"  # in all_results.json
_CURE = (
    "give the folder of a run of `ra3 train` or `ra3 rlvr` (with trainer_state.json or checkpoints), or a corpus of "
    "`ra3 annotate`"
)


@dataclass(frozen=True)
class TrainingRun:
    """The log of a run, `trainer.state.log_history`; `kind` is `MIDTRAINING` or `RLVR`.

    Runs of the same label are seeds of one another. `facts` is what its folder says besides: `base`, the model that it
    began with, `peak`, the most memory in bytes, and `settings`, by name.
    """

    label: str
    kind: str
    log: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def points(self, key: str) -> dict[int, float]:
        """The number logged under `key`, by update; what is not finite can't be drawn."""
        logged = {entry["step"]: entry[key] for entry in self.log if entry.get(key) is not None and "step" in entry}
        return {step: float(value) for step, value in logged.items() if abs(value) < _MOST}


@dataclass(frozen=True)
class AnnotatedCorpus:
    """Rows of `ra3 annotate`: `annotated_text` and `latents`, each with `line`, `text` and `gain`; perhaps `path`.
    They were read from `source`; iterating gives them checked.

    Raises:
        `ValueError`: naming the row and the field, if one is not what `ra3 annotate` writes.
    """

    label: str
    rows: Sequence[Mapping[str, Any]]
    source: str = field(default="the corpus", compare=False)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for i, row in enumerate(self.rows, 1):
            with naming(f"`run` {self.source!r}, row {i},", _CURE):
                require_form(row, _ROW | {name: hint for name, hint in _PLACE.items() if name in row})
                for latent in row["latents"]:
                    require_form(latent, _LATENT)
                    if latent["gain"] is not None and not abs(latent["gain"]) < _MOST:
                        raise TypeError(f"`gain` is {latent['gain']}")
            yield row


Run = TrainingRun | AnnotatedCorpus


def read_runs(names: Sequence[str], read: Callable[[str, str], Any] | None = None) -> list[Any]:
    """Reads runs, each `PATH` or `LABEL=PATH`, by `read(path, label)`; that is [`read_run`] by default.

    Raises:
        `ValueError`: if one can't be read, or two get the same label without having been given it.
    """
    runs: list[Any] = []
    paths: dict[str, str] = {}
    for name in names:
        label, _, path = name.partition("=")
        by_path = not path or not label or Path(name).exists()  # the name of a file may have `=` in it
        if by_path:
            label, path = _label(name), name
        runs.append((read or read_run)(path, label))
        if by_path and label in paths:
            raise ValueError(
                f"`runs`: {path!r} and {paths[label]!r} are both called {label!r}; write LABEL=RUN, with the same "
                "LABEL for seeds of one another."
            )
        paths.setdefault(label, path)
    return runs


def _label(name: str) -> str:
    return Path(name).resolve().name.removesuffix(".json").removesuffix(".jsonl")


def read_run(name: str, label: str | None = None) -> Run:
    """Reads a folder or file by what it holds; its label is the last part of the path by default.

    Raises:
        `ValueError`: if it is not there, nothing that can be reported, or damaged.
    """
    path, label = Path(name), label or _label(name)
    if not path.exists():
        raise ValueError(f"`run` {name!r} is not there; {_CURE}.")
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    # The errors of pyarrow and datasets are of many kinds, of which these are the roots.
    with naming(f"`run` {name!r} can't be read, or", _CURE, pyarrow.ArrowException, DatasetsError, EOFError):
        if path.is_file() or saved or _shards(path):
            return AnnotatedCorpus(label, _read_rows(path, name), name)
        return _read_training(path, name, label)


def _shards(path: Path) -> list[str]:
    """The files of `ra3 annotate` in a folder."""
    return sorted(map(str, path.glob("train-*.parquet")))


def _read_rows(path: Path, name: str) -> Sequence[Mapping[str, Any]]:
    if path.is_dir():
        files = _shards(path)
        with naming(f"`run` {name!r} can't be read, or", _CURE, ValueError):
            data = load_dataset("parquet", data_files=files, split="train") if files else load_from_disk(str(path))
        if not isinstance(data, Dataset) or not set(_ROW) <= set(data.column_names):
            raise ValueError(f"`run` {name!r} is a dataset without the columns of `ra3 annotate`; {_CURE}.")
        return data.select_columns([*_ROW, *(name for name in _PLACE if name in data.column_names)])
    if path.suffix == ".jsonl":
        rows = [parse_json(line, f"`run` {where}, can't be read, or", _CURE) for where, line in read_lines(path)]
    else:
        rows = parse_json(path.read_bytes(), f"`run` {name!r} can't be read, or", _CURE)
    if not isinstance(rows, list) or not rows or not all(set(_ROW) <= set(row) for row in rows):
        raise ValueError(f"`run` {name!r} is a file with nothing to report; {_CURE}.")
    return rows


def _read_training(path: Path, name: str, label: str) -> TrainingRun:
    folder = path if (path / TRAINER_STATE_NAME).is_file() else Path(get_last_checkpoint(str(path)) or path)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"`run` {name!r} is a folder without {TRAINER_STATE_NAME} or checkpoints; {_CURE}.")
    log = _read_log(folder / TRAINER_STATE_NAME)
    keys = {key for entry in log for key in entry}
    if any(key.startswith(("estep/", "mstep/")) for key in keys):
        return TrainingRun(label, MIDTRAINING, log, _read_facts(path, folder))
    if "reward" in keys:
        return TrainingRun(label, RLVR, log, _read_facts(path, folder))
    raise ValueError(f"`run` {name!r} logged neither phases of RA3MidTrainer nor rewards; {_CURE}.")


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The log in a trainer state, each entry of the form that `Trainer` writes."""
    content = parse_json(path.read_bytes(), str(path), _CURE)
    with naming(path, _CURE):
        require_form(content, {"log_history": list[dict[str, Any]]})
        for entry in content["log_history"]:
            numbers = [key for key in entry if key.startswith(_NUMBERS)]
            require_form(entry, {"step": int} if "step" in entry else {})
            require_form(entry, dict.fromkeys(numbers, float | None))
            require_form(entry, {"train_runtime": float} if "train_runtime" in entry else {})
    return content["log_history"]


def _read_facts(path: Path, folder: Path) -> dict[str, Any]:
    """What a run's folder says of it; `folder`, perhaps a checkpoint in it, has the log."""
    facts: dict[str, Any] = {"settings": read_settings(str(folder)) or read_settings(str(path)) or {}}
    card, adapter, results = (path / name for name in ("README.md", "adapter_config.json", "all_results.json"))
    if results.is_file():
        content = parse_json(results.read_bytes(), str(results), _CURE)
        with naming(results, _CURE):
            require_form({PEAK_MEMORY: content.get(PEAK_MEMORY)}, {PEAK_MEMORY: float | None})
        facts["peak"] = content.get(PEAK_MEMORY)
    if adapter.is_file():
        with naming(adapter, _CURE):
            facts["base"] = parse_json(adapter.read_bytes(), str(adapter), _CURE).get("base_model_name_or_path")
    elif card.is_file():
        with naming(card, _CURE, YAMLError, ValueError):
            facts["base"] = (metadata_load(card) or {}).get("base_model")
    if isinstance(facts.get("base"), str):  # of a path its last part says enough
        facts["base"] = public_name(facts["base"])
    return {name: fact for name, fact in facts.items() if fact}
