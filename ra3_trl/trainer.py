"""`RA3MidTrainer`: the façade that puts the rooms together.

RA3 (https://huggingface.co/papers/2509.25810) as an EM loop on `transformers.Trainer`: an update belongs to an E-phase
or an M-phase by its number alone. E: sample latents at the boundaries of the batch, reward them by the expert's next
lines, one policy-gradient update. M: annotate the batch with the weights frozen at the phase's start, one next-token
update. What an update does is in `em/loop.py`; here are the hooks by which `Trainer` asks for it, in running order.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from .arguments import check_callback, check_training, measures_more, read_arguments
from .config import RA3Config
from .em import (
    Batch,
    Cutter,
    EMLoop,
    Gradients,
    LoopCallback,
    PreemptionCallback,
    Watch,
    check_overridden,
    check_resumable,
    collate,
    evaluate_batches,
    keep_best_alone,
    log_line,
    make_learner,
    name_best,
    not_evened_out,
    phase_scheduler,
    plan_phases,
    read_state,
    resumed_folder,
    rotation_taken_over,
    settle,
    stream_loader,
)
from .generation import AutoModelForCausalLMWithAbstractionHead
from .kinds import check_kind
from .models import (
    check_trainable,
    prepare_model,
    state_width,
)
from .policy import HELD_OUT, OWN_LATENTS, Policy, Proposer
from .refusals import refuse_arguments
from .report import LatentLog, PhaseProgressCallback, evaluated_batch, evaluation_bar, show_table
from .rewards import RewardFunc, RewardPlugIns
from .saving import SavingMixin, stopped_message
from .segmentation import find_format
from .trackers import check_best_metric, check_trackers


logger = get_logger(__name__)  # of the main process
_IN_PYTHON = "`trainer.train(resume_from_checkpoint=True)`"


class RA3MidTrainer(SavingMixin, Trainer):
    """
    Mid-trains a causal language model on expert text with Reasoning as Action Abstractions.

    Example:

    ```python
    from datasets import load_dataset
    from ra3_trl import RA3Config, RA3MidTrainer

    trainer = RA3MidTrainer(
        model="Qwen/Qwen2.5-Coder-0.5B",
        args=RA3Config(output_dir="Qwen2.5-Coder-0.5B-RA3"),
        train_dataset=load_dataset("bigcode/the-stack-smol", data_dir="data/python", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or `Path` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A folder, a Hub id (loaded with `args.model_init_kwargs`, float32 unless `dtype` is given) or a model; or
            [`AutoModelForCausalLMWithAbstractionHead`]. The abstraction head that a checkpoint has is trained on.
        args ([`RA3Config`], *optional*):
            Settings. `None` is the default configuration, written to `<model>-RA3`; of `TrainingArguments` and TRL's
            `SFTConfig` an [`RA3Config`] is made that says the same.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Expert text: a text column, `prompt` and `completion`, conversations, tokens, or anything with a
            `formatting_func`; see docs/data.md.
        eval_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            Held-out text of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            A fast tokenizer, or the name of one; `None` is the model's.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            As in `Trainer`.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler, as in `Trainer`. A scheduler given here is stepped through both phases.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Wraps the model in an adapter.
        formatting_func (`Callable`, *optional*):
            Makes the text of an example.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Further terms of the E-step's reward, called by keyword as those of TRL's `GRPOTrainer`; see
            [`~ra3_trl.rewards.RewardPlugIns`]. Weighted by `args.reward_weights`, beside the log-likelihood, whose
            weight is `args.likelihood_weight`.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Class and arguments of an optimizer, in the place of `args.optim`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            For a model that is loaded by name, with a `peft_config`.
        **others:
            Further arguments of TRL's trainers may be `None`; else they are refused with what to pass instead.

    Raises:
        `ValueError`: before any training, for data, tokenizers or settings that can't work, with the cure.
    """

    save_total_limit: int | None = None  # `args.save_total_limit`, which `Trainer` is not told: it deletes in place

    # What `evaluate` gives, without its prefix; `entropy` and what follows as in `SFTTrainer`.
    measured: ClassVar[tuple[str, ...]] = (
        *HELD_OUT, "loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"
    )  # fmt: skip

    compute_loss_in: ClassVar[str | None] = None  # a subclass that overrides `compute_loss` says "M": not in E-phases

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel | AutoModelForCausalLMWithAbstractionHead,
        args: RA3Config | TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        *,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        quantization_config: Any = None,
        **others: Any,
    ):
        refuse_arguments(others, RA3Config.__dataclass_fields__, signature(RA3MidTrainer).parameters)
        optimizers = (None, None) if optimizers is None else optimizers
        check_training(callbacks, optimizers, optimizer_cls_and_kwargs, formatting_func, peft_config)
        start = read_arguments(type(self), model, args, processing_class, quantization_config)
        args, tokenizer, head = start.args, start.tokenizer, start.head
        check_overridden(args, type(self), RA3MidTrainer)
        check_trackers(args.report_to)
        if not measures_more(type(self), callbacks):
            check_best_metric(args.metric_for_best_model, eval_dataset, self.measured)
        model = prepare_model(start.model, tokenizer, args, peft_config, find_format(args.action_format).tags)
        if train_dataset is not None:
            check_trainable(model)
        self.policy = Policy.of_model(model, tokenizer, args, room_for_latents=args.uses_latents)
        self.policy.proposer = self.make_proposer(args, train_dataset is not None)
        learner = make_learner(args, head, state_width(self.policy.backbone.causal_lm))
        self.policy.head = learner
        plug_ins = RewardPlugIns.of(args, tokenizer, reward_funcs)
        self.cut = Cutter(self.policy, formatting_func, keep_rows=plug_ins is not None and bool(plug_ins.funcs))
        self.source_dataset = train_dataset  # as it was given: its licences, and what is annotated for the Hub
        train_dataset, eval_dataset = self.cut(train_dataset, "train"), self.cut(eval_dataset, "eval")
        self.schedule = plan_phases(args, train_dataset)
        self.asked_max_steps = args.max_steps  # what `ra3_config.json` holds: the length may follow from the data
        args.max_steps = self.schedule.total
        args.use_cache |= bool(model.config.to_dict().get("use_cache"))  # else `Trainer` would save False
        watch = None if train_dataset is None else Watch(self.policy, train_dataset)
        self.loop = EMLoop(self.policy, self.schedule, learner, plug_ins, watch, self._begin_phase)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.loop.compute_loss = lambda *inputs, **options: self.compute_loss(*inputs, **options)
        # The loss is divided by the boundaries (E) or tokens (M) of the whole window, see get_batch_samples.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        # accelerate wraps `model.forward` alone, and the engines call decoder and head apart.
        self.policy.autocast = self.accelerator.autocast
        self.model.add_model_tags(["ra3", "trl"])
        self.evaluations: list[dict[str, float]] = []  # `train()` empties the state's log
        self.latent_log = LatentLog(
            Path(args.output_dir) / "_latents", tokenizer, args.log_latents_steps, self.policy.segmenter.format.think
        )
        if self.is_world_process_zero():
            self.loop.on_rollouts = self.latent_log.add
        self.resume_hint = _IN_PYTHON
        self.following, self.preemption = LoopCallback(self.loop), PreemptionCallback()
        self.add_callback(self.following)
        self.add_callback(self.preemption)
        self.phases = PhaseProgressCallback(self.schedule, self.callback_handler)
        self.add_callback(self.phases)
        self.table = show_table(self.callback_handler, self.schedule, held_out=eval_dataset is not None)
        self.table.following = (
            f"trainer.save_model(), then `ra3 show {args.output_dir} FILE.py --html page.html`: its thoughts as a page"
        )
        self.table.stopped = lambda: self.preemption.asked
        self.latent_log.trackers = self.callback_handler

    # ---- set-up ----

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """As `Trainer`'s; TRL's callbacks that write completions need prompts in `eval_dataset`."""
        check_callback(callback)
        super().add_callback(callback)

    def make_proposer(self, args: RA3Config, trains: bool) -> Proposer:
        """Where latents come from: the policy itself. An experimental trainer may say otherwise; `self.policy` is
        there by then.

        Args:
            trains (`bool`):
                Whether there is training data.
        """
        return OWN_LATENTS

    # ---- training, in running order ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. A SIGTERM ends it with `SystemExit(143)` after the next update, which is saved.

        Raises:
            `ValueError`: for a checkpoint that this run can't go on from exactly; nothing is written then.
        """
        check_kind("resume_from_checkpoint", resume_from_checkpoint, str | Path | bool | None)
        settle(Path(str(self.args.output_dir)), self.args.should_save)
        self.following.resumed_from = folder = resumed_folder(resume_from_checkpoint, str(self.args.output_dir))
        if folder is not None:  # of `True` without any, `Trainer.train` says so
            apart = not self.is_deepspeed_enabled and not self.is_fsdp_enabled
            check_resumable(folder, self._run_settings(), self.schedule, with_optimizer=apart)
        with (
            self.preemption.listening(self.args),
            rotation_taken_over(self.args) as self.save_total_limit,
            self._interrupts_explained(),
        ):
            output = super().train(str(folder) if folder else resume_from_checkpoint, *args, **kwargs)
        if self.args.should_save and self.save_total_limit == 1 and not self.preemption.asked:
            keep_best_alone(self.state)
        if self.preemption.asked:
            done = self.state.global_step
            logger.warning(
                "Stopped by SIGTERM after update %d, which is saved. Go on with %s.", done, self.resume_hint
            )
            self.accelerator.wait_for_everyone()  # the first to leave has a launcher end the others
            raise SystemExit(128 + signal.SIGTERM)
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    @contextmanager
    def _interrupts_explained(self) -> Iterator[None]:
        """After an interrupt in a notebook or script says how to go on; the command line says it by itself."""
        try:
            yield
        except KeyboardInterrupt:
            if self.resume_hint == _IN_PYTHON:
                logger.warning(stopped_message(self.args, self.resume_hint, self.state.global_step))
            raise

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s; a stream is shared out already."""
        data = self.train_dataset
        if not isinstance(data, IterableDataset):
            return super().get_train_dataloader()
        return stream_loader(data, self.args, self._train_batch_size, self.data_collator, train=True)

    # Private, since `Trainer` has no other place to say it: it does one update more where all was done; of a stream it
    # takes all updates for one pass, and would skip through the first to find the batches of a later one.
    def _init_training_state(self, max_steps, updates_per_pass, passes, resume_from_checkpoint, trial):
        begun = super()._init_training_state(max_steps, updates_per_pass, passes, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return begun
        name_best(Path(resume_from_checkpoint), self.state)  # it lies beside this one, should the run have moved
        if self.state.global_step >= self.schedule.total:
            return passes, 0  # no pass begins, and nothing is evaluated or saved again
        if not isinstance(self.train_dataset, IterableDataset):
            return begun
        number, updates = read_state(Path(resume_from_checkpoint))["pass"]
        return number, 0 if self.args.ignore_data_skip else updates * self.args.gradient_accumulation_steps

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Each phase has its own learning rate and schedule; a scheduler that was given is stepped through both."""
        if self.lr_scheduler is None:
            self.lr_scheduler = phase_scheduler(self.args, self.schedule, optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The documents of one update, rolled out (E) or annotated (M), and the number its losses are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.loop.plug_ins is not None:
            self.loop.plug_ins.state = self.state
        documents = [batch["documents"] for batch in batches]
        if documents:
            self.phases.on_documents(self.state.global_step)
        window = self.loop.collect(documents, num_batches, self.state.global_step)
        if window is None:
            return [], None
        self.state.num_input_tokens_seen += window.tokens
        self.control.should_training_stop |= window.stop
        return [{"batch": batch} for batch in window.batches], torch.tensor(window.denominator, device=device)

    def _begin_phase(self, phase, step: int) -> None:
        if self.args.reset_optimizer and step > 0:
            self.optimizer.state.clear()

    def training_step(self, model: nn.Module, inputs: dict[str, Batch], num_items_in_batch=None) -> torch.Tensor:
        """Loss and gradients of one micro-batch."""
        model.train()
        gradients = Gradients.of(self.accelerator, model, self.policy.model)
        with self.compute_loss_context_manager():
            loss = self.loop.backward(inputs["batch"], float(num_items_in_batch), gradients)
        return torch.tensor(loss * self.accelerator.num_processes, device=self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Next-token loss of an M-update, and of `evaluate`; `inputs` are the model's, with `labels`. A subclass may
        override it as that of `SFTTrainer`."""
        return self.loop.next_token(model, inputs, num_items_in_batch, return_outputs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """Mixed precision for the engines, which call decoder and head apart; accelerate wraps `model.forward`."""
        return self.accelerator.autocast()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: what a rollout costs is not 6 N tokens."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with the metrics of all processes since the last line."""
        super().log(log_line(logs, self.loop, self.state, self.cut.counts.get("train", {})), start_time)

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """As `Trainer`'s, of rows as the trainer takes them; no row counts twice."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        named = isinstance(data, str)
        return self._loader_of(self.eval_dataset[data] if named else data, "eval", data if named else None)

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        """As `Trainer`'s, of rows as the trainer takes them; no row counts twice."""
        return self._loader_of(test_dataset, "test")

    def _loader_of(self, data: Any, split: str, name: str | None = None) -> DataLoader:
        data = self.cut(data, split)
        if isinstance(data, IterableDataset):
            return stream_loader(data, self.args, self.args.eval_batch_size, self.data_collator, train=False)
        with not_evened_out(self.accelerator):
            return super().get_eval_dataloader(data if name is None else name)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Metrics of `finish_metrics`; all in nats per code token but for rates, lengths and gains."""
        self.callback_handler.eval_dataloader = dataloader

        def done() -> None:
            self.control = evaluated_batch(self.callback_handler, self.args, self.state, self.control)

        loss_of = partial(self.compute_loss, self.model)
        total = len(dataloader.dataset) // self.args.world_size if has_length(dataloader) else None  # of this process
        with evaluation_bar(self.args, self.callback_handler, total) as progress:
            found, num_documents = evaluate_batches(
                self.loop, dataloader, loss_of, done, self.is_in_train, progress=progress
            )
        found["num_tokens"] = self.state.num_input_tokens_seen  # of training so far, as in `SFTTrainer`
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        if metric_key_prefix.startswith("eval"):
            self.evaluations.append({**metrics, "step": self.state.global_step})
        return EvalLoopOutput(None, label_ids=None, metrics=metrics, num_samples=num_documents)
