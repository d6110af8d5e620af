"""How a run is saved: whole or not at all, with head, settings and card, and without pickled arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import IterableDataset
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .em import FREE_ROOM, EMLoop, Schedule, rotate, run_settings, written_whole
from .em.data import Cutter
from .files import saying_what_is_full, written_aside
from .hub import HubMixin
from .kinds import check_kind
from .models import HEAD_WEIGHTS, save_head
from .policy import Policy


def stopped_message(args: TrainingArguments, command: str, step: int | None = None) -> str:
    """Says, after an interrupt behind update `step`, whether there is a checkpoint, and how to go on."""
    stopped = "Stopped" if step is None else f"Stopped after update {step}"
    folder = Path(str(args.output_dir))
    if folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        return f"{stopped}; {last} is whole. Go on with:\n  {command}"
    when = f"save_steps={args.save_steps:g}, save_strategy={args.save_strategy!s}"
    cure = "With a smaller `save_steps` there would be."
    return f"{stopped} before the first checkpoint ({when}): nothing to resume. {cure}"


class SavingMixin(HubMixin):
    """The saving part of [`RA3MidTrainer`], which has what is named here."""

    policy: Policy
    loop: EMLoop
    schedule: Schedule
    cut: Cutter
    asked_max_steps: int
    save_total_limit: int | None

    # Private, since this is where TRL's trainers, too, say what a checkpoint is: `save_model` calls it with the state
    # dict that it has gathered.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A plain checkpoint, whole or not at all, with the abstraction head and `ra3_config.json` beside it; the
        latter stands for `training_args.bin`, a pickle that holds the Hub's token."""
        check_kind("output_dir", output_dir, str | Path | None)
        if not self.args.should_save:  # there for the sake of weights that are gathered
            super()._save(output_dir, state_dict)
            return
        with written_aside(output_dir or self.args.output_dir) as folder:
            super()._save(str(folder), state_dict)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self.args.save_pretrained(folder, max_steps=self.asked_max_steps)
            if self.loop.learner is not None:
                save_head(self.loop.learner.head, folder)

    # Private, since `Trainer` writes in place and deletes older checkpoints by itself.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint aside, with what the EM loop needs, and renames it: it is whole or not there. A card
        goes into `output_dir` with each, as TRL's trainers write it."""
        run, writes = Path(self._get_output_dir(trial)), self.args.should_save
        with saying_what_is_full(run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", FREE_ROOM):
            self.create_model_card(model_name=Path(self.args.hub_model_id or str(self.args.output_dir)).name)
        with written_whole(self.args, run, self.state) as folder:
            super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                phase = self.schedule.phase_at(self.state.global_step - 1)
                facts = {"settings": self._run_settings(), "last_update": [phase.kind, phase.iteration, phase.step]}
                of_stream = isinstance(self.train_dataset, IterableDataset)  # else the first documents are at hand
                self.loop.state.save(folder, facts, writes, keep_probe=of_stream)
        final = run / folder.name
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if writes:
            rotate(run, self.save_total_limit, [final, self.state.best_model_checkpoint])

    def _run_settings(self) -> dict[str, Any]:
        """What a resumed run must share with this one."""
        facts: dict[str, Any] = {"train_dataset": self.cut.counts.get("train")}
        if isinstance(self.train_dataset, IterableDataset):  # whose rows workers share out
            facts["dataloader_num_workers"] = self.args.dataloader_num_workers
        facts["reward_funcs"] = sorted(self.loop.plug_ins.funcs) if self.loop.plug_ins is not None else []
        return run_settings(self.args, facts | self.policy.proposer.settings)

    # Private, since the head must be there when callbacks hear of the training's end: trackers save the model then.
    def _load_best_model(self) -> None:
        super()._load_best_model()
        head = Path(self.state.best_model_checkpoint, HEAD_WEIGHTS)
        if self.loop.learner is not None and head.is_file():
            self.loop.learner.head.load_state_dict(load_file(head))
