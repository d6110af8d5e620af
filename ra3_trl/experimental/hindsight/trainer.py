"""`HindsightTrainer`: [`RA3MidTrainer`] with latents that may be proposed in hindsight."""

from __future__ import annotations

from typing import Any

from ...config import RA3Config
from ...models import context_length
from ...policy import HELD_OUT_HINDSIGHT, Proposer
from ...trainer import RA3MidTrainer
from .config import HindsightConfig
from .prompts import ProposalFunc
from .proposals import make_proposals


class HindsightTrainer(RA3MidTrainer):
    """
    As [`RA3MidTrainer`], with the latents of E-phase, annotation and `eval_..._hindsight` from `args.proposal`.

    Args:
        *arguments, **options:
            As of [`RA3MidTrainer`], with a [`HindsightConfig`] for `args`.
        proposal_func (`Callable[[str, str], str]`, *optional*):
            What `"function"` in `args.proposal` stands for: makes a prompt, behind which the latent begins, of the
            code so far and the next lines, which begin with what closes a latent (a newline, on Python). A run that
            is resumed knows it by its name only.
    """

    measured = (*RA3MidTrainer.measured, *HELD_OUT_HINDSIGHT)

    def __init__(self, *arguments: Any, proposal_func: ProposalFunc | None = None, **options: Any):
        self.proposal_func = proposal_func
        super().__init__(*arguments, **options)

    def make_proposer(self, args: RA3Config, trains: bool) -> Proposer:
        if not isinstance(args, HindsightConfig):
            raise ValueError(f"`args` is of type {type(args).__name__}; give a `HindsightConfig`.")
        context = context_length(self.policy.backbone.causal_lm)
        return make_proposals(args, self.policy.tokenizer, context, self.proposal_func, trains)
