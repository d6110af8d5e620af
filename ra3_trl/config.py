"""`RA3Config`: `TrainingArguments` plus the settings of the EM loop, grouped by phase.

What a field means is said once, in its `help`; its bounds stand beside it, and one loop checks them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from os import PathLike, fspath
from typing import Any, ClassVar

from transformers import SchedulerType

from .config_fields import (
    FORMER,
    MOST_UPDATES,
    blaming,
    check_fields,
    field_docs,
    own_fields,
    scheduler_kwargs,
    setting,
)
from .config_file import RA3_CONFIG, read_experimental, read_settings, settings_of, write_settings
from .files import one_line
from .refusals import keep_ours
from .versions import TrainingArguments


class _Settings(type):
    """Makes a configuration of settings by name that RA3 has; others are refused by one table, see `refusals.py`."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:
        names = [entry.name for entry in fields(cls) if entry.init]  # type: ignore[arg-type]
        if len(values) > len(names) or (twice := set(names[: len(values)]) & set(settings)):
            wrong = f"`{twice.pop()}` twice" if len(values) <= len(names) else f"{len(values)} values"
            raise ValueError(f"`{cls.__name__}` is given {wrong}; give each setting once, by its name.")
        return super().__call__(**keep_ours(dict(zip(names, values, strict=False)) | settings, names, cls.__name__))


