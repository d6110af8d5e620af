"""`HindsightConfig`: [`RA3Config`], and where latents come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...config import RA3Config
from ...config_fields import field_docs, setting


PROPOSALS = ("causal", "fim", "chat", "template", "function")


@dataclass(repr=False)  # a generated one would show tokens
class HindsightConfig(RA3Config):
    r"""
    Settings of [`HindsightTrainer`]: those of [`RA3Config`] and, at the end, where latents come from. A bad value is
    refused with a `ValueError` that names field, value and cure.
    """

    trainer: ClassVar[str] = "HindsightTrainer"

    proposal: str = setting(
        "Where latents come from: causal (the policy, from the code so far), or in hindsight, knowing the next lines, "
        "fim (fill in the middle), chat (an instruction), template (`proposal_template`) or function (the trainer's "
        "`proposal_func`); or some of them with shares, causal:1+fim:3.", "causal"
    )  # fmt: skip
    proposal_lines: int = setting("Next lines that a proposal in hindsight knows.", 4, 1, 1024)
    proposal_template: str | None = setting(
        "Prompt with {prefix} (the code so far), {suffix} (the next lines) and, where the latent's marker is wanted, "
        "{think}.", None
    )  # fmt: skip
    proposal_kl_coef: float = setting(
        "Weight of log pi(z | s) - log q(z | s, a) in what a latent is worth to annotation and E-phase. 1 is the "
        "ELBO; less lets the policy learn what it would hardly say yet, as annealing the KL does in variational "
        "autoencoders. Held-out bounds do not depend on it.", 1.0, 0, 1
    )  # fmt: skip

    @property
    def proposal_shares(self) -> dict[str, float]:
        """`proposal` by names. Example: `"causal:1+fim:3"` is `{"causal": 1.0, "fim": 3.0}`."""
        terms = [term.strip().partition(":") for term in self.proposal.split("+")]
        return {name.strip(): float(share) if colon else 1.0 for name, colon, share in terms}

    @staticmethod
    def _lower_is_better(metric: str) -> bool:
        return RA3Config._lower_is_better(metric) or metric.endswith(("elbo_hindsight", "bound_hindsight"))

    def _check_together(self) -> None:
        super()._check_together()
        try:
            shares = self.proposal_shares
        except ValueError:
            shares = {}
        valid = set(shares) <= set(PROPOSALS) and all(0 < share < math.inf for share in shares.values())
        hindsight, causal = set(shares) != {"causal"}, "causal" in shares
        e_phase = self.e_steps > 0 and self.penalty < math.inf
        few = "num_latents" if self.num_latents <= self.eval_num_latents else "eval_num_latents"
        head = "gate" if self.gate == "head" else "boundary_selection"
        proposal = f"`proposal` is {self.proposal!r}"
        # Gate and head learn from the policy's own latents: what a prompt made says nothing of when to think.
        for wrong, message in (
            (not valid or len(shares) != self.proposal.count("+") + 1,  # fewer: a name twice, a share of no number
             f"{proposal}; use one of {', '.join(map(repr, PROPOSALS))}, or several of them, each once, with shares "
             "above 0: 'causal:1+fim:3'."),
            (("template" in shares) != (self.proposal_template is not None),
             f"{proposal} and `proposal_template` is {self.proposal_template!r}; name 'template' among the proposals "
             "and give one, or neither."),
            (not hindsight and self.proposal_kl_coef != 1,
             f"`proposal_kl_coef` is {self.proposal_kl_coef}, but all latents are the policy's own; leave it at 1 or "
             "set `proposal`."),
            (not hindsight and (self.metric_for_best_model or "").endswith("_hindsight"),
             f"`metric_for_best_model` is {self.metric_for_best_model!r}, which is measured with latents in "
             f"hindsight, but {proposal}; use 'elbo' or 'bound_multi'."),
            (getattr(self, few) < len(shares),
             f"`{few}` is {getattr(self, few)}, but `proposal` {self.proposal!r} has {len(shares)} parts; raise it."),
            (hindsight and self.annotation == "policy",
             f"{proposal}, but `annotation` is 'policy', which writes what the policy writes; set "
             "`annotation='resample'`."),
            (hindsight and self.line_reduction == "mean",
             f"{proposal}, whose reward is an ELBO in nats; set `line_reduction='sum'`."),
            (hindsight and e_phase and self.num_latents < 2 * len(shares),
             f"`num_latents` is {self.num_latents}: in an E-phase latents learn from each other, 2 or more of each of "
             f"the {len(shares)} parts of `proposal`; raise it."),
            (not causal and e_phase and self.gate_hold == "always",
             "`gate_hold` is 'always', but without the policy's own latents P(think) is free; give 'causal' a share "
             "of `proposal`."),
            (not causal and "head" in (self.gate, self.boundary_selection),
             f"`{head}` is 'head', which learns from the policy's own latents; give 'causal' a share of `proposal`."),
        ):  # fmt: skip
            if wrong:
                raise ValueError(message)


HindsightConfig.__doc__ = f"{HindsightConfig.__doc__}\n{field_docs(HindsightConfig)}"
