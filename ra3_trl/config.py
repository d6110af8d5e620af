"""`RA3Config`: `TrainingArguments` plus the settings of the EM loop, grouped by phase."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from transformers import SchedulerType, TrainingArguments

from .config_file import RA3_CONFIG, read_settings, settings_of, write_settings


_CHOICES = {
    "existing_comments": ("keep", "strip"),
    "engine": ("auto", "branch", "expand"),
    "reward_model": ("live", "frozen", "base"),
    "line_reduction": ("sum", "mean"),
    "baseline": ("leave_one_out", "no_think"),
    "latent_weight": ("one", "gate"),
    "gate_hold": ("auto", "never", "always"),
    "annotation": ("resample", "policy"),
    "gate": ("token", "head"),
    "boundary_selection": ("random", "head"),
}


PROPOSALS = ("causal", "fim", "chat", "template", "function")
_UNSUPPORTED = {
    "torch_compile": "forwards change their length at each update and carry branches, so graphs would be built anew",
    "label_smoothing_factor": "rewards and bounds are likelihoods of the text as it is",
    "neftune_noise_alpha": "latents would be trained under a noise they were not sampled with",
    "group_by_length": "documents of one length would share their boundaries' number; rows are packed instead",
}


def _help(text: str, default: Any, **metadata) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@cache
def _own_kinds() -> dict[str, tuple[type, ...]]:
    """Types that a value may have, of each own field of a plain kind; a whole number will do for a `float`."""
    inherited = {field.name for field in fields(TrainingArguments)}
    found = {}
    for name, hint in get_type_hints(RA3Config).items():
        kinds = get_args(hint) or (hint,)
        if name not in inherited and set(kinds) <= {int, float, bool, str, type(None)}:
            found[name] = (*kinds, int) if float in kinds else kinds
    return found


@dataclass
class RA3Config(TrainingArguments):
    r"""
    Settings of [`RA3MidTrainer`]. Only what differs from [`~transformers.TrainingArguments`] is listed; defaults of
    the method are our choice where the paper (https://huggingface.co/papers/2509.25810) is silent, see docs/design.md.

    Data:
        max_length (`int`, *optional*, defaults to `1024`):
            Longest row in tokens, latents included. Longer texts are cut between lines; no token is lost.
        dataset_text_field (`str`, *optional*, defaults to `"text"`): Column that holds the text.
        dataset_num_proc (`int`, *optional*): Processes for cutting the texts.
        action_format (`str`, *optional*, defaults to `"python"`):
            How texts are cut into actions: `"python"`, `"slashes"` (C, Java, JavaScript, Rust,
            ...), `"prose"`, `"tags"`, `"python_tags"` or one of your own in
            `ra3_trl.segmentation.ACTION_FORMATS`.
        existing_comments (`str`, *optional*, defaults to `"keep"`): `"keep"` the expert's comments or `"strip"` them.
        disable_dropout (`bool`, *optional*, defaults to `True`): Sets all dropout to 0.

    Schedule:
        em_iterations (`int`, *optional*, defaults to `1`): Times that E-phase and M-phase alternate.
        e_steps (`int`, *optional*, defaults to `20`): Updates of an E-phase. `0` is next-token prediction.
        m_steps (`int`, *optional*, defaults to `-1`):
            Updates of an M-phase. `-1`: `num_train_epochs` passes over the data (or what `max_steps` leaves), shared
            out among the iterations.
        e_learning_rate (`float`, *optional*, defaults to `1e-5`): Peak learning rate of the E-phase; `learning_rate`
            is that of the M-phase.
        e_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`): Schedule within an E-phase.
        reset_optimizer (`bool`, *optional*, defaults to `True`): Forget optimizer state when the phase changes.

    Rollout:
        num_latents (`int`, *optional*, defaults to `4`): Latents G at each boundary.
        max_latent_length (`int`, *optional*, defaults to `12`): Most tokens of a latent.
        temperature (`float`, *optional*, defaults to `1.0`), top_k (`int`, *optional*, defaults to `0`: off),
        top_p (`float`, *optional*, defaults to `1.0`: off): The distribution sampled from, and trained.
        engine (`str`, *optional*, defaults to `"auto"`): `"branch"`, `"expand"`, or the first that is exact.
        max_branch_tokens (`int`, *optional*, defaults to `8192`): Branch tokens in flight; bounds memory only.
        max_boundaries (`int`, *optional*, defaults to `0`): Boundaries of a document tried in an E-step; `0` is all.

    Proposals:
        proposal (`str`, *optional*, defaults to `"causal"`):
            Where latents come from: `"causal"` (the policy, from the code so far), or in hindsight, knowing the next
            lines, `"fim"` (fill in the middle), `"chat"` (an instruction), `"template"` (`proposal_template`) or
            `"function"` (the trainer's `proposal_func`); or some of them with shares, `"causal:1+fim:3"`.
        proposal_lines (`int`, *optional*, defaults to `4`): Next lines that a proposal in hindsight knows.
        proposal_template (`str`, *optional*):
            Prompt with the placeholders `{prefix}` (the code so far), `{suffix}` (the next lines) and, where the
            latent's marker is wanted, `{think}`.
        proposal_kl_coef (`float`, *optional*, defaults to `1.0`):
            Weight, up to 1, of log pi(z | s) - log q(z | s, a) in what a latent is worth to annotation and E-phase.
            `1` is the ELBO; less lets the policy learn what it would hardly say yet, as annealing the KL does in
            variational autoencoders. Held-out bounds do not depend on it.

    Abstraction head:
        abstraction_head (`bool`, *optional*, defaults to `True`):
            Train one beside the model, which it does not change, and save it with the checkpoint.
        gate (`str`, *optional*, defaults to `"token"`):
            What decides whether to think: the think prefix's tokens, or the `"head"`; the tokens' P(think) is then
            held where it began.
        boundary_selection (`str`, *optional*, defaults to `"random"`):
            Boundaries tried in an E-step: all, or `max_boundaries` drawn; or those where the `"head"` predicts the
            largest gains, and annotation leaves out those where it sees no chance.
        boundary_budget (`float`, *optional*, defaults to `0.5`): Share of a document's boundaries tried with `"head"`.
        boundary_exploration (`float`, *optional*, defaults to `0.2`): Share of these drawn from all others.
        annotation_skip (`float`, *optional*, defaults to `0.05`):
            With `boundary_selection="head"` annotation proposes no latent where the chance that one would be kept,
            as predicted, is smaller.
        head_learning_rate (`float`, *optional*, defaults to `1e-3`): Learning rate of the head.

    E-step:
        horizon (`int`, *optional*, defaults to `2`): Lines H that a latent is credited with.
        discount (`float`, *optional*, defaults to `0.9`): Discount of later lines.
        line_reduction (`str`, *optional*, defaults to `"sum"`): `"sum"` or `"mean"` over a line's tokens.
        penalty (`float`, *optional*, defaults to `0.2`):
            Cost c of a latent in nats (nats per token with `"mean"`, where 0.05 is the paper's). `inf` is next-token
            prediction.
        reward_model (`str`, *optional*, defaults to `"live"`):
            Weights that score the lines: `"live"`, `"frozen"` at the E-phase's start, or `"base"`, the model with its
            adapter switched off.
        likelihood_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the lines' log-likelihood in the reward, beside `reward_funcs`; 0 replaces it by them.
        reward_weights (`list[float]`, *optional*): Weights of the `reward_funcs`; `None` is 1 for each.
        baseline (`str`, *optional*, defaults to `"leave_one_out"`): Or `"no_think"`: the return without latent.
        latent_weight (`str`, *optional*, defaults to `"one"`): Weight of a latent's gradient; `"gate"` is P(think).
        gate_hold (`str`, *optional*, defaults to `"auto"`):
            `"auto"` holds P(think) where it began until latents gain more than they cost where the model thinks.
        gate_coef (`float`, *optional*, defaults to `1.0`): Weight of the gate's objective.
        prior_alpha (`float`, *optional*, defaults to `0.7`): Prior probability of <act>, below 1 to resample.
        gate_kl_coef (`float`, *optional*, defaults to `0.0`): Weight of KL(Bernoulli gate, prior).
        entropy_coef (`float`, *optional*, defaults to `0.0`): Weight of the latents' token entropy.
        kl_coef (`float`, *optional*, defaults to `0.05`): Weight of the latents' KL to the weights at the start.
        code_loss_tolerance (`float`, *optional*, defaults to `0.1`):
            Training stops with a warning when the code's cross-entropy under <act> (renormalised by the gate), on a
            probe of training documents, rises by more than this many nats per token in an E-phase.

    M-step:
        annotation (`str`, *optional*, defaults to `"resample"`): Or `"policy"`, the paper's way.
        annotation_think_prob (`float`, *optional*):
            Prior P(think) of resampling. `None` is `1 - prior_alpha`; `-1` is the model's own gate.
        router_aux_loss_coef (`float`, *optional*):
            Weight of the router loss of a mixture of experts, in both phases. `None` is the model's own.
        packing (`bool`, *optional*, defaults to `True`): Put several documents in a row; nothing is dropped.

    Evaluation and logs:
        eval_num_latents (`int`, *optional*, defaults to `4`): Latents at each boundary in `evaluate()`.
        eval_max_boundaries (`int`, *optional*, defaults to `0`): Boundaries of a document tried there; `0` is all.
        log_latents_steps (`int`, *optional*, defaults to `10`): Updates between tables of latents; `0` is never.
        dataset_license (`str`, *optional*): Named on cards, and the licence of pushed rows that name none.

    Raises:
        `ValueError`: for a bad value, naming field, value and cure.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Values that differ from TrainingArguments
    learning_rate: float = _help("Peak learning rate of the M-phase.", 2e-5)
    logging_steps: float = _help("Updates between log lines.", 1)
    logging_nan_inf_filter: bool = _help("Hide losses that are not finite from the log.", False)
    dataloader_pin_memory: bool = _help("Pin batches in memory; of no use here, they hold documents.", False)

    # Model
    model_init_kwargs: dict[str, Any] | str | None = _help("Keyword arguments of `from_pretrained`, as JSON.", None)

    # Data
    max_length: int = _help("Longest row in tokens, latents included.", 1024)
    dataset_text_field: str = _help("Column that holds the text.", "text")
    dataset_num_proc: int | None = _help("Processes for cutting the texts.", None)
    action_format: str = _help("How texts are cut into actions: python, slashes, prose, tags, python_tags.", "python")
    existing_comments: str = _help("The expert's own comment lines: keep or strip.", "keep")
    disable_dropout: bool = _help("Set all dropout to 0.", True)

    # Schedule
    em_iterations: int = _help("Times that E-phase and M-phase alternate.", 1)
    e_steps: int = _help("Updates of an E-phase; 0 is next-token prediction.", 20)
    m_steps: int = _help("Updates of an M-phase; -1 derives them from num_train_epochs or max_steps.", -1)
    e_learning_rate: float = _help("Peak learning rate of the E-phase.", 1e-5)
    e_lr_scheduler_type: str = _help("Learning-rate schedule within an E-phase.", "constant")
    reset_optimizer: bool = _help("Forget optimizer state when the phase changes.", True)

    # Rollout
    num_latents: int = _help("Latents at each boundary (G).", 4)
    max_latent_length: int = _help("Most tokens of a latent.", 12)
    temperature: float = _help("Sampling temperature of latents.", 1.0)
    top_k: int = _help("Keep the k likeliest symbols; 0 is off.", 0)
    top_p: float = _help("Keep the likeliest symbols up to this mass; 1 is off.", 1.0)
    engine: str = _help("Rollout engine: auto, branch or expand.", "auto")
    max_branch_tokens: int = _help("Branch tokens in flight; bounds memory, not results.", 8192)
    max_boundaries: int = _help("Boundaries of a document tried in an E-step; 0 is all.", 0)

    # Proposals
    proposal: str = _help(
        "Where latents come from: causal, fim, chat, template, function, or causal:1+fim:3.", "causal"
    )
    proposal_lines: int = _help("Next lines that a proposal in hindsight knows.", 4)
    proposal_template: str | None = _help("Prompt with {prefix}, {suffix} and {think}.", None)
    proposal_kl_coef: float = _help("Weight of log pi - log q in a latent's worth; 1 is the ELBO.", 1.0)

    # Abstraction head
    abstraction_head: bool = _help("Train an abstraction head beside the model and save it with the checkpoint.", True)
    gate: str = _help("What decides whether to think: token (the think prefix) or head.", "token")
    boundary_selection: str = _help("Boundaries tried in an E-step: random (or all) or head.", "random")
    boundary_budget: float = _help("Share of a document's boundaries tried, with boundary_selection=head.", 0.5)
    boundary_exploration: float = _help("Share of these drawn from all others.", 0.2)
    annotation_skip: float = _help("Annotation skips boundaries with a smaller chance, as the head predicts.", 0.05)
    head_learning_rate: float = _help("Learning rate of the abstraction head.", 1e-3)

    # E-step
    horizon: int = _help("Lines that a latent is credited with (H).", 2)
    discount: float = _help("Discount of later lines.", 0.9)
    line_reduction: str = _help("sum or mean over a line's tokens.", "sum")
    penalty: float = _help("Cost of a latent in nats; inf is next-token prediction.", 0.2)
    reward_model: str = _help("Weights that score the lines: live, frozen or base (adapter off).", "live")
    likelihood_weight: float = _help("Weight of the log-likelihood in the reward, beside reward_funcs.", 1.0)
    reward_weights: list[float] | None = _help("Weights of the reward_funcs; 1 for each if left out.", None)
    baseline: str = _help("leave_one_out or no_think.", "leave_one_out")
    latent_weight: str = _help("Weight of a latent's gradient: one or gate.", "one")
    gate_hold: str = _help("Hold P(think) where it began until latents pay: auto, never or always.", "auto")
    gate_coef: float = _help("Weight of the gate's objective.", 1.0)
    prior_alpha: float = _help("Prior probability of <act>.", 0.7)
    gate_kl_coef: float = _help("Weight of KL(gate, prior).", 0.0)
    entropy_coef: float = _help("Weight of the latents' token entropy.", 0.0)
    kl_coef: float = _help("Weight of the latents' KL to the weights at the start.", 0.05)
    code_loss_tolerance: float = _help("Stop when code cross-entropy rises by more in an E-phase (nats).", 0.1)

    # M-step
    annotation: str = _help("How latents are chosen for the M-step: resample or policy.", "resample")
    annotation_think_prob: float | None = _help("Prior P(think) of resampling; -1 is the model's gate.", None)
    router_aux_loss_coef: float | None = _help("Weight of a mixture's router loss; its own if left out.", None)
    packing: bool = _help("Put several documents in a row.", True)

    # Evaluation and logs
    eval_num_latents: int = _help("Latents at each boundary in evaluate().", 4)
    eval_max_boundaries: int = _help("Boundaries of a document tried in evaluate(); 0 is all.", 0)
    log_latents_steps: int = _help("Updates between tables of latents; 0 is never.", 10)
    dataset_license: str | None = _help("License of the data, for cards and for pushed rows that name none.", None)

    def __post_init__(self):
        self._check()
        if self.penalty == math.inf:
            self.e_steps = 0
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "elbo"
        best = self.metric_for_best_model or ""
        lower = ("elbo", "bound_multi", "ce", "ce_never", "ce_policy", "elbo_hindsight", "bound_hindsight")
        if best.endswith(lower) and self.greater_is_better is None:
            self.greater_is_better = False  # logged as negative bounds, as losses are
        if self.ddp_find_unused_parameters is None:  # every weight has a gradient in every pass
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        # Rows carry documents, not model inputs; the trainer counts its own tokens.
        self.remove_unused_columns = False

    def _check_kinds(self) -> None:
        """Numbers are numbers, whole ones whole, before any of them is compared."""
        for name, kinds in _own_kinds().items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"`{name}` is {value!r}; it must be of type {wanted}.")
        weights = self.reward_weights
        if weights is not None:
            numbers = isinstance(weights, (list, tuple)) and all(isinstance(w, (int, float)) for w in weights)
            if not numbers or not all(math.isfinite(w) for w in weights):
                raise ValueError(f"`reward_weights` is {weights!r}; give a list of finite numbers.")

    def _check(self) -> None:
        values = vars(self)
        self._check_kinds()
        for name, reason in _UNSUPPORTED.items():
            if values.get(name):
                raise ValueError(f"`{name}` is {values[name]!r}, which RA3 can't work with ({reason}); leave it out.")
        for name, choices in _CHOICES.items():
            if values[name] not in choices:
                raise ValueError(f"`{name}` is {values[name]!r}; use one of {', '.join(map(repr, choices))}.")
        at_least = {
            "em_iterations": 1,
            "e_steps": 0,
            "max_latent_length": 1,
            "horizon": 1,
            "top_k": 0,
            "max_boundaries": 0,
        }
        at_least |= {"max_branch_tokens": 1, "eval_num_latents": 1, "eval_max_boundaries": 0, "log_latents_steps": 0}
        at_least |= {"penalty": 0, "gate_coef": 0, "gate_kl_coef": 0, "entropy_coef": 0, "kl_coef": 0, "m_steps": -1}
        at_least |= {
            "likelihood_weight": 0,
            "e_learning_rate": 0,
            "code_loss_tolerance": 0,
            "head_learning_rate": 0,
            "annotation_skip": 0,
            "max_length": 16,
            "num_latents": 1,
            "proposal_lines": 1,
        }
        for name, least in at_least.items():
            if not values[name] >= least:  # NaN fails too
                raise ValueError(f"`{name}` is {values[name]}; it must be at least {least}.")
            if values[name] == math.inf and name not in ("penalty", "code_loss_tolerance"):
                raise ValueError(f"`{name}` is {values[name]}; it must be finite.")
        if self.num_latents < 2 and self.baseline == "leave_one_out" and self.e_steps and self.penalty < math.inf:
            raise ValueError(
                f"`num_latents` is {self.num_latents}: the leave-one-out baseline needs 2 latents or more; raise it "
                "or set `baseline='no_think'`."
            )
        if self.router_aux_loss_coef is not None and not self.router_aux_loss_coef >= 0:
            raise ValueError(f"`router_aux_loss_coef` is {self.router_aux_loss_coef}; it must be at least 0.")
        if self.learning_rate == 0 and self.e_learning_rate and self.e_steps:
            raise ValueError(
                "`learning_rate` is 0, and with it all rates, of which it is the unit; use `m_steps=0` to leave the "
                "M-phase out."
            )
        kinds = {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
        for name in ("lr_scheduler_type", "e_lr_scheduler_type"):
            if str(getattr(values[name], "value", values[name])) not in kinds:
                raise ValueError(f"`{name}` is {values[name]!r}; use one of {', '.join(sorted(kinds))}.")
        for name in ("discount", "top_p", "prior_alpha", "boundary_budget", "boundary_exploration"):
            if not 0 < values[name] <= 1:
                raise ValueError(f"`{name}` is {values[name]}; it must be above 0 and at most 1.")
        if not 0 <= self.proposal_kl_coef <= 1:
            raise ValueError(f"`proposal_kl_coef` is {self.proposal_kl_coef}; it must be at least 0 and at most 1.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature}; it must be above 0.")
        if self.prior_alpha == 1 and self.annotation == "resample" and self.annotation_think_prob is None:
            raise ValueError(
                "`prior_alpha` is 1, so that resampling would never place a latent; lower it, set "
                "`annotation_think_prob`, or `penalty=inf` for next-token prediction."
            )
        if self.prior_alpha == 1 and self.gate_kl_coef:
            raise ValueError("`prior_alpha` is 1: the KL that `gate_kl_coef` weighs is infinite; lower `prior_alpha`.")
        for name in ("gate", "boundary_selection"):
            if values[name] == "head" and not self.abstraction_head:
                raise ValueError(f"`{name}` is 'head', but `abstraction_head` is False; leave one of the two out.")
        self._check_proposal()
        prob = self.annotation_think_prob
        if prob is not None and prob != -1 and not 0 < prob < 1:
            raise ValueError(
                f"`annotation_think_prob` is {prob}; use a number between 0 and 1, -1 (the gate) or None."
            )

    @property
    def proposal_shares(self) -> dict[str, float]:
        """`proposal` by names. Example: `"causal:1+fim:3"` is `{"causal": 1.0, "fim": 3.0}`."""
        parts = [part.strip().partition(":") for part in self.proposal.split("+")]
        return {name.strip(): float(share) if colon else 1.0 for name, colon, share in parts}

    def _check_proposal(self) -> None:
        try:
            shares = self.proposal_shares
        except ValueError:
            shares = {}
        parts = self.proposal.count("+") + 1
        if (
            len(shares) != parts
            or not set(shares) <= set(PROPOSALS)
            or not all(0 < s < math.inf for s in shares.values())
        ):
            raise ValueError(
                f"`proposal` is {self.proposal!r}; use one of {', '.join(map(repr, PROPOSALS))}, or several of them, "
                "each once, with shares above 0: 'causal:1+fim:3'."
            )
        if ("template" in shares) != (self.proposal_template is not None):
            raise ValueError(
                f"`proposal` is {self.proposal!r} and `proposal_template` is {self.proposal_template!r}; name "
                "'template' among the proposals and give one, or neither."
            )
        if set(shares) == {"causal"}:
            if self.proposal_kl_coef != 1:
                raise ValueError(
                    f"`proposal_kl_coef` is {self.proposal_kl_coef}, but all latents are the policy's own; leave it "
                    "at 1 or set `proposal`."
                )
            if (self.metric_for_best_model or "").endswith("_hindsight"):
                raise ValueError(
                    f"`metric_for_best_model` is {self.metric_for_best_model!r}, which is measured with latents in "
                    f"hindsight, but `proposal` is {self.proposal!r}; use 'elbo' or 'bound_multi'."
                )
            return
        few = min(self.num_latents, self.eval_num_latents)
        if few < len(shares):
            name = "num_latents" if self.num_latents == few else "eval_num_latents"
            raise ValueError(f"`{name}` is {few}, but `proposal` {self.proposal!r} has {len(shares)} parts; raise it.")
        if self.annotation == "policy":
            raise ValueError(
                f"`proposal` is {self.proposal!r}, but `annotation` is 'policy', which writes what the policy writes; "
                "set `annotation='resample'`."
            )
        training = self.e_steps and self.penalty < math.inf
        if self.line_reduction == "mean":
            raise ValueError(
                f"`proposal` is {self.proposal!r}, whose reward is an ELBO in nats; set `line_reduction='sum'`."
            )
        if training and self.baseline == "leave_one_out" and self.num_latents < 2 * len(shares):
            raise ValueError(
                f"`num_latents` is {self.num_latents}: the leave-one-out baseline needs 2 latents of each of the "
                f"{len(shares)} parts of `proposal`; raise it or set `baseline='no_think'`."
            )
        if training and "causal" not in shares and (self.gate_hold == "always" or self.gate_kl_coef):
            name = "gate_kl_coef" if self.gate_kl_coef else "gate_hold"
            raise ValueError(
                f"`{name}` is {getattr(self, name)!r}, but without the policy's own latents P(think) is free; give "
                "'causal' a share of `proposal`."
            )
        if "causal" not in shares and "head" in (self.gate, self.boundary_selection):
            name = "gate" if self.gate == "head" else "boundary_selection"
            raise ValueError(
                f"`{name}` is 'head', which learns from the policy's own latents; give 'causal' a share of `proposal`."
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **changes,
    ) -> RA3Config:
        """The settings that a checkpoint was trained with, from its `ra3_config.json`.

        Args:
            name (`str`):
                Folder or Hub id.
            revision, subfolder, token, cache_dir, local_files_only:
                As in `from_pretrained` of a model.
            **changes:
                Fields to set otherwise, such as `output_dir`.

        Raises:
            `ValueError`: if there is none, or it is damaged or of a newer version.
        """
        place = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
        settings = read_settings(name, **place, local_files_only=local_files_only)
        if settings is None:
            raise ValueError(
                f"{name!r} has no {RA3_CONFIG}; it was not trained by RA3MidTrainer. Make an `RA3Config()`."
            )
        return cls.from_settings(settings, **changes)

    @classmethod
    def from_settings(cls, settings: dict[str, Any], **changes) -> RA3Config:
        """A configuration of what `ra3_config.json` holds, with `changes`.

        Raises:
            `ValueError`: for fields that there are none of.
        """
        unknown = sorted(set(settings) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"{RA3_CONFIG} has fields that no `RA3Config` has: {', '.join(unknown)}.")
        return cls(**settings | changes)

    def save_pretrained(self, folder: str, **changes) -> None:
        """Writes `ra3_config.json`: the settings that shape a run, with `changes`, without paths, tokens and what is
        the machine's."""
        inherited = {field.name for field in fields(TrainingArguments)}
        own = [field.name for field in fields(self) if field.name not in inherited]
        write_settings(settings_of(self, own) | changes, folder)

    def __repr__(self) -> str:
        """As a data class's, with tokens hidden."""
        return f"RA3Config({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __str__ = __repr__

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, which trackers write down, without a token in `model_init_kwargs` too."""
        values = super().to_dict()
        if "token" in (values["model_init_kwargs"] or {}):
            values["model_init_kwargs"] = values["model_init_kwargs"] | {"token": "<TOKEN>"}
        return values

    @property
    def uses_latents(self) -> bool:
        """Whether the M-step trains on annotated text. Without E-steps it does only if `annotation_think_prob` is set
        (annotation with no RL); else the run is next-token prediction."""
        return self.penalty < math.inf and (self.e_steps > 0 or self.annotation_think_prob is not None)
