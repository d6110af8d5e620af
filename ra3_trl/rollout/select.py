"""Chooses the engine, and checks it on the very model it is to run on: an engine is exact or it refuses.

The list of architectures that the branch engine is exact for changes with every release of transformers, so none is
kept here. A made-up document is scored by both engines instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from torch import nn

from ..records import Action, Boundary, Document, Latent, RolloutGroup, TokenTable
from .backbone import Backbone, evaluating
from .branch import BranchEngine
from .engine import RolloutEngine
from .expand import ExpandEngine
from .noise import keyed_uniform
from .sampler import SamplingParams


logger = logging.getLogger(__name__)
ENGINES = ("auto", "branch", "expand")
_LINE, _THINK = 5, (1, 3)  # tokens of a made-up line; lengths of the made-up think prefixes
# Right engines differ by at most 1.2 times what one rounding of the embeddings does (13 architectures in bfloat16 and
# float16, logits up to 200, router flips included), engines that ignore a window or soft-capping by 9.6 and more.
_ROUNDINGS = 4
_LONGEST_WINDOW = 1024  # of sliding attention: a document beyond it would make the check itself slow


def build_engine(
    name: str, backbone: Backbone, table: TokenTable, params: SamplingParams, max_branch_tokens: int = 8192
) -> RolloutEngine:
    """Makes the rollout engine called `name`, checked on the model: `"branch"` (shared prefixes; refused when not
    exact on this model), `"expand"` (repeated prefixes; any model that can generate) or `"auto"` (the first if exact,
    else the second with one warning that says why).

    Raises:
        `ValueError`: if there is no such engine, the model's logits are not head(hidden states), or `name` is
        `"branch"` and the branch engine is not exact on this model.
    """
    if name not in ENGINES:
        raise ValueError(f"`engine` is {name!r}; choose one of {', '.join(map(repr, ENGINES))}.")
    expand = ExpandEngine(backbone, table, params, max_branch_tokens)
    made_up = _made_up(backbone, table, params)
    with torch.no_grad(), evaluating(backbone.model):
        _check_head(backbone, made_up.document)
        if name == "expand":
            return expand
        branch = BranchEngine(backbone, table, params, max_branch_tokens)
        reason = _difference(branch, expand, made_up)
    if reason is None:
        return branch
    model = type(backbone.causal_lm).__name__
    if name == "branch":
        raise ValueError(f"`engine` is 'branch', which is not exact on {model}: {reason}. Use 'expand' or 'auto'.")
    logger.warning("The branch engine is not exact on %s, so `expand` is used: %s.", model, reason)
    return expand


def _made_up(backbone: Backbone, table: TokenTable, params: SamplingParams) -> RolloutGroup:
    """Makes up a document of allowed ASCII tokens with four boundaries, and two latents at two of these; no scores."""
    plain = [i for i, b in enumerate(table.token_bytes) if b is not None and b.isascii() and b.strip()]
    usable = [i for i in plain if table.next_state_SV[0, i] == 0 and i not in set(table.stop_ids.tolist())]
    if not usable:
        raise ValueError("the vocabulary has no printable ASCII token besides the stop symbol; use another tokenizer.")
    # The last boundaries stand behind the model's sliding window, so that a window that is not honoured shows.
    config = backbone.causal_lm.config.get_text_config().to_dict()
    window = config.get("sliding_window") or 0
    room = (config.get("max_position_embeddings") or 4096) - 4 * _LINE - params.max_length
    lines = max(8, min(window if window <= _LONGEST_WINDOW else 0, room) // _LINE + 4)
    numbers = keyed_uniform(0, np.arange(1 + lines * _LINE + 32))
    ids = [usable[int(u * len(usable))] for u in numbers]
    boundaries = (2, 3, lines - 3, lines - 2)
    actions = []
    for i in range(lines):
        think = _THINK[i % 2]
        boundary = Boundary(tuple(ids[-think:]), (table.stop_id, *ids[-8 : -7 + i % 2])) if i in boundaries else None
        actions.append(Action(i, 1 + i * _LINE, 1 + (i + 1) * _LINE, boundary))
    document = Document(0, 0, tuple(ids[: 1 + lines * _LINE]), tuple(actions), context=1)
    latents = []  # of several lengths, the longest cut; their tokens are those behind the document's
    for begin, length in ((-30, 3), (-24, 2), (-20, 1), (-16, 4)):
        tokens = tuple(ids[begin : begin + min(length, params.max_length)])
        stopped = len(tokens) < params.max_length
        kept = (torch.arange(backbone.vocab_size),) * (len(tokens) + stopped) if params.truncated else None
        latents.append(Latent(tokens, stopped, (0.0,) * (len(tokens) + stopped), kept))
    groups, none = (tuple(latents[:2]), tuple(latents[2:])), torch.empty(0)
    return RolloutGroup(document, (boundaries[0], boundaries[-2]), groups, none, none, none, none)


def _check_head(backbone: Backbone, document: Document) -> None:
    """Refuses a model whose logits are not head(hidden states): no engine would be exact on it."""
    ids = torch.tensor([document.input_ids[: 4 * _LINE]], device=backbone.device)
    models = backbone.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    ours = backbone.logits(backbone.hidden(input_ids=ids)[0])
    bound = max(1e-3, 4 * _eps(backbone)) * max(1.0, float(models.abs().max()))
    difference = float((models - ours).abs().max()) if models.shape == ours.shape else float("nan")
    if not difference <= bound:
        raise ValueError(
            f"`model` is a {type(backbone.causal_lm).__name__}, whose logits are not its output embeddings applied to "
            f"its last hidden states (largest difference {difference:.3g}, bound {bound:.3g}); use another "
            "architecture, or `trainer.policy` for a model that a trainer has prepared for mixed precision."
        )


def _eps(backbone: Backbone) -> float:
    """Relative size of a rounding in the model's matrix products."""
    tf32 = backbone.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(torch.finfo(backbone.causal_lm.dtype).eps, 2.0**-10 if tf32 else 0.0)


