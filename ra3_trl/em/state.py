"""What an EM loop remembers from update to update: saved, loaded and begun anew whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import RA3Config
from ..files import naming, parse_json, require_form
from ..models import FrozenWeights
from ..records import Document
from ..segmentation import document_to_row, row_to_document
from .learner import HeadLearner
from .monitor import GateHold, MetricSums, Sameness


STATE, FROZEN, HEAD = "ra3_state.json", "ra3_frozen.safetensors", "ra3_head_state.safetensors"
_CURE = "take an earlier checkpoint"
_FORM: dict[str, Any] = {  # of what a run goes on from
    "settings": dict[str, Any], "last_update": list[Any], "pass": list[int], "processes": list[dict[str, Any]],
    "gate_hold": dict[str, Any], "sameness": dict[str, Any], "probe_baseline": float | None, "alarms": list[str],
    "frozen": list[str], "head_trained_on": int | None,
}  # fmt: skip
_Part = TypeVar("_Part")


@dataclass
class EMState:
    """
    The loop's memory.

    `gate_hold`: whether P(think) is held.
    `sameness`: what the last latents said.
    `learner`: the abstraction head in training; goes on where it is when a run is begun anew, as the weights do.
    `metrics`: weighted sums since the last log line, of this process.
    `frozen`: snapshots of weights: `"start"`, `"reward"`, `"annotator"`.
    `probe`: documents on which the code's own likelihood is watched; `probe_baseline` its value at the phase's start.
    `alarms`: what was warned of already.
    `data_pass`, `pass_updates`: the pass over the data, counted from 0, and updates done in it, which `Trainer` can't
    tell from the number of updates where a stream has no length.
    `resumed`: whether the pass was begun by the run that wrote the checkpoint.
    """

    gate_hold: GateHold
    learner: HeadLearner | None = None
    sameness: Sameness = field(default_factory=Sameness)
    metrics: MetricSums = field(default_factory=MetricSums)
    frozen: dict[str, FrozenWeights] = field(default_factory=dict)
    probe: tuple[Document, ...] = ()
    probe_baseline: float = 0.0
    alarms: set[str] = field(default_factory=set)
    data_pass: int = -1
    pass_updates: int = 0
    resumed: bool = False

    @classmethod
    def anew(cls, args: RA3Config, learner: HeadLearner | None) -> EMState:
        """The state before the first update."""
        # What is held is the tokens' gate; the head's opens again by itself.
        return cls(GateHold(args.gate_hold if args.gate == "token" else "never", args.penalty), learner)

    def begin_pass(self) -> None:
        """Counts a pass over the data, unless it is the one that a resumed run goes on with."""
        if not self.resumed:
            self.data_pass, self.pass_updates = self.data_pass + 1, 0
        self.resumed = False

    def save(self, folder: Path, facts: dict[str, Any], writes: bool, keep_probe: bool) -> None:
        """Writes the state into the folder of a checkpoint; every process must call it.

        Args:
            folder (`Path`):
                One that nobody reads yet.
            facts (`dict[str, Any]`):
                What else a resumed run must know, as JSON knows it.
            writes (`bool`):
                Whether this is the process that writes.
            keep_probe (`bool`):
                Whether the probe can't be found again: a resumed stream is read from elsewhere.
        """
        # Sharded snapshots are put together by all processes, so all of them come here before one writes.
        rows = [document_to_row(document) for document in self.probe] if keep_probe else []
        processes = gather_object([{"metrics": self.metrics.sums, "probe": rows}])
        frozen = {f"{kind}/{name}": v for kind, f in self.frozen.items() for name, v in f.whole_values().items()}
        if not writes:
            return
        state = {
            **facts,
            "pass": [self.data_pass, self.pass_updates],
            "processes": processes,
            "gate_hold": asdict(self.gate_hold),
            "sameness": asdict(self.sameness),
            "probe_baseline": self.probe_baseline,
            "alarms": sorted(self.alarms),
            "frozen": sorted(self.frozen),
            "head_trained_on": self.learner and self.learner.head.config.trained_on,
        }
        (folder / STATE).write_text(json.dumps(state, indent=2))
        if frozen:
            save_file(frozen, folder / FROZEN)
        if self.learner is not None:
            save_file(self.learner.tensors(), folder / HEAD)

    def load(self, folder: Path, rank: int, model: nn.Module) -> None:
        """Takes what `save` wrote, each process its own part; the snapshots are of the weights of `model`."""
        state = read_state(folder)
        with naming(folder / STATE, _CURE, ValueError):
            own = state["processes"][rank]
            require_form(own, {"metrics": dict[str, list[float]], "probe": list[dict[str, Any]]})
            self.metrics.sums = {name: [total, weight] for name, (total, weight) in own["metrics"].items()}
            self.probe = tuple(row_to_document(row) for row in own["probe"])
            hold = {name: value for name, value in state["gate_hold"].items() if name != "average"}  # of before 0.3
            self.gate_hold = _remembered(GateHold, hold)
            self.sameness = _remembered(Sameness, state["sameness"])
            self.probe_baseline = state["probe_baseline"] or 0.0
            self.alarms = set(state["alarms"])
            self.data_pass, self.pass_updates = state["pass"]
        self.resumed = True
        if self.learner is not None and state["head_trained_on"] is not None:  # none before there was a head
            with naming(folder / HEAD, _CURE, RuntimeError, ValueError):
                self.learner.load(load_file(folder / HEAD), state["head_trained_on"])
        tensors: dict[str, torch.Tensor] = {}
        if state["frozen"]:
            with naming(folder / FROZEN, _CURE, ValueError):
                tensors = load_file(folder / FROZEN)
        for kind in state["frozen"]:
            self.frozen[kind] = FrozenWeights(model)
            with naming(folder / FROZEN, _CURE, RuntimeError, ValueError):
                self.frozen[kind].load(
                    {name.partition("/")[2]: v for name, v in tensors.items() if name.partition("/")[0] == kind}
                )


def _remembered(cls: type[_Part], values: dict[str, Any]) -> _Part:
    """An object of the values that `asdict` gave, each of its field's type."""
    hints = get_type_hints(cls)
    require_form(values, {name: hints[name] for name in values})
    return cls(**values)


def read_state(folder: Path) -> dict[str, Any]:
    """What `EMState.save` wrote into a checkpoint; what checkpoints of before lack is empty.

    Raises:
        `ValueError`: if it is missing or damaged.
    """
    if not (folder / STATE).is_file():
        raise ValueError(
            f"`resume_from_checkpoint`: {folder / STATE} is missing; this is no checkpoint of RA3MidTrainer "
            "(or was saved with `save_only_model`). Start anew from its weights with `model=...`."
        )
    where = f"`resume_from_checkpoint`: {folder / STATE}"
    content = parse_json((folder / STATE).read_bytes(), where, _CURE)
    with naming(where, _CURE, ValueError):
        state: dict[str, Any] = {"sameness": {}, "alarms": [], "head_trained_on": None} | content
        require_form(state, _FORM)
        _ = [state["pass"][i] for i in (0, 1)]
        kind, iteration, step = state["last_update"]
        require_form({"last_update": [kind]}, {"last_update": list[str]})
        require_form({"last_update": [iteration, step]}, {"last_update": list[int]})
    return state
