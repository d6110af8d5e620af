"""Looks at a text with a policy: P(think) at each boundary, the latents it would write there, what they bring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..config import RA3Config
from ..losses import compute_returns
from ..policy import Policy
from ..records import Document, RolloutGroup
from ..segmentation import ActionFormat, readable_bytes
from .show import ShownBoundary, ShownFile, ShownLatent, physical_lines


_SETTINGS = (
    "num_latents", "seed", "action_format", "horizon", "discount", "line_reduction", "max_latent_length",
    "temperature", "top_k", "top_p", "max_length",
)  # fmt: skip


def look(
    policy: Policy,
    text: str,
    name: str = "text.py",
    checkpoint: str = "this policy",
    lines: range | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    latents: bool = True,
) -> ShownFile:
    """Draws latents at the boundaries of a text and measures what they bring.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            The checkpoint; its settings say how many latents, and over how many lines.
        text (`str`):
            The text.
        name (`str`, *optional*), checkpoint (`str`, *optional*):
            What to call the two; colours follow from the file's name.
        lines (`range`, *optional*):
            Line numbers, from 1, to show; all by default.
        progress (`Callable[[int, int], None]`, *optional*):
            Told after each chunk how many boundaries are done, and of how many.
        latents (`bool`, *optional*, defaults to `True`):
            Whether to draw any; without them it is one forward a chunk.

    Raises:
        `ValueError`: if the tokenizer does not give the text back.
    """
    args, documents, action_format = policy.args, policy.segment(text), policy.segmenter.format
    lines = lines or range(1, len(physical_lines(text)) + 1)
    if not documents or documents[0].status == "lossy":
        raise ValueError("the tokenizer of this checkpoint does not give the text back; take another checkpoint.")
    data = readable_bytes(policy.tokenizer, action_format)
    content, wanted, begins = text.encode(), [], []
    for document, starts in zip(documents, _action_starts(content, documents, data), strict=True):
        places = {boundary: _locate(content, starts[boundary]) for boundary in document.boundaries}
        wanted.append({b: place for b, place in places.items() if place[0] in lines})
        begins.append([_line(content, start) for start in starts] if places and latents else [])
    total, shown = sum(map(len, wanted)), list[ShownBoundary]()
    progress(0, total)
    for document, places, begin in zip(documents, wanted, begins, strict=True):
        if not places:
            continue
        with policy.inference():
            group = policy.rollout(document, tuple(places)) if latents else policy.trunk(document)
            over = over_elsewhere(policy, group) if latents else []
        gains_TGH = gains_by_line(group, args) if latents else torch.zeros(0)
        by_head = {}
        if policy.head is not None:
            log_think, gain, _ = policy.head.predict(group.states_SD)
            values = zip(log_think.exp().tolist(), gain.tolist(), strict=True)
            by_head = dict(zip(document.boundaries, values, strict=True))
        for t, (boundary, (line, column, carry)) in enumerate(places.items()):
            mark = _decode(document.actions[boundary].boundary.think, data)
            indent = "" if carry is None else carry + mark[: len(mark) - len(mark.lstrip())]
            prob = float(group.gate_logps_A[boundary].exp())
            other, predicted = by_head.get(boundary, (None, None))
            if group.head_logps_A is not None:  # the head decides
                prob, other = other, prob
            bare = ShownBoundary(line, column, indent, prob, (), other, predicted)
            if not latents:
                shown.append(bare)
                continue
            ahead = _scored(document, boundary, args.horizon)
            drawn = _latents(group, t, gains_TGH[t, :, : len(ahead)], data, action_format)
            shown.append(replace(bare, latents=drawn, over_elsewhere=over[t], ahead=tuple(begin[i] for i in ahead)))
        progress(len(shown), total)
    settings, decides = (
        {field: getattr(args, field) for field in _SETTINGS},
        "head" if args.gate == "head" else "tokens",
    )
    return ShownFile(name, text, checkpoint, tuple(shown), lines[0], lines[-1], settings, decides)


def gains_by_line(group: RolloutGroup, args: RA3Config) -> torch.Tensor:
    """Splits gains by the lines of the horizon, `[T, G, H]` in nats; they add up to `compute_returns(...).gain_TG`."""
    shape = (*group.latent_line_logps_TGH.shape[:2], 1)
    horizons = range(1, args.horizon + 1)
    upto = [compute_returns(group, h, args.discount, args.line_reduction).gain_TG for h in horizons]
    return torch.stack(upto, -1).diff(prepend=torch.zeros(shape))


def _scored(document: Document, boundary: int, horizon: int) -> range:
    """The actions that a gain is of: those of the horizon, up to a kept comment or the end."""
    end = min(boundary + horizon, len(document.actions))
    return range(boundary, next((i for i in range(boundary, end) if document.actions[i].comment), end))


def over_elsewhere(policy: Policy, group: RolloutGroup) -> list[float] | list[None]:
    """Measures what the latents at each boundary bring more than those drawn half the group's boundaries away, in
    nats; nothing where there is one boundary only."""
    # Half the way round: of the next boundary a latent may still tell something.
    count = len(group.boundaries)
    if count < 2:
        return [None] * count
    latents = [group.latents[(t + count // 2) % count] for t in range(count)]
    horizon = group.latent_line_logps_TGH.shape[2]
    instead = policy.engine.score(group.document, group.boundaries, latents, horizon)
    own, others = (compute_returns(g, horizon, policy.args.discount).latent_TG for g in (group, instead))
    return (own.mean(1) - others.mean(1)).tolist()


def _latents(
    group: RolloutGroup, t: int, gains_GH: torch.Tensor, data: Sequence[bytes | None], action_format: ActionFormat
) -> tuple[ShownLatent, ...]:
    """The different latents of a boundary with their counts, the most often drawn and likeliest first."""
    end = "" if action_format.end == "\n" else action_format.end
    counts = Counter((z.token_ids, z.stopped) for z in group.latents[t])
    latents = {}
    for latent, gains in zip(group.latents[t], gains_GH.tolist(), strict=True):
        key = (latent.token_ids, latent.stopped)
        text = action_format.think + _decode(latent.token_ids, data) + end
        latents[key] = ShownLatent(text, counts[key], latent.stopped, sum(latent.logps), sum(gains), tuple(gains))
    return tuple(sorted(latents.values(), key=lambda z: (-z.count, -z.logp)))


def _decode(ids: Sequence[int], data: Sequence[bytes | None]) -> str:
    return b"".join(data[i] or b"" for i in ids).decode()


def _action_starts(content: bytes, documents: Sequence[Document], data: Sequence[bytes | None]) -> list[list[int]]:
    """Finds the byte at which each action of each document begins."""
    # Counted from the end, which needs neither BOS nor the dummy space that SentencePiece puts in front.
    at, starts = len(content), list[list[int]]()
    for document in reversed(documents):
        of_document = []
        for action in reversed(document.actions):
            at -= sum(len(data[i] or b"") for i in document.input_ids[action.start : action.end])
            of_document.append(max(at, 0))
        starts.append(of_document[::-1])
    return starts[::-1]


def _line(content: bytes, start: int) -> int:
    """Finds the number of the line in which the first character from `start` on that is not white space stands."""
    return content.count(b"\n", 0, len(content) - len(content[start:].lstrip())) + 1


def _locate(content: bytes, start: int) -> tuple[int, int, str | None]:
    """Finds line and column of an action's first character that is not white space, and the white space of that line
    which stands before the action; `None` where the action begins elsewhere (a sentence behind another)."""
    at = len(content) - len(content[start:].lstrip())
    begin = content.rfind(b"\n", 0, at) + 1
    before = content[begin:at].decode()
    column = len(before) if before.strip() else 0
    carry = None if column or start < begin else content[begin:start].decode()
    return _line(content, start), column, carry