@contextmanager
def _rounding(backbone: Backbone) -> Iterator[None]:
    """Puts every embedded number one unit in its last place off inside, to see what the model makes of rounding."""
    generator, eps = torch.Generator().manual_seed(0), _eps(backbone)

    def disturb(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        sign = 1 - 2 * torch.randint(0, 2, output.shape, generator=generator)
        return output * (1 + eps * sign).to(output)

    handle = backbone.causal_lm.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()


def _largest(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each kind of number, where both are finite."""
    both = {kind: torch.isfinite(expected[kind]) & torch.isfinite(actual[kind]) for kind in expected}
    return {kind: float((expected[kind] - actual[kind])[finite].abs().max()) for kind, finite in both.items()}


def _difference(branch: BranchEngine, expand: ExpandEngine, made_up: RolloutGroup) -> str | None:
    """Says why the branch engine may not be used; `None` when it agrees with the expand engine."""
    expected = _numbers(expand, made_up)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its warning about the attention interface is told in ours
    try:
        actual = _numbers(branch, made_up)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}".rstrip(".")
    finally:
        transformers.logging.set_verbosity(verbosity)
    for kind, numbers in expected.items():
        if not torch.equal(torch.isfinite(numbers), torch.isfinite(actual[kind])):
            return f"{kind}: finite in other places than the `expand` engine's"
    # A fixed bound would refuse right engines of models with large logits and let broken windows pass.
    with _rounding(expand.backbone):
        noise = max(_largest(expected, _numbers(expand, made_up)).values())
    bound = max(1e-3, _ROUNDINGS * noise)
    for kind, difference in _largest(expected, actual).items():
        if not difference <= bound:
            return f"{kind} differ by up to {difference:.3g} nats from the `expand` engine's (bound {bound:.2g})"
    return None


def _numbers(engine: RolloutEngine, made_up: RolloutGroup) -> dict[str, torch.Tensor]:
    """Lists all that an engine is asked for, by what an error calls it."""
    group = engine.score(made_up.document, made_up.boundaries, made_up.latents, 2)
    policy = engine.log_probs(group, slice(0, len(group.boundaries)))
    return {
        "line log-probs": group.line_logps_A,
        "gate log-probs": group.gate_logps_A,
        "line log-probs under latents": group.latent_line_logps_TGH,
        "gate log-probs under latents": group.latent_gate_logps_TGH,
        "gradient pass's gate log-probs": policy.gate_T.float().cpu(),
        "gradient pass's latent log-probs": policy.token_n.float().cpu(),
    }