@dataclass
class RA3Config(TrainingArguments, metaclass=_Settings):
    r"""
    Settings of [`RA3MidTrainer`]: those of [`~transformers.TrainingArguments`] and what follows. Defaults of the
    method are our choice where the paper (https://huggingface.co/papers/2509.25810) is silent, see docs/design.md.

    Raises:
        `ValueError`: for a bad value, naming field, value and cure.
    """

    trainer: ClassVar[str] = "RA3MidTrainer"  # whose settings they are
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "dataset_kwargs"]

    # Values that differ from TrainingArguments
    learning_rate: float = setting("Peak learning rate of the M-phase.", 2e-5)
    logging_steps: float = setting("Updates between log lines.", 1)
    logging_nan_inf_filter: bool = setting("Hide losses that are not finite from the log.", False)
    dataloader_pin_memory: bool = setting("Pin batches in memory; of no use here, they hold documents.", False)

    # Model
    model_init_kwargs: dict[str, Any] | str | None = setting("Keyword arguments of `from_pretrained`, as JSON.", None)
    trust_remote_code: bool = setting("Run code that comes with the model's files or its tokenizer's.", False)

    # Data
    max_length: int | None = setting(
        "Longest row in tokens, latents included. Longer texts are cut between lines; no token is lost. None is the "
        "model's context, and rows are not packed.", 1024, 16, 1 << 24
    )  # fmt: skip
    dataset_text_field: str = setting("Column that holds the text.", "text")
    dataset_kwargs: dict[str, Any] | str | None = setting(
        "As in TRL: `skip_prepare_dataset` says that rows are tokens (`input_ids`, `labels`), which is seen anyway.",
        None,
    )
    completion_only_loss: bool | None = setting(
        "Train on the completion only. Left out: where the data has `prompt` and `completion`.", None
    )
    assistant_only_loss: bool | None = setting(
        "Train on the assistant's turns only. Left out: of `messages`, but not of `prompt` and `completion`.", None
    )
    chat_template_path: str | None = setting(
        "A Jinja file, or a folder or Hub id of a tokenizer, whose chat template (and tokens) to take.", None
    )
    eos_token: str | None = setting("End of text, of the tokenizer's tokens; its own if left out.", None)
    pad_token: str | None = setting("Padding, of the tokenizer's tokens; its own if left out.", None)
    shuffle_dataset: bool = setting("Shuffle the training data before anything is done with it.", False)
    dataset_num_proc: int | None = setting("Processes for cutting the texts.", None, 1, 4096)
    action_format: str = setting(
        "How texts are cut into actions: python, slashes (C, Java, JavaScript, Rust, ...), prose, markdown, tags, "
        "python_tags, or one of your own in `ra3_trl.segmentation.ACTION_FORMATS`.", "python"
    )  # fmt: skip
    existing_comments: str = setting("The expert's own comment lines.", "keep", choices=("keep", "strip"))
    disable_dropout: bool | None = setting(
        "Set all dropout to 0. Left out: in E-phases only, where what is trained must be the policy that sampled; "
        "M-phases have it as in SFTTrainer, `lora_dropout` too.", None
    )  # fmt: skip

    # Schedule
    em_iterations: int = setting("Times that E-phase and M-phase alternate.", 1, 1, MOST_UPDATES)
    e_steps: int = setting("Updates of an E-phase; 0 is next-token prediction.", 20, 0, MOST_UPDATES)
    m_steps: int = setting(
        "Updates of an M-phase; -1: `num_train_epochs` passes over the data (or what `max_steps` leaves), shared out "
        "among the iterations.", -1, -1, MOST_UPDATES
    )  # fmt: skip
    e_learning_rate: float = setting(
        "Peak learning rate of the E-phase; `learning_rate` is that of the M-phase.", 2e-5, 0, 100
    )
    e_lr_scheduler_type: str = setting("Learning-rate schedule within an E-phase.", "constant")
    reset_optimizer: bool = setting("Forget optimizer state when the phase changes.", True)

    # Rollout
    num_latents: int = setting("Latents at each boundary (G).", 8, 1, 4096)
    max_latent_length: int = setting("Most tokens of a latent.", 12, 1, 1 << 16)
    temperature: float = setting("Sampling temperature of latents.", 1.0, 0, 1000, above=True)
    top_k: int = setting("Keep the k likeliest symbols; 0 is off.", 0, 0, 1 << 24)
    top_p: float = setting("Keep the likeliest symbols up to this mass; 1 is off.", 1.0, 0, 1, above=True)
    engine: str = setting(
        "Rollout engine; auto is the first of the two that is exact.", "auto", choices=("auto", "branch", "expand")
    )
    max_branch_tokens: int = setting("Branch tokens in flight; bounds memory, not results.", 8192, 1, 1 << 30)
    boundary_selection: str = setting(
        "Boundaries tried in an E-step: drawn in proportion to how often the E-step thinks there; those where the "
        "head predicts the largest gains, and annotation leaves out those where it sees no chance; or all, or "
        "`max_boundaries` of them at random.", "gate", choices=("gate", "head", "random"),
    )  # fmt: skip
    boundary_budget: float = setting(
        "Share of a document's boundaries tried in an E-step, by gate or head.", 0.25, 0, 1, above=True
    )
    max_boundaries: int = setting("Most boundaries of a document tried in an E-step; 0 is no limit.", 0, 0, 1 << 24)

    # Abstraction head
    abstraction_head: bool = setting(
        "Train an abstraction head beside the model, which it does not change, and save it with the checkpoint.", True
    )
    gate: str = setting(
        "What decides whether to think: the think prefix's tokens, or the head; the tokens' P(think) is then held "
        "where it began.", "token", choices=("token", "head")
    )  # fmt: skip
    boundary_exploration: float = setting(
        "With boundary_selection=head, share of the boundaries tried that is drawn from all others.", 0.2, 0, 1,
        above=True,
    )  # fmt: skip
    annotation_skip: float = setting(
        "With boundary_selection=head annotation proposes no latent where the chance that one would be kept, as "
        "predicted, is smaller.", 0.05, 0, 1
    )  # fmt: skip

    # E-step
    horizon: int = setting("Lines that a latent is credited with (H); 1 is BRiTE.", 2, 1, 1024)
    discount: float = setting("Discount of later lines.", 0.9, 0, 1, above=True)
    line_reduction: str = setting("Over a line's tokens.", "sum", choices=("sum", "mean"))
    penalty: float = setting(
        "Cost c of a latent in nats (nats per token with line_reduction=mean, where 0.05 is the paper's); inf is "
        "next-token prediction.", 0.2, 0, 1e6, infinite=True
    )  # fmt: skip
    reward_model: str = setting(
        "Weights that score the lines: live, frozen at the E-phase's start, or base, the model with its adapter off.",
        "live", choices=("live", "frozen", "base"),
    )  # fmt: skip
    likelihood_weight: float = setting(
        "Weight of the lines' log-likelihood in the reward, beside `reward_funcs`; 0 replaces it by them.", 1.0, 0, 1e6
    )
    reward_weights: list[float] | None = setting("Weights of the reward_funcs; 1 for each if left out.", None)
    objective: str = setting(
        "What an E-phase raises, of gate and latents: the multi-sample bound, in which a boundary's latents count for "
        "the best of them, or the ELBO (the paper's), in which they count for their mean gain.", "multi_sample",
        choices=("multi_sample", "elbo"),
    )  # fmt: skip
    exploration: float = setting(
        "Share e of thinking beside the gate: the E-step thinks with probability (1 - e) P(think) + e, and that is "
        "the prior of annotation.", 0.05, 0, 0.5
    )  # fmt: skip
    gate_hold: str = setting(
        "auto holds P(think) where it began until latents are known to bring more than they cost where the model "
        "thinks, and again where it has been lost.", "auto",
        choices=("auto", "never", "always"),
    )  # fmt: skip
    kl_coef: float = setting("Weight of the latents' KL to the weights at the start.", 0.05, 0, 1e6)
    code_loss_tolerance: float = setting(
        "Training stops with a warning when the code's cross-entropy without latents, on a probe of training "
        "documents, rises by more than this many nats per token in an E-phase.", 0.1, 0, 1e6, infinite=True
    )  # fmt: skip

    # M-step
    annotation: str | None = setting(
        "How latents are chosen for the M-step: resample among candidates, or by the policy alone (the paper's way). "
        "Left out: resample where there is an E-phase, none without.", None, choices=(None, "resample", "policy")
    )  # fmt: skip
    prior_alpha: float | None = setting(
        "Prior probability of <act> in resampling; left out: the prior is how often the E-step thinks, by the model's "
        "gate and `exploration`.", None, 0, 1, above=True
    )  # fmt: skip
    same_latent_tolerance: float = setting(
        "Training stops with a warning, before an M-phase, when at the E-phase's end one latent is more than this "
        "share of all and another document's would do as well; 1 never stops.", 0.5, 0, 1
    )  # fmt: skip
    router_aux_loss_coef: float | None = setting(
        "Weight of the router loss of a mixture of experts, in both phases; the model's own if left out.", None, 0, 1e6
    )
    packing: bool = setting("Put several documents in a row; nothing is dropped.", True)
    loss_type: str = setting(
        "Loss of the M-phase: negative log-likelihood, or dft, in which each token counts by its own probability "
        "(https://huggingface.co/papers/2508.05629); chunked_nll is another name of nll.", "nll",
        choices=("nll", "dft", "chunked_nll"),
    )  # fmt: skip

    # Evaluation and logs
    eval_num_latents: int = setting("Latents at each boundary in evaluate().", 4, 1, 4096)
    eval_max_boundaries: int = setting("Boundaries of a document tried in evaluate(); 0 is all.", 0, 0, 1 << 24)
    log_latents_steps: int = setting("Updates between tables of latents; 0 is never.", 10, 0, MOST_UPDATES)
    dataset_license: str | None = setting("License of the data, for cards and for pushed rows that name none.", None)

    # Former names, taken until 0.3
    max_sites: int | None = setting("Former name of `max_boundaries`.", None)
    eval_max_sites: int | None = setting("Former name of `eval_max_boundaries`.", None)

    def __post_init__(self) -> None:
        for former, name in FORMER.items():
            if (value := getattr(self, former)) is not None:
                warnings.warn(f"`{former}` is now `{name}`; the former name goes in 0.3.", FutureWarning)
                setattr(self, name, value)
                setattr(self, former, None)
        self._check()
        if self.penalty == math.inf:
            self.e_steps = 0
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "elbo"
        if self._lower_is_better(self.metric_for_best_model or "") and self.greater_is_better is None:
            self.greater_is_better = False
        if self.ddp_find_unused_parameters is None:  # every weight has a gradient in every pass
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        # Rows carry documents, not model inputs; the trainer counts its own tokens.
        self.remove_unused_columns = False
        _ = self.phase_scheduler_kwargs  # refuses what no phase takes

    @staticmethod
    def _lower_is_better(metric: str) -> bool:
        """Whether a metric of `evaluate()` is logged as a loss is; bounds are, negated."""
        return metric.endswith(("elbo", "bound_multi", "ce", "ce_never", "ce_policy"))

    # ---- checks ----

    def _check(self) -> None:
        """Refuses what can't work, before `TrainingArguments` derives anything from it."""
        if isinstance(self.output_dir, PathLike):
            self.output_dir = fspath(self.output_dir)
        check_fields(self)
        self._check_reward_weights()
        self._check_schedulers()
        self._check_together()

    def _check_reward_weights(self) -> None:
        weights: Any = self.reward_weights  # whatever the annotation says
        if weights is not None:
            numbers = isinstance(weights, (list, tuple))
            if not numbers or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
                raise ValueError(f"`reward_weights` is {weights!r}; give a list of finite numbers.")

    def _check_schedulers(self) -> None:
        kinds = {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
        for name in ("lr_scheduler_type", "e_lr_scheduler_type"):
            value = getattr(self, name)
            if (value.value if isinstance(value, SchedulerType) else value) not in kinds:
                raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(sorted(kinds))}.")

    def _check_together(self) -> None:
        """What several fields exclude."""
        trains_latents = self.e_steps and self.penalty < math.inf
        if self.num_latents < 2 and trains_latents:
            raise ValueError(
                f"`num_latents` is {self.num_latents}: in an E-phase latents learn from each other; raise it to 2 or "
                "more."
            )
        if not self.learning_rate >= 0:  # of `TrainingArguments`, which takes anything
            raise ValueError(f"`learning_rate` is {self.learning_rate}; it must be at least 0.")
        if self.learning_rate == 0 and self.e_learning_rate and self.e_steps:
            raise ValueError(
                "`learning_rate` is 0, and with it all rates, of which it is the unit; use `m_steps=0` to leave the "
                "M-phase out."
            )
        if self.prior_alpha == 1 and self.uses_latents and self.annotation != "policy":
            raise ValueError(
                "`prior_alpha` is 1, so that resampling would never place a latent; lower it, or set `penalty=inf` "
                "for next-token prediction."
            )
        for name in ("gate", "boundary_selection"):
            if getattr(self, name) == "head" and not self.abstraction_head:
                raise ValueError(f"`{name}` is 'head', but `abstraction_head` is False; leave one of the two out.")

    # ---- in a checkpoint ----

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> RA3Config:
        """The settings that a checkpoint was trained with, from its `ra3_config.json`.

        Args:
            name (`str`):
                Folder or Hub id.
            **options:
                `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only` as in `from_pretrained` of a model;
                the rest are fields to set otherwise, such as `output_dir`.

        Raises:
            `ValueError`: if there is none, or it is damaged or of a newer version.
        """
        names = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
        place = {key: options.pop(key) for key in names if key in options}
        settings = read_settings(name, **place)
        if settings is None:
            raise ValueError(
                f"{name!r} has no {RA3_CONFIG}; it was not trained by RA3MidTrainer. Make an `RA3Config()`."
            )
        if cls is not RA3Config:
            settings |= read_experimental(name, **place)
        return cls._of_file(settings, options, f"{RA3_CONFIG} of {name!r}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any], **changes: Any) -> RA3Config:
        """A configuration of what `ra3_config.json` holds, with `changes`.

        Raises:
            `ValueError`: for fields that there are none of.
        """
        return cls._of_file(settings, changes, RA3_CONFIG)

    @classmethod
    def _of_file(cls, settings: dict[str, Any], changes: dict[str, Any], where: str) -> RA3Config:
        unknown = sorted(set(settings) - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"{where} has fields that no `RA3Config` has: {one_line(', '.join(unknown))}.")
        with blaming(where, lambda: cls(**settings)):
            return cls(**settings | changes)

    def save_pretrained(self, folder: str, **changes: Any) -> None:
        """Writes `ra3_config.json`: the settings that shape a run, with `changes`, without paths, tokens and what is
        the machine's."""
        core = own_fields(RA3Config)
        experimental = [name for name in own_fields(type(self)) if name not in core]
        write_settings(settings_of(self, core) | changes, folder, {name: getattr(self, name) for name in experimental})

    def __repr__(self) -> str:
        """As a data class's, with tokens hidden."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, which trackers write down, without a token in `model_init_kwargs` too."""
        values = {name: value for name, value in super().to_dict().items() if name not in FORMER}
        if "token" in (values["model_init_kwargs"] or {}):
            values["model_init_kwargs"] = values["model_init_kwargs"] | {"token": "<TOKEN>"}
        return values

    @property
    def _schedules(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("lr_scheduler_type", "e_lr_scheduler_type")}

    @property
    def phase_scheduler_kwargs(self) -> dict[str, dict[str, Any]]:
        """`lr_scheduler_kwargs` by the field whose schedule takes them: `lr_scheduler_type`, `e_lr_scheduler_type`."""
        assert not isinstance(self.lr_scheduler_kwargs, str)  # `TrainingArguments` has read the JSON
        return scheduler_kwargs(self.lr_scheduler_kwargs, self._schedules)

    @property
    def annotation_way(self) -> str | None:
        """`annotation`, or what it stands for where it is left out; `None` is next-token prediction."""
        return self.annotation or ("resample" if self.uses_latents else None)

    @property
    def uses_latents(self) -> bool:
        """Whether the M-step trains on annotated text: after an E-phase, or where `annotation` is set (annotation with
        no RL); else the run is next-token prediction."""
        return self.penalty < math.inf and (self.e_steps > 0 or self.annotation is not None)


def check_args(args: TrainingArguments, kind: type) -> None:
    """Refuses settings part of which a trainer of this `kind` would not heed.

    Raises:
        `ValueError`: naming whose settings they are.
    """
    if not isinstance(args, RA3Config):
        raise ValueError(f"`args` is a {type(args).__name__}; make an `RA3Config` of it.")
    if args.trainer not in (cls.__name__ for cls in kind.__mro__):
        raise ValueError(
            f"`args` is a {type(args).__name__}, part of which a {kind.__name__} would not heed; make a "
            f"`{args.trainer}`, or give an `RA3Config`."
        )


RA3Config.__doc__ = (RA3Config.__doc__ or "").replace("    Raises:", field_docs(RA3Config) + "\n    Raises:")
