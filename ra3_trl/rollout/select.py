"""Chooses the engine, and checks it on the very model it is to run on: an engine is exact or it refuses.

Which engine is exact for which architecture changes with every release of transformers, so no list is kept here. Two
made-up documents are scored, and latents drawn, by the engine and by plain forwards (`plain.py`) instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import transformers

from ..records import Document, TokenTable
from .backbone import Backbone, evaluating
from .branch import BranchEngine
from .engine import RolloutEngine
from .expand import ExpandEngine
from .judging import FORWARD_ERRORS, ROUNDINGS, in_a_line, rounding, rounding_error
from .noise import NoiseKey
from .plain import HORIZON, KINDS, Numbers, PlainForwards, make_up
from .sampler import SamplingParams


logger = logging.getLogger(__name__)
ENGINES = ("auto", "branch", "expand")
_KINDS: dict[str, tuple[type[RolloutEngine], ...]] = {
    "auto": (BranchEngine, ExpandEngine), "branch": (BranchEngine,), "expand": (ExpandEngine,)
}  # fmt: skip
_STEPS = 4  # longest latent of the check: what a cache does wrong, it does within so many steps
_DRAWN = "log-probs of sampled latents"


def build_engine(
    name: str, backbone: Backbone, table: TokenTable, params: SamplingParams, max_branch_tokens: int = 8192
) -> RolloutEngine:
    """Makes the rollout engine called `name`, checked on the model: `"branch"` (shared prefixes), `"expand"` (repeated
    prefixes) or `"auto"` (the first if exact, else the second with one warning that says why).

    Raises:
        `ValueError`: if there is no such engine, the model's forward fails, is not causal or gives logits that are not
        head(hidden states), or the engine is not exact on this model.
    """
    if name not in ENGINES:
        raise ValueError(f"`engine` is {name!r}; choose one of {', '.join(map(repr, ENGINES))}.")
    model, reasons = type(backbone.causal_lm).__name__, dict[str, str]()
    with torch.no_grad(), evaluating(backbone.model):
        check = EngineCheck(backbone, table, params)
        for kind in _KINDS[name]:
            short = kind(backbone, table, check.params, max_branch_tokens)
            if (reason := check.difference(short)) is None:
                if reasons:
                    text = "The branch engine is not exact on %s, so `expand` is used: %s."
                    logger.warning(text, model, reasons["branch"])
                return kind(backbone, table, params, max_branch_tokens)
            reasons[kind.name] = reason
    if name == "auto":
        why = "; ".join(f"{engine}: {reason}" for engine, reason in reasons.items())
        raise ValueError(f"`model` is a {model}, on which no engine is exact ({why}); use another architecture.")
    cure = "'expand' or 'auto'" if name == "branch" else "'auto', or another architecture"
    raise ValueError(f"`engine` is {name!r}, which is not exact on {model}: {reasons[name]}. Use {cure}.")


class EngineCheck:
    """Compares engines with plain forwards of the model, which are made once.

    Raises:
        `ValueError`: if the model's own forwards fail, are not causal, or do not give what its head makes of them.
    """

    def __init__(self, backbone: Backbone, table: TokenTable, params: SamplingParams):
        self.params = replace(params, max_length=min(_STEPS, params.max_length))
        self.made_up = make_up(backbone, table, self.params)
        self.plain = PlainForwards(backbone, table, self.params)
        try:
            _check_forward(backbone, self.made_up[0].document)
            self.expected = self.plain.numbers(self.made_up)
            # A fixed bound would refuse right engines of models with large logits and let broken windows pass.
            with rounding(backbone):
                disturbed = self.plain.anew().numbers(self.made_up)
        except _Refused as error:
            raise ValueError(str(error)) from error
        except FORWARD_ERRORS as error:
            model = type(backbone.causal_lm).__name__
            raise ValueError(
                f"`model` is a {model}, whose own forward fails on a short text ({in_a_line(error)}); use another "
                "architecture, or mend its forward."
            ) from error
        self.bound = max(1e-3, ROUNDINGS * max(largest(self.expected, disturbed).values()))

    def difference(self, engine: RolloutEngine) -> str | None:
        """Says why an engine may not be used; `None` when it agrees with plain forwards."""
        try:
            expected, actual = self.both(engine)
        except FORWARD_ERRORS as error:
            return in_a_line(error)
        for kind, numbers in expected.items():
            if not torch.equal(torch.isfinite(numbers), torch.isfinite(actual[kind])):
                return f"{kind}: finite in other places than those of plain forwards"
        for kind, difference in largest(expected, actual).items():
            if not difference <= self.bound:
                return (
                    f"{kind} differ by up to {difference:.3g} nats from those of plain forwards (bound "
                    f"{self.bound:.2g})"
                )
        return None

    def both(self, engine: RolloutEngine) -> tuple[Numbers, Numbers]:
        """All numbers that an engine is asked for: those of plain forwards, and its own."""
        with _quiet():
            actual = self._numbers(engine)
            drawn = engine.rollouts(
                [group.document for group in self.made_up],
                [group.document.boundaries[1::2] for group in self.made_up],
                2, HORIZON, NoiseKey(0, 0, 0), score=False,
            )  # fmt: skip
        actual[_DRAWN] = torch.tensor([p for group in drawn for row in group.latents for z in row for p in z.logps])
        return self.expected | {
            _DRAWN: torch.tensor([p for group in drawn for p in self.plain.symbols(group)])
        }, actual

    def _numbers(self, engine: RolloutEngine) -> Numbers:
        """What an engine says of the made-up documents, in the order of `PlainForwards.numbers`."""
        groups = engine.scores(
            [group.document for group in self.made_up],
            [group.boundaries for group in self.made_up],
            [group.latents for group in self.made_up],
            HORIZON,
        )
        policies = engine.packed_log_probs([(group, slice(0, len(group.boundaries))) for group in groups])
        kinds = [
            [group.line_logps_A for group in groups],
            [group.gate_logps_A for group in groups],
            [group.latent_line_logps_TGH for group in groups],
            [group.latent_gate_logps_TGH for group in groups],
            [policy.gate_T for policy in policies],
            [policy.token_n for policy in policies],
        ]
        joined = (torch.cat([x.detach().float().cpu().flatten() for x in kind]) for kind in kinds)
        return dict(zip(KINDS, joined, strict=True))


class _Refused(Exception):
    """Says why no engine could be exact on a model."""


def _check_forward(backbone: Backbone, document: Document) -> None:
    """Refuses a model whose logits are not head(hidden states), or depend on what comes later."""
    ids = torch.tensor([document.input_ids[:20]], device=backbone.device)
    models = backbone.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    ours = backbone.logits(backbone.hidden(input_ids=ids)[0])
    size = max(1.0, float(models.abs().max()))
    bound = max(1e-3, 4 * rounding_error(backbone)) * size
    model = type(backbone.causal_lm).__name__
    difference = float((models - ours).abs().max()) if models.shape == ours.shape else float("nan")
    if not difference <= bound:
        raise _Refused(
            f"`model` is a {model}, whose logits are not its output embeddings applied to "
            f"its last hidden states (largest difference {difference:.3g}, bound {bound:.3g}); use another "
            "architecture, or `trainer.policy` for a model that a trainer has prepared for mixed precision."
        )
    with rounding(backbone):
        noise = float((backbone.logits(backbone.hidden(input_ids=ids)[0]) - ours).abs().max())
    shorter = backbone.logits(backbone.hidden(input_ids=ids[:, :10])[0])
    difference, bound = float((shorter - ours[:10]).abs().max()), max(1e-3 * size, ROUNDINGS * noise)
    if not difference <= bound:
        raise _Refused(
            f"`model` is a {model}, whose logits depend on tokens that come later (largest difference "
            f"{difference:.3g}, bound {bound:.3g}); load it as a decoder (`is_decoder=True`) or use another "
            "architecture."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers silent: its warning about the attention interface is said in ours."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def largest(expected: Numbers, actual: Numbers) -> dict[str, float]:
    """Largest difference of each kind of number, where both are finite."""
    both = {kind: torch.isfinite(expected[kind]) & torch.isfinite(actual[kind]) for kind in expected}
    return {
        kind: float((expected[kind] - actual[kind])[finite].abs().max()) if finite.any() else 0.0
        for kind, finite in both.items()
    }
