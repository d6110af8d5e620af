"""`RA3MidTrainer`: the façade that puts the rooms together.

RA3 (https://huggingface.co/papers/2509.25810) as an EM loop on `transformers.Trainer`: an update belongs to an E-phase
or an M-phase by its number alone. E: sample latents at the boundaries of the batch, reward them by the expert's next
lines, one policy-gradient update. M: annotate the batch with the weights frozen at the phase's start, one next-token
update. Where we deviate from the paper, or it is silent, docs/design.md says so.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .config import RA3Config
from .em import (
    GateHold,
    MetricSums,
    RewardFunc,
    RewardPlugIns,
    estep_backward,
    evaluate_documents,
    finish_metrics,
    make_proposals,
    mstep_loss,
)
from .em.annotate import MARKUP
from .em.checkpoint import CheckpointMixin
from .em.head import make_learner
from .em.phases import PhaseMixin
from .em.preempt import PreemptionCallback
from .em.stream import StreamMixin, own_share
from .em.watch import WatchMixin
from .em.window import WindowMixin
from .generation import AutoModelForCausalLMWithAbstractionHead
from .hub import HubMixin
from .models import (
    BaseWeights,
    FrozenWeights,
    add_tags,
    check_trainable,
    check_vocabulary,
    context_length,
    disable_dropout,
    end_ids,
    load_head,
    load_model,
    load_tokenizer,
    place_of,
    state_width,
)
from .records import Document
from .report import LatentLog, PhaseProgressCallback, evaluated_batch
from .rollout import Backbone, SamplingParams, build_engine
from .segmentation import (
    FEATURES,
    ActionFormat,
    Segmenter,
    build_token_table,
    count_documents,
    find_format,
    row_to_document,
    segment_dataset,
)
from .trackers import check_best_metric, check_trackers


logger = get_logger(__name__)  # of the main process


def _collate(rows: list[dict[str, Any]]) -> dict[str, list[Document]]:
    return {"documents": [row_to_document(row) for row in rows]}


class RA3MidTrainer(CheckpointMixin, WindowMixin, WatchMixin, PhaseMixin, StreamMixin, HubMixin, Trainer):
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
            A folder, a Hub id (loaded with `args.model_init_kwargs`, float32 unless `dtype` is given) or a model; or
            [`AutoModelForCausalLMWithAbstractionHead`]. The abstraction head that a checkpoint has is trained on.
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
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Further terms of the E-step's reward, called by keyword as those of TRL's `GRPOTrainer`; see
            [`~ra3_trl.em.RewardPlugIns`]. Weighted by `args.reward_weights`, beside the log-likelihood, whose weight
            is `args.likelihood_weight`.
        proposal_func (`Callable[[str, str], str]`, *optional*):
            What `"function"` in `args.proposal` stands for: makes a prompt, behind which the latent begins, of the
            code so far and the next lines, which begin with what closes a latent (a newline, on Python). A run that
            is resumed knows it by its name only.

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
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        proposal_func: Callable[[str, str], str] | None = None,
    ):
        head = None
        if isinstance(model, AutoModelForCausalLMWithAbstractionHead):
            processing_class = processing_class or model.tokenizer
            model, head = model.pretrained_model, model.abstraction_head
        name = model if isinstance(model, str) else model.config._name_or_path
        args = copy(args) if args else RA3Config(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-RA3")
        check_trackers(args.report_to)
        check_best_metric(args.metric_for_best_model, eval_dataset if isinstance(eval_dataset, dict) else ())
        action_format = find_format(args.action_format)
        tokenizer = processing_class or load_tokenizer(name, args.model_init_kwargs)
        if isinstance(model, str) and args.abstraction_head:
            head = load_head(name, **place_of(args.model_init_kwargs))
        model = self._load(model, tokenizer, args, peft_config, action_format)
        if train_dataset is not None:
            check_trainable(model)
        self.ra3_args = args
        self.backbone = Backbone(model, args.router_aux_loss_coef)
        self.engine = self._build_engine(args, tokenizer, action_format)
        longest = self._chunk_tokens(args, args.uses_latents)
        self.segmenter = Segmenter(tokenizer, action_format, longest, args.existing_comments)
        self.proposals = make_proposals(
            args, tokenizer, context_length(self.backbone.causal_lm), proposal_func, train_dataset is not None
        )
        self.counts: dict[str, dict[str, int]] = {}
        self._formatting_func = formatting_func
        self.plug_ins = self._plug_ins(args, tokenizer, reward_funcs)
        self.learner = make_learner(args, head, state_width(self.backbone.causal_lm))
        self.source_dataset = train_dataset  # as it was given: its licences, and what is annotated for the Hub
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
        # The loss is divided by the boundaries (E) or tokens (M) of the whole window, see get_batch_samples.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        self.model.add_model_tags(["ra3", "trl"])
        self._begin_anew()
        self.evaluations: list[dict[str, float]] = []  # `train()` empties the state's log
        self.latent_log = LatentLog(
            Path(args.output_dir) / "_latents", tokenizer, args.log_latents_steps, action_format.think
        )
        self.resume_hint = "`trainer.train(resume_from_checkpoint=True)`"
        self.preemption = PreemptionCallback()
        self.add_callback(self.preemption)
        self.add_callback(PhaseProgressCallback(self.schedule, self.callback_handler))

    # ---- set-up ----

    @staticmethod
    def _load(model, tokenizer, args: RA3Config, peft_config: PeftConfig | None, action_format: ActionFormat):
        """The model with the format's tags, wrapped in its adapter and checked; the tokenizer gets the tags too."""
        if action_format.tags:
            model = load_model(model, args.model_init_kwargs, None)
            add_tags(model, tokenizer, action_format.tags)
            if peft_config is not None:
                model = load_model(model, None, peft_config)
                add_tags(model, tokenizer, action_format.tags)  # refuses an adapter that does not train them
        else:
            model = load_model(model, args.model_init_kwargs, peft_config)
        check_vocabulary(model, tokenizer)
        if args.reward_model == "base":
            BaseWeights(model)  # refuses a model without adapter
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if args.disable_dropout:
            disable_dropout(model)
        return model

    def _build_engine(self, args: RA3Config, tokenizer: PreTrainedTokenizerBase, action_format: ActionFormat):
        eos = end_ids(self.backbone.causal_lm)
        self.table = build_token_table(tokenizer, self.backbone.vocab_size, eos, action_format)
        params = SamplingParams(args.max_latent_length, args.temperature, args.top_k, args.top_p)
        with self.backbone.gathered():
            return build_engine(args.engine, self.backbone, self.table, params, args.max_branch_tokens)

    @staticmethod
    def _plug_ins(args: RA3Config, tokenizer: PreTrainedTokenizerBase, funcs) -> RewardPlugIns | None:
        funcs = [] if funcs is None else list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
        if not funcs and args.likelihood_weight == 1 and args.reward_weights is None:
            return None
        return RewardPlugIns(funcs, args.reward_weights, args.likelihood_weight, tokenizer, args.horizon)

    def _chunk_tokens(self, args: RA3Config, latents: bool) -> int:
        """Longest chunk of a text: `max_length`, less room for latents (a fifth) where there will be any. Evaluation
        always draws some, so its documents are the same for next-token prediction."""
        context = context_length(self.backbone.causal_lm) or args.max_length
        if args.max_length > context:
            raise ValueError(
                f"`max_length` is {args.max_length}, but the model's context holds {context} tokens; lower it."
            )
        latent = args.max_latent_length + MARKUP
        room = max(args.max_length // 5, latent) if latents else 0
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
        if isinstance(dataset, IterableDataset):
            dataset = own_share(dataset, args.process_index, args.world_size)
        segmenter = self.segmenter
        if split != "train" and not args.uses_latents:
            longest = self._chunk_tokens(args, True)
            segmenter = Segmenter(segmenter.tokenizer, segmenter.format, longest, segmenter.existing_comments)
        segmented = segment_dataset(
            dataset, segmenter, args.dataset_text_field, formatting_func, args.dataset_num_proc
        )
        if isinstance(segmented, Dataset):
            name = split if split == "train" or split.startswith("eval") else f"eval_{split}"
            self.counts[name] = counts = count_documents(dataset, segmented)
            logger.info("%s: %s", name, ", ".join(f"{value:,} {key}" for key, value in counts.items() if value))
            if not len(segmented):
                raise ValueError(
                    f"`{name}_dataset` has {len(dataset)} rows and all are empty texts; give it some code."
                )
            if split == "train" and args.e_steps and not counts["boundaries"]:
                raise ValueError(
                    f"`train_dataset` has no place where a latent may stand ({counts}); check `action_format`, or set "
                    "`e_steps=0` for next-token prediction."
                )
        return segmented

    def _begin_anew(self) -> None:
        """State of the EM loop that a checkpoint holds."""
        # What is held is the tokens' gate; the head's opens again by itself.
        hold = self.args.gate_hold if self.args.gate == "token" else "never"
        self.gate_hold = GateHold(hold, self.args.penalty)
        self.metrics = MetricSums()
        self.frozen: dict[str, FrozenWeights] = {}
        self.probe_baseline: float | None = None

    # ---- the loop; the documents of an update come from em/window.py ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As `Trainer.train`. A SIGTERM ends it with `SystemExit(143)` after the next update, which is saved.

        Raises:
            `ValueError`: for a checkpoint that this run can't go on from exactly; nothing is written then.
        """
        self.check_resumable(resume_from_checkpoint)
        if not resume_from_checkpoint:
            self._begin_anew()
        with self.preemption.listening(self.args):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.preemption.asked:
            logger.warning("Stopped by SIGTERM after update %d, which is saved. Go on with %s.",
                           self.state.global_step, self.resume_hint)  # fmt: skip
            self.accelerator.wait_for_everyone()  # the first to leave has a launcher end the others
            raise SystemExit(128 + signal.SIGTERM)
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        model.train()
        through = model if model is not self.backbone.model else None
        scale = self.accelerator.num_processes  # processes average their gradients, the count is over all of them
        options = {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        begin = time.perf_counter()

        def backward(loss: torch.Tensor) -> None:
            self.accelerator.backward(loss * scale, **options)

        with self.compute_loss_context_manager():
            if "rollouts" in inputs:
                loss, parts = estep_backward(
                    self.engine, inputs["rollouts"], self.args, float(num_items_in_batch), self._holds_gate,
                    backward, partial(self._syncing, model), through, inputs["chunks"],
                )  # fmt: skip
                loss = torch.tensor(loss, device=self.args.device)
                share = sum(len(r.group.boundaries) for r in inputs["rollouts"]) / float(num_items_in_batch)
                for name, value in parts.items():
                    self.metrics.add_total(f"estep/loss_{name}", value, share)
            elif inputs["rows"] is None:
                loss = self.backbone.idle(through)
                backward(loss)
            else:
                loss, parts, seen = mstep_loss(self.backbone, inputs["rows"], float(num_items_in_batch), through)
                backward(loss)
                if self.learner is not None:
                    self.learner.noted.append(seen)
                code, latent = ((float(parts[f"{k}_sum"]), float(parts[f"{k}_count"])) for k in ("code", "latent"))
                both = (code[0] + latent[0], code[1] + latent[1])
                for name, (total, count) in {"loss": both, "code_loss": code, "latent_loss": latent}.items():
                    self.metrics.add_total(f"mstep/{name}", total, count)
        if self.learner is not None and "rollouts" not in inputs and inputs.get("last"):
            self._learn(gather_object(self.learner.noted))
            self.learner.noted = []
        self.metrics.add("seconds/update", time.perf_counter() - begin)
        return loss.detach() * scale

    @contextmanager
    def _syncing(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Gradients of several backward passes add up; processes exchange them in the last one."""
        if last:
            yield
            return
        before = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = False  # DeepSpeed would step after each backward pass
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            self.accelerator.sync_gradients = before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not self.state.log_history:  # where every text went, once
                logs |= {f"data/{name}": float(value) for name, value in self.counts.get("train", {}).items()}
            together = MetricSums()
            for sums in gather_object([self.metrics.sums]):
                together.add_sums(sums)
            self.metrics.pop()
            logs |= together.averages() | {"tokens": self.state.num_input_tokens_seen}
            logs["phase"] = float(self.schedule.phase_at(max(self.state.global_step - 1, 0)).number)
        super().log(logs, start_time)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """Mixed precision for the engines, which call decoder and head apart; accelerate wraps `model.forward`."""
        return self.accelerator.autocast()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: what a rollout costs is not 6 N tokens."""
        return 0

    # ---- evaluation and saving ----

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """As `Trainer.evaluate`; `eval_dataset` is text as the trainer takes it, a data set or a dict of them."""
        if isinstance(eval_dataset, (Dataset, IterableDataset)) and set(eval_dataset.features or ()) != set(FEATURES):
            eval_dataset = self._segment(eval_dataset, metric_key_prefix, self._formatting_func)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Metrics of `finish_metrics`; all in nats per code token but for rates, lengths and gains."""
        sums, seen = MetricSums(), 0
        self.callback_handler.eval_dataloader = dataloader
        with torch.no_grad(), self._evaluating(), self.compute_loss_context_manager(), self.backbone.gathered():
            for batch in dataloader:
                found = evaluate_documents(self.engine, batch["documents"], self.args, self.learner, self.proposals)
                sums.add_sums({name: [value, 1] for name, value in found.items()})
                seen += len(batch["documents"])
                self.control = evaluated_batch(self.callback_handler, self.args, self.state, self.control)
        totals: Counter[str] = Counter()
        for other in gather_object([sums.sums]):
            totals.update({name: total for name, (total, _) in other.items()})
        metrics = finish_metrics(totals)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if metric_key_prefix.startswith("eval"):
            self.evaluations.append({**metrics, "step": self.state.global_step})
        seen = sum(gather_object([seen]))
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=seen)
