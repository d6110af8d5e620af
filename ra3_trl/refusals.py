"""What TRL, transformers and our former releases have and RA3 has not: why, and what to set instead.

One table for Python, YAML and the command line, and one for the trainer's arguments. A value that says what RA3 does
anyway is taken: `None` always is, and what a switch is when it is off. docs/from_trl.md has the rest of the story.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from .kinds import shown


@dataclass(frozen=True)
class Refusal:
    """Why a name is `not_here` and what to set `instead`; `taken`: values that say what RA3 does anyway. Of a name
    that RA3 has, `refused` are the values that it does not take."""

    not_here: str
    instead: str = "leave it out"
    taken: tuple[Any, ...] = (None, False)
    refused: tuple[Any, ...] = field(default=())

    def refuses(self, value: Any) -> bool:
        """Whether `value` can't be taken. Equal numbers of another type are other values: 0 is not `False`."""
        among = self.refused or self.taken
        return any(type(value) is type(other) and value == other for other in among) is bool(self.refused)

    def message(self, name: str, value: Any) -> str:
        """What to say to who set `name` to `value`."""
        return f"`{name}` is {shown(value)}, which RA3 does not take: {self.not_here}; {self.instead}."


_GRAPHS = "forwards change their length at each update and carry branches, so graphs would be built anew"
_LIGER = "liger replaces layers when training begins, after the engines were checked on the model"
_KERNELS = 'set `model_init_kwargs={"use_kernels": True}`, whose kernels are there when the model is loaded'
_NO_CLIP = "there is one update per rollout, so the ratio is 1 and nothing is clipped"
_LATENTS = "latents branch off a document's cache and are not drawn by `generate`"
_OUTSIDE = "an engine outside would have to score the expert's lines under each latent too"
_ENTROPY = "there is no entropy bonus"
_METRICS = "no logits are kept; held-out numbers are those of `evaluate()`"
_GONE = "it went with an older release"

