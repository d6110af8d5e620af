"""Checkpoints that are whole or not there, and hold what the EM loop needs to go on exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..models import FrozenWeights


_STATE, _FROZEN, _ASIDE = "ra3_state.json", "ra3_frozen.safetensors", "_incomplete"


class CheckpointMixin:
    """Mixed into a `Trainer` with `gate_hold`, `metrics`, `frozen`, `probe_baseline` and `backbone`."""

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model is in evaluation mode inside, and as it was outside."""
        model = self.backbone.model
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(training)

    def _get_output_dir(self, trial) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, _ASIDE) if self._saving_aside else run

    _saving_aside = False

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint aside, with what the EM loop needs, and renames it: it is whole or not there."""
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, push = self.args.save_total_limit, self.args.push_to_hub
        self.args.save_total_limit, self.args.push_to_hub, self._saving_aside = None, False, True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub, self._saving_aside = limit, push, False
        aside, final = run / _ASIDE / name, run / name
        if self.args.should_save:
            if not self.args.save_only_model:
                self._save_em_state(aside)
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if self.state.best_global_step and (best == final or best.exists()):
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(aside / "trainer_state.json"))
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            shutil.rmtree(run / _ASIDE, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_em_state(self, folder: Path) -> None:
        state = {
            "metrics": self.metrics.sums,
            "gate_hold": asdict(self.gate_hold),
            "probe_baseline": self.probe_baseline,
            "frozen": sorted(self.frozen),
        }
        (folder / _STATE).write_text(json.dumps(state, indent=2))
        if self.frozen:
            tensors = {f"{kind}/{name}": v for kind, f in self.frozen.items() for name, v in f.values.items()}
            save_file(tensors, folder / _FROZEN)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_em_state(Path(checkpoint))

    def _load_em_state(self, folder: Path) -> None:
        if not (folder / _STATE).is_file():
            raise ValueError(
                f"`resume_from_checkpoint`: {folder / _STATE} is missing; this is no checkpoint of RA3MidTrainer "
                "(or was saved with `save_only_model`). Start anew from its weights with `model=...`."
            )
        state = json.loads((folder / _STATE).read_text())
        self.metrics.sums = state["metrics"]
        self.gate_hold = type(self.gate_hold)(**state["gate_hold"])
        self.probe_baseline = state["probe_baseline"]
        if state["frozen"]:
            if not (folder / _FROZEN).is_file():
                raise ValueError(
                    f"`resume_from_checkpoint`: {folder / _FROZEN} is missing; take an earlier checkpoint."
                )
            tensors = load_file(folder / _FROZEN)
            for kind in state["frozen"]:
                values = {name.partition("/")[2]: v for name, v in tensors.items() if name.partition("/")[0] == kind}
                self.frozen[kind] = FrozenWeights(self.backbone.model)
                self.frozen[kind].load(values)
