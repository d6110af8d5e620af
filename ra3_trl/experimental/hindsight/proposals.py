"""Proposals (a stub: the signature stands, the rest follows)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...policy import Policy


def attach(
    policy: Policy,
    trained: Mapping[str, Any] | None = None,
    function: Callable[[str, str], str] | None = None,
    **changes: Any,
) -> Policy:
    """Gives a policy the proposals by which its latents are drawn in annotation and bounds.

    Example: `attach(Policy.open(name), read_experimental(name), proposal=options.proposal, proposal_lines=None)`

    Args:
        policy ([`Policy`]):
            What writes, scores and pays; it is not changed, a copy is.
        trained (`Mapping[str, Any]`, *optional*):
            The fields its checkpoint was trained with, of `config_file.read_experimental`. Proposal, template and
            price go together: with another `proposal`, or `policy.args.annotation="policy"`, none of them is left.
        function (`Callable[[str, str], str]`, *optional*):
            What `"function"` stands for.
        **changes:
            Fields of [`HindsightConfig`] to set otherwise: `proposal`, `proposal_lines`, `proposal_template`,
            `proposal_kl_coef`. One that is `None` was not given.

    Raises:
        `ValueError`: for what tokenizer, context or settings can't do; where the checkpoint was trained with a function
            that is not at hand.
    """
    raise NotImplementedError
