"""`RA3MidTrainer`: the façade that puts the rooms together.

RA3 (https://huggingface.co/papers/2509.25810) as an EM loop on `transformers.Trainer`: an update belongs to an E-phase
or an M-phase by its number alone. E: sample latents at the boundaries of the batch, reward them by the expert's next
lines, one policy-gradient update. M: annotate the batch with the weights frozen at the phase's start, one next-token
update. Where we deviate from the paper, or it is silent, docs/design.md says so.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    get_scheduler,
)
from transformers.trainer_utils import EvalLoopOutput

from .config import RA3Config
from .em import (
    GateHold,
    MetricSums,
    Phase,
    Rollout,
    annotate,
    estep_backward,
    evaluate_documents,
    finish_metrics,
    mstep_loss,
    pack,
    plan_schedule,
    roll_out,
    rollout_metrics,
)
from .em.checkpoint import CheckpointMixin
from .em.watch import WatchMixin
from .hub import write_model_card
from .models import FrozenWeights, context_length, disable_dropout, load_model, load_tokenizer
from .records import AnnotatedExample, Document
from .report import LatentLog
from .rollout import Backbone, NoiseKey, SamplingParams, build_engine
from .segmentation import (
    ACTION_FORMATS,
    Segmenter,
    build_token_table,
    count_documents,
    row_to_document,
    segment_dataset,
    splice,
)


logger = logging.getLogger(__name__)


def _collate(rows: list[dict[str, Any]]) -> dict[str, list[Document]]:
    return {"documents": [row_to_document(row) for row in rows]}


class RA3MidTrainer(CheckpointMixin, WatchMixin, Trainer):
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
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A folder, a Hub id (loaded with `args.model_init_kwargs`, float32 unless `dtype` is given) or a model.
        args ([`RA3Config`], *optional*):
            Settings. `None` is the default configuration, written to `<model>-RA3`.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Expert text: a text column, `prompt` and `completion`, or anything with a `formatting_func`.
        eval_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            Held-out text of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            A fast tokenizer; `None` is the model's.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            As in `Trainer`.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler, as in `Trainer`. A scheduler given here is stepped through both phases.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Wraps the model in an adapter.
        formatting_func (`Callable`, *optional*):
            Makes the text of an example.

    Raises:
        `ValueError`: before any training, for data, tokenizers or settings that can't work; the message names the
        cure.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RA3Config | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or RA3Config(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-RA3")
        model = load_model(model, args.model_init_kwargs, peft_config)
        tokenizer = processing_class or load_tokenizer(name, args.model_init_kwargs)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if args.disable_dropout:
            disable_dropout(model)
        self.ra3_args = args
        self.backbone = Backbone(model)
        self.engine = self._build_engine(args, tokenizer)
        self.segmenter = Segmenter(
            tokenizer, ACTION_FORMATS[args.action_format], self._chunk_tokens(args), args.existing_comments
        )
        self.counts: dict[str, dict[str, int]] = {}
        train_dataset = self._segment(train_dataset, "train", formatting_func)
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: self._segment(value, key, formatting_func) for key, value in eval_dataset.items()}
        else:
            eval_dataset = self._segment(eval_dataset, "eval", formatting_func)
        self._plan(args, train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is divided by the sites (E) or tokens (M) of the whole accumulation window, see get_batch_samples.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        self.model.add_model_tags(["ra3", "trl"])
        self.gate_hold = GateHold(args.gate_hold, args.penalty)
        self.metrics = MetricSums()
        self.frozen: dict[str, FrozenWeights] = {}
        self.probe_baseline: float | None = None
        self.evaluations: list[dict[str, float]] = []  # `train()` empties the state's log
        self.latent_log = LatentLog(Path(args.output_dir) / "latents", tokenizer, args.log_latents_steps)

    # ---- set-up ----

    def _build_engine(self, args: RA3Config, tokenizer: PreTrainedTokenizerBase):
        eos = self.backbone.causal_lm.generation_config.eos_token_id
        eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        self.table = build_token_table(tokenizer, self.backbone.vocab_size, eos)
        params = SamplingParams(args.max_latent_length, args.temperature, args.top_k, args.top_p)
        return build_engine(args.engine, self.backbone, self.table, params, args.max_branch_tokens)

    def _chunk_tokens(self, args: RA3Config) -> int:
        """Longest chunk of a text: `max_length` less room for latents (a fifth), where there will be any."""
        context = context_length(self.backbone.causal_lm) or args.max_length
        if args.max_length > context:
            raise ValueError(
                f"`max_length` is {args.max_length}, but the model's context holds {context} tokens; lower it."
            )
        room = max(args.max_length // 5, args.max_latent_length + 8) if args.uses_latents else 0
        if args.max_length - room < 8:
            raise ValueError(
                f"`max_length` is {args.max_length}: latents of max_latent_length={args.max_latent_length} tokens "
                "leave no room for text; raise `max_length`."
            )
        return args.max_length - room

    def _segment(self, dataset: Dataset | IterableDataset | None, split: str, formatting_func: Callable | None):
        if dataset is None:
            return None
        args = self.ra3_args
        segmented = segment_dataset(
            dataset, self.segmenter, args.dataset_text_field, formatting_func, args.dataset_num_proc
        )
        if isinstance(segmented, Dataset):
            self.counts[split] = counts = count_documents(dataset, segmented)
            logger.info("%s: %s", split, ", ".join(f"{value:,} {key}" for key, value in counts.items() if value))
            if not len(segmented):
                raise ValueError(
                    f"`{split}_dataset` has {len(dataset)} rows and all are empty texts; give it some code."
                )
            if split == "train" and args.e_steps and not counts["boundaries"]:
                raise ValueError(
                    f"`train_dataset` has no place where a latent may stand ({counts}); check `action_format`, or set "
                    "`e_steps=0` for next-token prediction."
                )
        return segmented

    def _plan(self, args: RA3Config, train_dataset: Dataset | IterableDataset | None) -> None:
        updates = None
        if isinstance(train_dataset, Dataset):
            per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
            updates = math.ceil(len(train_dataset) / per_update)
        elif train_dataset is None:
            updates = 1  # evaluation only
        self.schedule = plan_schedule(
            args.em_iterations, args.e_steps, args.m_steps, args.max_steps, args.num_train_epochs, updates
        )
        args.max_steps = self.schedule.total

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Each phase has its own learning rate and schedule, by transformers' own functions of the step."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        args, schedule = self.args, self.schedule
        dummy = torch.optim.SGD([torch.zeros(1)], lr=1.0)

        def factor_of(kind: str, length: int) -> Callable[[int], float]:
            warmup = args.get_warmup_steps(length)
            return get_scheduler(kind, dummy, warmup, max(length, 1), args.lr_scheduler_kwargs).lr_lambdas[0]

        e_factor = factor_of(args.e_lr_scheduler_type, schedule.e_steps)
        m_factor = factor_of(args.lr_scheduler_type, schedule.m_steps)
        ratio = args.e_learning_rate / args.learning_rate if args.learning_rate else 0.0

        def factor(step: int) -> float:
            phase = schedule.phase_at(step)
            return ratio * e_factor(phase.step) if phase.kind == "E" else m_factor(phase.step)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- the loop: E-step, annotate, M-step ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The documents of one update, rolled out (E) or annotated (M), and the number its losses are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        phase = self.schedule.phase_at(self.state.global_step)
        if phase.step == 0:
            self._begin(phase)
        noise = NoiseKey(self.args.seed, phase.number, self.state.global_step)
        prepare = self._prepare_e if phase.kind == "E" else self._prepare_m
        with torch.no_grad(), self._evaluating(), self.compute_loss_context_manager():
            batches = [prepare(batch["documents"], noise) for batch in batches]
        if phase.kind == "E":
            self._observe([r for batch in batches for r in batch["rollouts"]])
        count = torch.tensor(float(sum(batch["count"] for batch in batches)), device=device)
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1.0)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        model.train()
        through = model if model is not self.backbone.model else None
        scale = self.accelerator.num_processes  # processes average their gradients, the count is over all of them
        begin = time.perf_counter()

        def backward(loss: torch.Tensor, last: bool) -> None:
            if last:
                self.accelerator.backward(loss * scale)
            else:
                with self.accelerator.no_sync(model):
                    self.accelerator.backward(loss * scale)

        with self.compute_loss_context_manager():
            if "rollouts" in inputs:
                args = self.args
                loss, parts = estep_backward(
                    self.engine, inputs["rollouts"], args, float(num_items_in_batch), self.gate_hold.holds,
                    self.frozen.get("start"), backward, through,
                )  # fmt: skip
                loss = torch.tensor(loss, device=args.device)
                for name, value in parts.items():
                    self.metrics.add(f"estep/loss_{name}", value)
            else:
                loss, parts = mstep_loss(self.backbone, inputs["rows"], float(num_items_in_batch), through)
                backward(loss, True)
                loss = loss.detach()
                code, latent = ((float(parts[f"{k}_sum"]), float(parts[f"{k}_count"])) for k in ("code", "latent"))
                both = (code[0] + latent[0], code[1] + latent[1])
                for name, (total, count) in {"loss": both, "code_loss": code, "latent_loss": latent}.items():
                    self.metrics.add(f"mstep/{name}", total / max(count, 1), count)
        self.metrics.add("seconds/update", time.perf_counter() - begin)
        return loss * scale if scale > 1 else loss

    def _begin(self, phase: Phase) -> None:
        """A phase starts: take the snapshots it needs, forget optimizer state, measure the probe."""
        args = self.args
        if args.reset_optimizer and self.state.global_step > 0:
            self.optimizer.state.clear()
        if phase.kind == "E":
            if args.kl_coef or self.gate_hold.holds:
                self.frozen["start"] = FrozenWeights(self.backbone.model)
            if args.reward_model == "frozen":
                self.frozen["reward"] = FrozenWeights(self.backbone.model)
            self.probe_baseline = self._probe_loss()
        elif args.uses_latents:
            if phase.iteration + 1 == self.schedule.iterations:  # no E-phase comes that would need these
                self.frozen.clear()
            self.frozen["annotator"] = FrozenWeights(self.backbone.model)
            if args.e_steps and self.gate_hold.holds:
                logger.warning(self.gate_hold.message)

    def _prepare_e(self, documents: list[Document], noise: NoiseKey) -> dict[str, Any]:
        begin, scored = time.perf_counter(), self.engine.score_seconds
        rollouts = roll_out(self.engine, documents, self.args, noise, self.frozen.get("reward"))
        scored = self.engine.score_seconds - scored
        self.metrics.add("seconds/score", scored)
        self.metrics.add("seconds/rollout", time.perf_counter() - begin - scored)
        self._count_tokens(sum(len(d.input_ids) for d in documents))
        return {"rollouts": rollouts, "count": sum(len(r.group.sites) for r in rollouts)}

    def _observe(self, rollouts: list[Rollout]) -> None:
        """Metrics, gate and alarms of one update's rollouts, all micro-batches together."""
        named = rollout_metrics(rollouts, self._decode)
        for name, value in named.items():
            self.metrics.add(f"estep/{name}", value)
        if named:
            held = self.gate_hold.holds
            self.gate_hold.update(named["gate_weighted_gain"])
            if held and not self.gate_hold.holds:
                logger.info("update %d: latents pay where the model thinks; P(think) is free", self.state.global_step)
            self.metrics.add("estep/gate_held", float(self.gate_hold.holds))
            self._alarm(named)
        if self.is_world_process_zero():
            self.latent_log.add(self.state.global_step, rollouts)
        self._watch_code_loss()

    def _prepare_m(self, documents: list[Document], noise: NoiseKey) -> dict[str, Any]:
        examples = [splice(document, {}) for document in documents]
        if self.args.uses_latents:
            begin = time.perf_counter()
            with self.frozen["annotator"].applied():
                examples = [annotate(self.engine, document, self.args, noise) for document in documents]
            self.metrics.add("seconds/annotate", time.perf_counter() - begin)
            self._log_annotation(examples)
        rows = pack(examples, self.args.max_length, self.args.packing)
        self._count_tokens(rows.num_tokens)
        return {"rows": rows, "count": rows.num_tokens}

    def _log_annotation(self, examples: list[AnnotatedExample]) -> None:
        sites = sum(len(e.document.sites) for e in examples)
        if sites:
            self.metrics.add("mstep/annotated_rate", sum(len(e.placed) for e in examples) / sites, sites)
        for e in examples:
            ids = e.input_ids[e.document.context :]
            again = self.processing_class(self._decode(ids), add_special_tokens=False)["input_ids"]
            self.metrics.add("mstep/retokenized_differs", float(tuple(again) != ids))

    def _decode(self, ids) -> str:
        return self.processing_class.decode(list(ids), clean_up_tokenization_spaces=False)

    def _count_tokens(self, tokens: int) -> None:
        self.state.num_input_tokens_seen += int(tokens) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not self.state.log_history:  # where every text went, once
                logs |= {f"data/{name}": float(value) for name, value in self.counts.get("train", {}).items()}
            logs |= self.metrics.pop() | {"tokens": self.state.num_input_tokens_seen}
            logs["phase"] = float(self.schedule.phase_at(max(self.state.global_step - 1, 0)).number)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: what a rollout costs is not 6 N tokens."""
        return 0

    # ---- evaluation and saving ----

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Metrics of `finish_metrics`; all in nats per code token but for rates, lengths and gains."""
        names, totals, seen = [], None, 0
        with torch.no_grad(), self._evaluating(), self.compute_loss_context_manager():
            for batch in dataloader:
                sums = evaluate_documents(self.engine, batch["documents"], self.args)
                names, values = list(sums), torch.tensor(list(sums.values()), dtype=torch.float64)
                totals = values if totals is None else totals + values
                seen += len(batch["documents"])
        totals = self.accelerator.reduce(totals.to(self.args.device).float(), "sum").tolist()
        metrics = finish_metrics(dict(zip(names, totals, strict=True)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if "eval_ce" in metrics:
            self.evaluations.append({**metrics, "step": self.state.global_step})
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=seen)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, **kwargs) -> None:
        """Writes `README.md` into `output_dir`; extra arguments are those of `Trainer.create_model_card`."""
        if self.is_world_process_zero():
            logged = [entry for entry in self.state.log_history if "eval_ce" in entry]
            evaluations = self.evaluations or logged  # a resumed run has only those of the log
            write_model_card(self.args, evaluations, self.backbone, self.counts, model_name, dataset_name, kwargs)
