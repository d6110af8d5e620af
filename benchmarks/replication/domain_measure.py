"""What the domain `traces` measures of a checkpoint: held-out programs, kinds that it never saw, MBPP's functions.

Each part is an entry of the store of its own, so that what was done is not done again when another is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ra3_trl import Policy

from ..common import load
from . import cold_measure
from .cold_measure import ColdMeasureRecipe
from .real import checkpoint
from .real_measure import measure
from .records import PreparedRecipe, TraceCorpus, TraceMeasureRecipe, TraceMidRecipe
from .store import Store
from .traces import programs


_LENGTH = 256
_MBPP = ("right", "told_to_think", "told_not_to", "thinks", "gain", "gain_elsewhere", "best_pays", "think_there",
         "think_elsewhere")  # fmt: skip


@dataclass(frozen=True)
class TraceBoundRecipe:
    """Held-out bounds of a checkpoint on the expert's programs, horizon 1, at all boundaries."""

    start: PreparedRecipe | TraceMidRecipe
    programs: int = 16
    num_latents: int = 8
    max_latent_length: int = 24
    seed: int = 1_000_000
    corpus: TraceCorpus = field(default_factory=TraceCorpus)
    version: int = 1


@dataclass(frozen=True)
class DomainRecipe:
    """What is measured of each arm, but for the checkpoint; `None` leaves a part out.

    `transfer`: a measure of programs for each kind that no training has seen. `mbpp_arms`: the arms that are asked
    about MBPP's functions.
    """

    measure: TraceMeasureRecipe
    bound: TraceBoundRecipe
    transfer: tuple[TraceMeasureRecipe, ...] = ()
    mbpp: ColdMeasureRecipe | None = None
    mbpp_arms: tuple[str, ...] = ("base", "ntp", "ntp_forced", "ra3")


@dataclass(frozen=True)
class DomainMeasures:
    """A checkpoint on the domain `traces`. Shares are greedy but for what is drawn at temperature 1; `None` is what
    was not measured.

    Args:
        think_hard, think_easy (`float`):
            Mean P(think) before assertions and before other lines of held-out programs.
        comment_right, distinct (`float`):
            Comments drawn behind a forced `#`: right ones, and different ones.
        comment_greedy, thinks (`float`):
            Programs that go on with the right comment, and with any.
        ce, elbo, bound_multi (`float`):
            Of `Policy.evaluate`: cross-entropy and negative bounds in nats per token of code.
        accuracy, accuracy_forced, accuracy_never (`float`):
            Assertions right: left to itself, with `#` forced, with the assertion forced.
        transfer_accuracy, transfer_forced, transfer_never, transfer_comment_right, transfer_thinks (`float`):
            `accuracy`, ... and `thinks` on programs of the kinds that no training has seen, the mean over kinds.
        mbpp_right, mbpp_told_to_think, mbpp_told_not_to, mbpp_thinks (`float`):
            `accuracy`, ... on MBPP's test functions.
        mbpp_gain, mbpp_gain_elsewhere (`float`):
            Nats that a comment of its own brings to MBPP's assertions and to a line elsewhere.
        mbpp_best_pays (`float`):
            Share of MBPP's assertions to which the best of its comments brings more than half a nat.
        mbpp_think_there, mbpp_think_elsewhere (`float`):
            As `think_hard` and `think_easy`.
    """

    think_hard: float
    think_easy: float
    comment_right: float
    distinct: float
    comment_greedy: float | None
    thinks: float
    ce: float
    elbo: float
    bound_multi: float
    accuracy: float
    accuracy_forced: float
    accuracy_never: float
    transfer_accuracy: float | None = None
    transfer_forced: float | None = None
    transfer_never: float | None = None
    transfer_comment_right: float | None = None
    transfer_thinks: float | None = None
    mbpp_right: float | None = None
    mbpp_told_to_think: float | None = None
    mbpp_told_not_to: float | None = None
    mbpp_thinks: float | None = None
    mbpp_gain: float | None = None
    mbpp_gain_elsewhere: float | None = None
    mbpp_best_pays: float | None = None
    mbpp_think_there: float | None = None
    mbpp_think_elsewhere: float | None = None

    def told_to_think(self) -> DomainMeasures:
        """The same weights with a comment before every assertion."""
        return replace(
            self, think_hard=1.0, thinks=1.0, comment_greedy=None, accuracy=self.accuracy_forced,
            transfer_accuracy=self.transfer_forced, mbpp_right=self.mbpp_told_to_think,
            transfer_thinks=None if self.transfer_thinks is None else 1.0,
            mbpp_thinks=None if self.mbpp_thinks is None else 1.0,
        )  # fmt: skip


def bounds(store: Store, recipe: TraceBoundRecipe) -> dict[str, float]:
    """`ce`, `elbo` and `bound_multi`."""
    return store.get(recipe, lambda _: bounds_of(*load(str(checkpoint(store, recipe.start))), recipe))


def bounds_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: TraceBoundRecipe
) -> dict[str, float]:
    """The same of a model, where it is."""
    policy = Policy.open(
        model.eval(), tokenizer=tokenizer, use_cpu=model.device.type == "cpu", bf16=True, horizon=1,
        max_length=_LENGTH, max_latent_length=recipe.max_latent_length, eval_num_latents=recipe.num_latents,
    )  # fmt: skip
    texts = programs(recipe.corpus, recipe.seed, recipe.programs)["text"]
    found = policy.evaluate([chunk for i, text in enumerate(texts) for chunk in policy.segment(text, i)])
    return {name: found[name] for name in ("ce", "elbo", "bound_multi")}


def measure_domain(
    store: Store, recipe: DomainRecipe, start: PreparedRecipe | TraceMidRecipe
) -> tuple[DomainMeasures, dict[str, Any]]:
    """All measures of a checkpoint, which is trained if it is not there, and what is to be read beside them."""
    own = measure(store, replace(recipe.measure, start=start))
    unseen = [measure(store, replace(one, start=start)) for one in recipe.transfer]
    numbers = {
        "accuracy": "right", "forced": "told_to_think", "never": "told_not_to", "comment_right": "drawn_right",
        "thinks": "thinks",
    }  # fmt: skip
    of_kinds = [{name: float(getattr(one, key)) for name, key in numbers.items()} for one in unseen]
    transfer = {f"transfer_{name}": fmean(one[name] for one in of_kinds) for name in numbers if of_kinds}
    about: dict[str, Any] = {"samples": own.samples, "most_frequent": own.most_frequent}
    about["transfer"] = [
        {"kinds": list(one.kinds), **found} for one, found in zip(recipe.transfer, of_kinds, strict=True)
    ]
    mbpp: dict[str, float] = {}
    if recipe.mbpp is not None:
        asked = replace(recipe.mbpp, start=store.folder(start).name)
        found = cold_measure.measure(store, asked, str(checkpoint(store, start)))
        mbpp = {f"mbpp_{name}": getattr(found, name) for name in _MBPP}
        about["mbpp_samples"] = found.samples
    return DomainMeasures(
        think_hard=own.think_there, think_easy=own.think_elsewhere, comment_right=own.drawn_right,
        distinct=own.distinct, comment_greedy=own.comment_right, thinks=own.thinks, accuracy=own.right,
        accuracy_forced=own.told_to_think, accuracy_never=own.told_not_to,
        **bounds(store, replace(recipe.bound, start=start)), **transfer, **mbpp,
    ), about  # fmt: skip
