"""Checkpoints that are whole or not there, and hold what the EM loop needs to go on exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from safetensors.torch import load_file, save_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from ..files import written_aside
from ..models import HEAD_WEIGHTS, FrozenWeights, save_head
from ..segmentation import document_to_row, row_to_document


_STATE, _FROZEN, _ASIDE = "ra3_state.json", "ra3_frozen.safetensors", "_incomplete"
_HEAD = "ra3_head_state.safetensors"
# Settings that a resumed run may change: what is logged and evaluated, memory, and the run's length, which
# `check_resumable` looks at by itself.
_FREE = {"model_init_kwargs", "dataset_num_proc", "dataset_license", "max_branch_tokens", "code_loss_tolerance"}
_FREE |= {"log_latents_steps", "eval_num_latents", "eval_max_boundaries", "em_iterations", "m_steps"}
_SHARED = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "optim")
_SHARED += ("lr_scheduler_type", "dataloader_drop_last", "train_sampling_strategy")


def _read_state(folder: Path) -> dict[str, Any]:
    if not (folder / _STATE).is_file():
        raise ValueError(
            f"`resume_from_checkpoint`: {folder / _STATE} is missing; this is no checkpoint of RA3MidTrainer "
            "(or was saved with `save_only_model`). Start anew from its weights with `model=...`."
        )
    try:
        return json.loads((folder / _STATE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`resume_from_checkpoint`: {folder / _STATE} is damaged ({error}); take an earlier checkpoint."
        ) from error


class CheckpointMixin:
    """Mixed into a `Trainer` with `gate_hold`, `metrics`, `frozen`, `learner`, `probe_baseline` and `backbone`."""

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A plain checkpoint, whole or not at all, with the abstraction head and `ra3_config.json` beside it; the
        latter stands for `training_args.bin`, a pickle that holds the Hub's token."""
        if not self.args.should_save:  # there for the sake of weights that are gathered
            super()._save(output_dir, state_dict)
            return
        with written_aside(output_dir or self.args.output_dir) as folder:
            super()._save(str(folder), state_dict)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self.args.save_pretrained(folder, max_steps=self.asked_max_steps)
            if self.learner is not None:
                save_head(self.learner.head, folder)

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
        of_stream = isinstance(self.train_dataset, IterableDataset)  # else the first documents are at hand again
        probe = [document_to_row(document) for document in self._probe if of_stream]
        each = gather_object([{"metrics": self.metrics.sums, "probe": probe}])
        frozen = {f"{kind}/{name}": v for kind, f in self.frozen.items() for name, v in f.whole_values().items()}
        if self.args.should_save:
            if not self.args.save_only_model:
                self._save_em_state(aside, each, frozen)
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

    def _run_settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint; what can be written as JSON."""
        args = self.args
        inherited = {field.name for field in fields(TrainingArguments)}
        own = [field.name for field in fields(args) if field.name not in inherited | _FREE]
        found = {"world_size": args.world_size} | {name: getattr(args, name) for name in (*own, *_SHARED)}
        found["train_dataset"] = self.counts.get("train")
        if isinstance(self.train_dataset, IterableDataset):  # whose rows workers share out
            found["dataloader_num_workers"] = args.dataloader_num_workers
        found["reward_funcs"] = sorted(self.plug_ins.funcs) if self.plug_ins is not None else []
        prompts = {part.name: part.prompt.settings for part in self.proposals.parts if part.prompt is not None}
        found["proposal_func"] = prompts.pop("function", None)
        found["prompts"] = prompts
        return json.loads(json.dumps(found))

    def _save_em_state(self, folder: Path, each: list[dict[str, Any]], frozen: dict[str, torch.Tensor]) -> None:
        phase = self.schedule.phase_at(self.state.global_step - 1)
        state = {
            "settings": self._run_settings(),
            "pass": [self._pass[0], self.state.global_step - self._pass[1]],
            "last_update": [phase.kind, phase.iteration, phase.step],
            "processes": each,
            "gate_hold": asdict(self.gate_hold),
            "probe_baseline": self.probe_baseline,
            "frozen": sorted(self.frozen),
            "head_trained_on": self.learner and self.learner.head.config.trained_on,
        }
        (folder / _STATE).write_text(json.dumps(state, indent=2))
        if frozen:
            save_file(frozen, folder / _FROZEN)
        if self.learner is not None:
            save_file(self.learner.tensors(), folder / _HEAD)

    def check_resumable(self, resume_from_checkpoint: str | bool | None) -> None:
        """Refuses a checkpoint that this run can't go on from exactly, before anything is loaded or written.

        Raises:
            `ValueError`: if a file is missing, or the checkpoint is of another configuration or number of processes.
        """
        if not resume_from_checkpoint:
            return
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if found is None:
            return  # `Trainer.train` says so
        folder = Path(found)
        state = _read_state(folder)
        wanted = ["trainer_state.json", *([_FROZEN] if state["frozen"] else [])]
        wanted += [_HEAD] if state.get("head_trained_on") is not None else []
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            wanted += ["optimizer.pt", "scheduler.pt"]
        for name in wanted:
            if not (folder / name).is_file():
                raise ValueError(f"`resume_from_checkpoint`: {folder / name} is missing; take an earlier checkpoint.")
        now = self._run_settings()
        for name, value in state["settings"].items():
            if name == "world_size" and now[name] != value:
                raise ValueError(
                    f"`resume_from_checkpoint`: {folder} was written by {value} processes and this run has "
                    f"{now[name]}; go on with {value}, or start anew from its weights with `model=...`."
                )
            if now.get(name) != value:
                raise ValueError(
                    f"`{name}` is {now.get(name)!r}, but {folder} was written with {value!r}; set it back, or start "
                    "anew from the checkpoint's weights with `model=...`."
                )
        step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        phase = self.schedule.phase_at(step - 1)
        if [phase.kind, phase.iteration, phase.step] != state["last_update"] or step > self.schedule.total:
            raise ValueError(
                f"`m_steps` or `em_iterations`: update {step} of {folder} was number {state['last_update'][2] + 1} of "
                f"{state['last_update'][0]}-phase {state['last_update'][1] + 1}, and is not in this run of "
                f"{self.schedule.iterations} x ({self.schedule.e_steps} + {self.schedule.m_steps}) updates; only the "
                "last M-phase may be made longer."
            )

    @staticmethod
    def resumed_pass(folder: str) -> tuple[int, int]:
        """Number of the pass over the data that a checkpoint was written in, and updates of it that were done."""
        return tuple(_read_state(Path(folder))["pass"])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        head = Path(self.state.best_model_checkpoint, HEAD_WEIGHTS)
        if self.learner is not None and head.is_file():
            self.learner.head.load_state_dict(load_file(head))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_em_state(Path(checkpoint))

    def _load_em_state(self, folder: Path) -> None:
        state = _read_state(folder)
        own = state["processes"][self.args.process_index]
        self.metrics.sums = own["metrics"]
        self._probe = tuple(row_to_document(row) for row in own["probe"])
        self.gate_hold = type(self.gate_hold)(**state["gate_hold"])
        self.probe_baseline = state["probe_baseline"]
        if self.learner is not None and state.get("head_trained_on") is not None:  # none before there was a head
            self.learner.load(load_file(folder / _HEAD), state["head_trained_on"])
        tensors = load_file(folder / _FROZEN) if state["frozen"] else {}
        for kind in state["frozen"]:
            values = {name.partition("/")[2]: v for name, v in tensors.items() if name.partition("/")[0] == kind}
            self.frozen[kind] = FrozenWeights(self.backbone.model)
            self.frozen[kind].load(values)
