"""What `ra3 report` reads: training runs and annotated corpora."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from huggingface_hub.repocard import metadata_load
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..config_file import read_settings
from ..files import public_name


MIDTRAINING, RLVR = "mid-training", "RLVR"
_ANNOTATED = ["annotated_text", "latents"]
_PLACE = ["path", "line"]  # where a program comes from, as `load_code_directory` says it
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
        """The number logged under `key`, by update."""
        return {entry["step"]: float(entry[key]) for entry in self.log if key in entry and "step" in entry}


@dataclass(frozen=True)
class AnnotatedCorpus:
    """Rows of `ra3 annotate`: `annotated_text` and `latents`, each with `line`, `text` and `gain`; perhaps `path`."""

    label: str
    rows: Sequence[Mapping[str, Any]]


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
    try:
        saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        if path.is_file() or saved or _shards(path):
            return AnnotatedCorpus(label, _read_rows(path, name))
        return _read_training(path, name, label)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`run` {name!r} can't be read, or is damaged ({error!r}); {_CURE}.") from error


def _shards(path: Path) -> list[str]:
    """The files of `ra3 annotate` in a folder."""
    return sorted(map(str, path.glob("train-*.parquet")))


def _read_rows(path: Path, name: str) -> Sequence[Mapping[str, Any]]:
    if path.is_dir():
        files = _shards(path)
        data = load_dataset("parquet", data_files=files, split="train") if files else load_from_disk(str(path))
        if not isinstance(data, Dataset) or not set(_ANNOTATED) <= set(data.column_names):
            raise ValueError(f"`run` {name!r} is a dataset without the columns of `ra3 annotate`; {_CURE}.")
        return data.select_columns([*_ANNOTATED, *(name for name in _PLACE if name in data.column_names)])
    text = path.read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    if not isinstance(rows, list) or not rows or not all(set(_ANNOTATED) <= set(row) for row in rows):
        raise ValueError(f"`run` {name!r} is a file with nothing to report; {_CURE}.")
    return rows


def _read_training(path: Path, name: str, label: str) -> TrainingRun:
    folder = path if (path / TRAINER_STATE_NAME).is_file() else Path(get_last_checkpoint(str(path)) or path)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"`run` {name!r} is a folder without {TRAINER_STATE_NAME} or checkpoints; {_CURE}.")
    log = json.loads((folder / TRAINER_STATE_NAME).read_text("utf-8"))["log_history"]
    keys = {key for entry in log for key in entry}
    if any(key.startswith(("estep/", "mstep/")) for key in keys):
        return TrainingRun(label, MIDTRAINING, log, _read_facts(path, folder))
    if "reward" in keys:
        return TrainingRun(label, RLVR, log, _read_facts(path, folder))
    raise ValueError(f"`run` {name!r} logged neither phases of RA3MidTrainer nor rewards; {_CURE}.")


def _read_facts(path: Path, folder: Path) -> dict[str, Any]:
    """What a run's folder says of it; `folder`, perhaps a checkpoint in it, has the log."""
    facts: dict[str, Any] = {"settings": read_settings(str(folder)) or read_settings(str(path)) or {}}
    if (path / "all_results.json").is_file():
        facts["peak"] = json.loads((path / "all_results.json").read_text("utf-8")).get(PEAK_MEMORY)
    if (path / "adapter_config.json").is_file():
        facts["base"] = json.loads((path / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    elif (path / "README.md").is_file():
        facts["base"] = (metadata_load(path / "README.md") or {}).get("base_model")
    if isinstance(facts.get("base"), str):  # of a path its last part says enough
        facts["base"] = public_name(facts["base"])
    return {name: fact for name, fact in facts.items() if fact}
