"""The E-step's extra rewards: terms beside the lines' log-likelihood, in the manner of TRL's `reward_funcs`."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from .config import RA3Config
from .losses import Returns
from .policy import token_text
from .records import RolloutGroup
from .rollout import horizon_lines


LIKELIHOOD = "log_likelihood"
RewardFunc = Callable[..., Any]  # numbers or `None`, one for each latent; or a coroutine of them


@dataclass(frozen=True)
class Reward:
    """The reward of a group's latents: returns under the whole of it, its `terms` `[T, G]`, not weighted, and columns
    that functions logged `extra`, one value for each latent."""

    returns: Returns
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, list] = field(default_factory=dict)


class RewardPlugIns:
    """The E-step's reward as a weighted sum: the lines' log-likelihood and what `funcs` return.

    A function is called once for each document, by keyword, with lists of one entry for each latent of each boundary:

    - `prompts` (`str`): the text before the latent, think prefix included;
    - `completions` (`str`), `completion_ids` (`list[int]`): the latent;
    - `expert_lines` (`str`): the lines that the latent is credited with;
    - `log_likelihood`, `log_likelihood_no_think` (`float`): return of these lines with and without the latent, nats;
    - each other column of the training data, the document's cell for each latent;

    and with what TRL's `GRPOTrainer` gives besides:

    - `trainer_state` ([`~transformers.TrainerState`]);
    - `log_metric` (`Callable[[str, float], None]`): logs a number, averaged over calls;
    - `log_extra` (`Callable[[str, list], None]`): adds a column of one value for each latent to the tables of latents.

    It takes `**kwargs`, since more may come, and returns one number for each latent; `None` counts as 0. Coroutine
    functions run side by side.

    Args:
        funcs (`Sequence[Callable]`):
            The functions.
        weights (`Sequence[float]`, *optional*):
            Their weights; `None` is 1 for each.
        likelihood_weight (`float`):
            Weight of the log-likelihood; 0 replaces it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            To read the texts.
        horizon (`int`):
            Lines that a latent is credited with.

    Raises:
        `ValueError`: for what is no function, two of one name, or a wrong number of weights.
    """

    def __init__(
        self,
        funcs: Sequence[Any],
        weights: Sequence[float] | None,
        likelihood_weight: float,
        tokenizer: PreTrainedTokenizerBase,
        horizon: int,
    ):
        if odd := next((func for func in funcs if not callable(func)), None):
            raise ValueError(f"`reward_funcs` holds {odd!r}, which is no function; pass functions.")
        self.funcs = {_name(func): func for func in funcs}
        if len(self.funcs) < len(funcs) or LIKELIHOOD in self.funcs:
            raise ValueError(
                f"`reward_funcs` has the names {[_name(f) for f in funcs]}; each function needs a name of its own, "
                f"other than {LIKELIHOOD!r}: set `__name__`."
            )
        for name, func in self.funcs.items():
            if not _takes_anything(func):
                raise ValueError(
                    f"`reward_funcs`: {name} takes no `**kwargs`; let it, since more may be given than it names."
                )
        if not funcs and not likelihood_weight:
            raise ValueError("`likelihood_weight` is 0 and there are no `reward_funcs`: nothing would be rewarded.")
        if weights is not None and len(weights) != len(funcs):
            raise ValueError(
                f"`reward_weights` has {len(weights)} numbers for {len(funcs)} `reward_funcs`; give one each."
            )
        # By name, since logs and checkpoints know the functions by it.
        self.weights = dict(zip(self.funcs, weights or [1.0] * len(funcs), strict=True))
        self.likelihood_weight = likelihood_weight
        self.tokenizer = tokenizer
        self.horizon = horizon
        self.state: TrainerState | None = None
        self.log_metric: Callable[[str, float], Any] = lambda name, value: None

    @classmethod
    def of(
        cls, args: RA3Config, tokenizer: PreTrainedTokenizerBase, funcs: RewardFunc | Sequence[RewardFunc] | None
    ) -> RewardPlugIns | None:
        """The reward that a trainer's arguments describe; `None` where it is the likelihood alone."""
        several: list[Any] = list(funcs) if isinstance(funcs, (list, tuple)) else [] if funcs is None else [funcs]
        if not several and args.likelihood_weight == 1 and args.reward_weights is None:
            return None
        return cls(several, args.reward_weights, args.likelihood_weight, tokenizer, args.horizon)

    def __call__(self, group: RolloutGroup, returns: Returns) -> Reward:
        """The whole reward of a group's latents."""
        terms, extra = {LIKELIHOOD: returns.latent_TG}, dict[str, list]()
        if group.boundaries:
            terms |= self._call(self._columns(group, returns), returns.latent_TG, extra)
        latent_TG = self.likelihood_weight * returns.latent_TG
        for name, weight in self.weights.items():
            latent_TG = latent_TG + weight * terms.get(name, 0.0)
        return Reward(Returns(self.likelihood_weight * returns.act_T, latent_TG), terms, extra)

    def _columns(self, group: RolloutGroup, returns: Returns) -> dict[str, Any]:
        ids, actions = group.document.input_ids, group.document.actions
        columns: dict[str, Any] = {name: [] for name in ("prompts", "completions", "completion_ids", "expert_lines")}
        for boundary, row in zip(group.boundaries, group.latents, strict=True):
            action = actions[boundary]
            assert action.boundary is not None
            end = actions[boundary + horizon_lines(group.document, boundary, self.horizon) - 1].end
            before, lines = [*ids[: action.start], *action.boundary.think], ids[action.start : end]
            columns["prompts"] += [token_text(self.tokenizer, before)] * len(row)
            columns["expert_lines"] += [token_text(self.tokenizer, lines)] * len(row)
            columns["completions"] += [token_text(self.tokenizer, z.token_ids) for z in row]
            columns["completion_ids"] += [list(z.token_ids) for z in row]
        columns["log_likelihood"] = returns.latent_TG.flatten().tolist()
        columns["log_likelihood_no_think"] = returns.act_T.repeat_interleave(returns.latent_TG.shape[1]).tolist()
        of_row = {k: v for k, v in group.document.row.items() if k not in ("prompt", "completion")}
        of_row = {name: [value] * returns.latent_TG.numel() for name, value in of_row.items()}
        return of_row | columns

    def _call(self, columns: dict[str, Any], like_TG: torch.Tensor, extra: dict[str, list]) -> dict[str, torch.Tensor]:
        """What each function says, `[T, G]`; `extra` gets the columns that they log. Coroutines run side by side."""

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != like_TG.numel():
                raise ValueError(
                    f"`log_extra` gets {len(values)} values of {column!r} for {like_TG.numel()} latents; one each."
                )
            extra[column] = list(values)

        given = columns | {"trainer_state": self.state, "log_metric": self.log_metric, "log_extra": log_extra}
        for name, func in self.funcs.items():
            try:
                inspect.signature(func).bind(**given)
            except TypeError as error:
                raise ValueError(
                    f"`reward_funcs`: {name} can't be called ({error}); it may ask for {sorted(given)}, columns of "
                    "the training data among them."
                ) from None
        returned = {name: func(**given) for name, func in self.funcs.items()}
        pending = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
        if pending:
            returned |= zip(pending, _wait_for(list(pending.values())), strict=True)
        return {name: self._numbers(name, value, like_TG) for name, value in returned.items()}

    def _numbers(self, name: str, returned: Any, like_TG: torch.Tensor) -> torch.Tensor:
        try:
            values = torch.tensor([0.0 if value is None else float(value) for value in returned], dtype=like_TG.dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`reward_funcs`: {name} returned {str(returned)[:60]!r}; return one number (or None) for each latent."
            ) from error
        if len(values) != like_TG.numel() or not torch.isfinite(values).all():
            raise ValueError(
                f"`reward_funcs`: {name} returned {len(values)} numbers, "
                f"{int((~torch.isfinite(values)).sum())} of them not finite, for {like_TG.numel()} latents; "
                "return one finite number (or None) for each."
            )
        return values.view_as(like_TG)


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of a `process`'s coroutines, in a thread of its own, as a notebook's thread has a loop that runs. One
    for all calls, since clients that coroutines keep are bound to theirs."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="ra3-rewards", daemon=True).start()
    return loop


def _wait_for(pending: Sequence[Awaitable[Any]]) -> list[Any]:
    async def together() -> list[Any]:
        return await asyncio.gather(*pending)

    return asyncio.run_coroutine_threadsafe(together(), _event_loop(os.getpid())).result()


def _takes_anything(func: RewardFunc) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(func).parameters.values())


def _name(func: RewardFunc) -> str:
    return getattr(func, "__name__", type(func).__name__)