SETTINGS = {
    # of SFTConfig
    "activation_offloading": Refusal(
        "activations are not moved to the CPU",
        "set `activation_checkpointing=True`, or lower `max_branch_tokens` or the batch size, to bound memory",
    ),
    "eval_packing": Refusal("held-out numbers are of documents, not of rows"),
    "packing_strategy": Refusal(
        "a latent needs its whole line, and documents cut anywhere would lose theirs",
        "use 'bfd_split', which is what RA3 does, or leave it out",
        (None, "bfd", "bfd_split"),
    ),
    "pad_to_multiple_of": Refusal("forwards change their length at each update", taken=(None, "auto")),
    "padding_free": Refusal(
        "rows without padding are what `packing` makes, on any attention", "set `packing=True`, which is the default"
    ),
    "truncation_mode": Refusal(
        "nothing is truncated: a longer text is cut between lines, and each of its chunks is trained",
        "cut the texts yourself where their end alone should be trained",
        (None, "keep_start"),
    ),
    # of GRPOConfig
    "num_generations": Refusal("latents are drawn at each boundary", "set `num_latents`", (None,)),
    "num_generations_eval": Refusal("latents are drawn at each boundary", "set `eval_num_latents`", (None,)),
    "max_completion_length": Refusal("a completion is a latent", "set `max_latent_length`", (None,)),
    "min_p": Refusal(_LATENTS, "set `top_p` or `top_k`"),
    "repetition_penalty": Refusal(_LATENTS, "raise `temperature` for latents that differ more", (None, 1.0)),
    "generation_kwargs": Refusal(_LATENTS, "set `temperature`, `top_k`, `top_p` and `max_latent_length`"),
    "cache_implementation": Refusal(_LATENTS, "set `engine`"),
    "chat_template_kwargs": Refusal(
        "a template's arguments may differ from row to row", "give the data a column `chat_template_kwargs`"
    ),
    "max_tool_calling_iterations": Refusal("a latent calls no tools"),
    "log_multimodal": Refusal("there are no images"),
    "use_vllm": Refusal(_OUTSIDE),
    "vllm_*": Refusal(_OUTSIDE),
    "use_transformers_*": Refusal(_OUTSIDE),
    "transformers_continuous_batching_config": Refusal(_OUTSIDE),
    "generation_batch_size": Refusal("a rollout is of the documents of its update"),
    "steps_per_generation": Refusal("a rollout is of the documents of its update"),
    "num_iterations": Refusal("there is one update per rollout", taken=(None, 1)),
    "ds3_gather_for_generation": Refusal(
        "whole weights are gathered once for the rollouts of an update", taken=(None, True)
    ),
    "beta": Refusal("the KL to the start has another name", "set `kl_coef`", (None,)),
    "sync_ref_model": Refusal("each E-phase has its own start as reference", "set `em_iterations`"),
    "ref_model_mixup_alpha": Refusal("each E-phase has its own start as reference", "set `em_iterations`"),
    "ref_model_sync_steps": Refusal("each E-phase has its own start as reference", "set `em_iterations`"),
    "use_bias_correction_kl": Refusal("latents are drawn by the weights that learn from them"),
    "off_policy_mask_threshold": Refusal("latents are drawn by the weights that learn from them"),
    "epsilon": Refusal(_NO_CLIP, taken=(None,)),
    "epsilon_high": Refusal(_NO_CLIP, taken=(None,)),
    "delta": Refusal(_NO_CLIP, taken=(None,)),
    "importance_sampling_level": Refusal(_NO_CLIP, taken=(None,)),
    "sapo_*": Refusal("the E-phase's loss is `objective`", taken=(None,)),
    "vespo_*": Refusal("the E-phase's loss is `objective`", taken=(None,)),
    "scale_rewards": Refusal("rewards are nats and stay so", taken=(None, False, "none")),
    "multi_objective_aggregation": Refusal(
        "rewards are summed with weights", "set `reward_weights`", (None, "sum_then_normalize")
    ),
    "mask_truncated_completions": Refusal(
        "a latent cut at `max_latent_length` is trained without the stop that it never drew"
    ),
    "top_entropy_quantile": Refusal(_ENTROPY, taken=(None, 1.0)),
    "entropy_*": Refusal(_ENTROPY, taken=(None, 0.0)),
    "use_adaptive_entropy": Refusal(_ENTROPY),
    "cast_lm_head_to_fp32": Refusal("log-probs are computed in float32 in any case"),
    "log_completions": Refusal("latents are logged every so many updates", "set `log_latents_steps`", (None,)),
    "num_completions_to_print": Refusal(
        "the eight latents with the largest gains are printed; all are in `_latents/*.parquet`"
    ),
    "log_unique_prompts": Refusal(
        "the eight latents with the largest gains are printed; all are in `_latents/*.parquet`"
    ),
    "log_completions_hub_repo": Refusal("tables of latents hold lines of your data and are never pushed"),
    # of TrainingArguments, and what these were called
    "torch_compile": Refusal(_GRAPHS),
    "torch_compile_backend": Refusal(_GRAPHS),
    "torch_compile_mode": Refusal(_GRAPHS),
    "use_liger_kernel": Refusal(_LIGER, _KERNELS),
    "liger_kernel_config": Refusal(_LIGER, _KERNELS),
    "label_smoothing_factor": Refusal(
        "rewards and bounds are likelihoods of the text as it is", taken=(None, False, 0, 0.0)
    ),
    "neftune_noise_alpha": Refusal(
        "latents would be trained under a noise they were not sampled with", taken=(None, False, 0, 0.0)
    ),
    "auto_find_batch_size": Refusal(
        "an attempt that runs out of memory has changed weights and gate, and the plan is of its batch",
        "lower `per_device_train_batch_size` and raise `gradient_accumulation_steps`, which gives the same updates, "
        "or lower `max_branch_tokens`",
    ),
    "enable_jit_checkpoint": Refusal(
        "a SIGTERM saves after the update in any case; its handler would swallow every later one"
    ),
    "train_sampling_strategy": Refusal(
        "documents of one length would share their boundaries' number; rows are packed instead",
        refused=("group_by_length",),
    ),
    "max_seq_length": Refusal("it has another name", "set `max_length`", (None,)),
    "evaluation_strategy": Refusal("it has another name", "set `eval_strategy`", (None,)),
    "no_cuda": Refusal("it has another name", "set `use_cpu`", (None,)),
    "group_by_length": Refusal("documents of one length would share their boundaries' number"),
    # of ours
    "annotation_think_prob": Refusal(
        _GONE, "set `prior_alpha` to 1 less it; none, with `exploration=0`, is the model's own gate"
    ),
    "latent_weight": Refusal(_GONE, 'set `exploration`, to 0 for what "gate" was'),
    "baseline": Refusal(_GONE, "leave it out; latents are compared with each other"),
    "gate_coef": Refusal(_GONE, "leave it out; it was 1"),
    "gate_kl_coef": Refusal(_GONE, "leave it out; it was 0"),
    "entropy_coef": Refusal(_GONE, "leave it out; raise `temperature` for latents that differ more"),
    "head_learning_rate": Refusal(_GONE, "leave it out; it was 1e-3"),
}

