"""What `ra3 report` reads: training runs, tables of the replication, annotated corpora."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint


MIDTRAINING, RLVR = "mid-training", "RLVR"
REPLICATION_KEYS = ("bases", "form", "runs", "accuracy")
EXPERIMENT_KEYS = ("bases", "experiment", "runs", "accuracy")
ANNOTATED_KEYS = ("annotated_text", "latents")
_CURE = (
    "give the folder of a run of `ra3 train` or `ra3 rlvr` (with trainer_state.json or checkpoints), the JSON of "
    "`python -m benchmarks replication --json`, or a corpus of `ra3 annotate`"
)


@dataclass(frozen=True)
class TrainingRun:
    """The log of a run.

    Args:
        label (`str`):
            What the run is called; runs of the same label are seeds of one another.
        kind (`str`):
            `"mid-training"` or `"RLVR"`.
        log (`Sequence[Mapping]`):
            `trainer.state.log_history`.
    """

    label: str
    kind: str
    log: Sequence[Mapping[str, Any]]

    def points(self, key: str) -> dict[int, float]:
        """The number logged under `key`, by update."""
        return {entry["step"]: float(entry[key]) for entry in self.log if key in entry and "step" in entry}


@dataclass(frozen=True)
class Replication:
    """What `python -m benchmarks replication --json` wrote."""

    label: str
    table: Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What `python -m benchmarks replication --experiment NAME --json` wrote."""

    label: str
    table: Mapping[str, Any]


@dataclass(frozen=True)
class AnnotatedCorpus:
    """Rows of `ra3 annotate`: `annotated_text` and `latents`, each with `line`, `text` and `gain`."""

    label: str
    rows: Sequence[Mapping[str, Any]]


Run = TrainingRun | Replication | Experiment | AnnotatedCorpus


def read_run(name: str, label: str | None = None) -> Run:
    """Reads a run by what it holds.

    Args:
        name (`str`):
            A folder or file.
        label (`str`, *optional*):
            What to call it; the last part of the path by default.

    Raises:
        `ValueError`: if it is not there, nothing that can be reported, or damaged.
    """
    path = Path(name)
    label = label or path.resolve().name.removesuffix(".json").removesuffix(".jsonl")
    if not path.exists():
        raise ValueError(f"`run` {name!r} is not there; {_CURE}.")
    try:
        if path.is_file():
            return _read_file(path, name, label)
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _read_corpus(path, name, label)
        return _read_training(path, name, label)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`run` {name!r} can't be read, or is damaged ({error!r}); {_CURE}.") from error


def _read_file(path: Path, name: str, label: str) -> Run:
    text = path.read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    if isinstance(rows, list) and rows and all(set(ANNOTATED_KEYS) <= set(row) for row in rows):
        return AnnotatedCorpus(label, rows)
    if isinstance(rows, dict) and set(REPLICATION_KEYS) <= set(rows):
        return Replication(label, rows)
    if isinstance(rows, dict) and set(EXPERIMENT_KEYS) <= set(rows):
        return Experiment(label, rows)
    raise ValueError(f"`run` {name!r} is a file with nothing to report; {_CURE}.")


def _read_corpus(path: Path, name: str, label: str) -> AnnotatedCorpus:
    from datasets import Dataset, load_from_disk

    data = load_from_disk(str(path))
    if not isinstance(data, Dataset) or not set(ANNOTATED_KEYS) <= set(data.column_names):
        raise ValueError(f"`run` {name!r} is a dataset without the columns of `ra3 annotate`; {_CURE}.")
    return AnnotatedCorpus(label, data.select_columns(list(ANNOTATED_KEYS)))


def _read_training(path: Path, name: str, label: str) -> TrainingRun:
    folder = path if (path / TRAINER_STATE_NAME).is_file() else Path(get_last_checkpoint(str(path)) or path)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"`run` {name!r} is a folder without {TRAINER_STATE_NAME} or checkpoints; {_CURE}.")
    log = json.loads((folder / TRAINER_STATE_NAME).read_text("utf-8"))["log_history"]
    keys = {key for entry in log for key in entry}
    if any(key.startswith(("estep/", "mstep/")) for key in keys):
        return TrainingRun(label, MIDTRAINING, log)
    if "reward" in keys:
        return TrainingRun(label, RLVR, log)
    raise ValueError(f"`run` {name!r} logged neither phases of RA3MidTrainer nor rewards; {_CURE}.")