ARGUMENTS = {  # of trainers
    "data_collator": Refusal("a batch holds documents with their boundaries", "use `formatting_func` for other texts"),
    "compute_loss_func": Refusal("both losses are the method", "set `reward_funcs` for the E-phase"),
    "compute_metrics": Refusal(_METRICS, "take them in a callback's `on_evaluate`"),
    "preprocess_logits_for_metrics": Refusal(_METRICS, "leave it out"),
    "model_init": Refusal("a run begins with the weights it is given", "pass `model`"),
    "tokenizer": Refusal("it has another name", "pass `processing_class`"),
    "reward_processing_classes": Refusal("rewards are functions", "pass `reward_funcs`"),
    "tools": Refusal("a latent calls no tools"),
    "rollout_func": Refusal("latents are drawn by the engine", "set `args.engine`"),
    "environment_factory": Refusal("there is no environment beside the text", "pass `reward_funcs`"),
    "ref_model": Refusal("the reference is the E-phase's own start", "set `args.kl_coef`"),
}


def refuse_arguments(arguments: dict[str, Any], settings: Iterable[str], ours: Iterable[str]) -> None:
    """Refuses what a trainer does not take, but for `None`; `settings` and `ours` are names that may have been meant.

    Raises:
        `ValueError`: with the reason and what to pass instead.
    """
    for name, value in arguments.items():
        entry = find(ARGUMENTS, name)
        if entry is None and name in settings:
            raise ValueError(f"`{name}` is a setting and no argument; set it in `args`, as `RA3Config({name}=...)`.")
        if entry is None:
            raise ValueError(f"`{name}` is no argument of a trainer; {near(name, ours) or 'leave it out.'}")
        if entry.refuses(value):
            raise ValueError(entry.message(name, value))


def find(table: dict[str, Refusal], name: str) -> Refusal | None:
    """The entry of `name`, by itself or by a pattern such as `vllm_*`."""
    return table.get(name) or next((entry for pattern, entry in table.items() if fnmatch(name, pattern)), None)


def keep_ours(settings: dict[str, Any], ours: Iterable[str], owner: str) -> dict[str, Any]:
    """Those of `settings` that RA3 has (`ours`); what the table knows is left out where its value is taken.

    Raises:
        `ValueError`: for a value or a name that is not taken, with the reason and what to set instead.
    """
    ours, kept = set(ours), {}
    for name, value in settings.items():
        entry = find(SETTINGS, name)
        without_padding = name == "padding_free" and settings.get("packing", True) is True
        if entry is not None and entry.refuses(value) and not without_padding:
            raise ValueError(entry.message(name, value))
        if name in ours:
            kept[name] = value
        elif entry is None:
            raise ValueError(f"`{name}` is no setting of `{owner}`; {near(name, ours) or f'see `{owner}`.'}")
    return kept


def near(name: str, names: Iterable[str], form: str = "`{}`") -> str:
    """`did you mean ...` of a name that is hardly misspelled; empty where none is so near."""
    meant = difflib.get_close_matches(name, names, 1, cutoff=0.85)
    return f"did you mean {form.format(meant[0])}?" if meant else ""
