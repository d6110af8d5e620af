"""A file as a checkpoint sees it: P(think) at each boundary, the latents it would write there, what they bring."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from pygments.lexers import get_lexer_for_filename
from pygments.lexers.special import TextLexer
from pygments.token import Comment, Keyword, Name, Number, String, Token
from pygments.util import ClassNotFound
from rich.console import Console
from rich.text import Text
from torch import nn

from ..config import RA3Config
from ..losses import compute_returns
from ..records import Document, RolloutGroup
from ..rollout import NoiseKey, RolloutEngine
from ..segmentation import ActionFormat


Runs = list[tuple[str, str]]  # kind of token ("" is plain) and text

_KINDS = (
    (Comment, "comment"), (Keyword, "keyword"), (String, "string"), (Number, "number"), (Name.Function, "name"),
    (Name.Class, "name"), (Name.Decorator, "name"), (Name.Builtin, "builtin"),
)  # fmt: skip
_STYLES = {
    "comment": "dim", "keyword": "magenta", "string": "yellow", "number": "cyan", "name": "bold", "builtin": "cyan",
}  # fmt: skip
_BARS = " ▁▂▃▄▅▆▇█"
# Control characters could rewrite what a terminal shows, marks of direction what a reader sees.
_VISIBLE = {i: chr(0x2400 + i) for i in range(0x20) if i != 0x09} | {0x7F: "␡"}
_VISIBLE |= {i: f"\\u{i:04x}" for i in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_VISIBLE |= {i: f"\\u{i:04x}" for i in (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF)}


@dataclass(frozen=True)
class ShownLatent:
    """A latent that was drawn `count` times at a boundary.

    `text` is what would stand in the file, marker included and indentation not: `"# empty list"`. `stopped` is whether
    it ended by itself. `logp` (nats) is of its symbols, the stop included, once thinking has begun; `gain` (nats) is
    what it adds to the log-likelihood of the next lines.
    """

    text: str
    count: int
    stopped: bool
    logp: float
    gain: float


@dataclass(frozen=True)
class ShownBoundary:
    """A place where a latent may stand: before character `column` of line `line`, both as a reader sees them.

    `line` counts from 1; `column` is 0 where nothing but white space stands before. `think_prob` is the P(think) that
    decides, `other_prob` that of the other of tokens and abstraction head, if there is a head; `predicted_gain` (nats)
    is the head's. `latents`: the one drawn most often first, of these the likeliest.
    """

    line: int
    column: int
    indent: str
    think_prob: float
    latents: tuple[ShownLatent, ...]
    other_prob: float | None = None
    predicted_gain: float | None = None


@dataclass(frozen=True)
class Row:
    """What is shown in a row: a line, or a piece of one that has boundaries inside (`number` is `None` from the second
    on), and the boundary before it."""

    number: int | None
    runs: Runs
    boundary: ShownBoundary | None


@dataclass(frozen=True)
class ShownFile:
    """A text and its boundaries in order, of which the lines `first` to `last` (1-based, both included) are shown.

    `decides` is what P(think) is of, `"tokens"` or `"head"`; `settings` are shown as they are.
    """

    name: str
    text: str
    checkpoint: str
    boundaries: tuple[ShownBoundary, ...]
    first: int
    last: int
    settings: dict[str, object]
    decides: str = "tokens"

    @property
    def has_head(self) -> bool:
        return any(b.predicted_gain is not None for b in self.boundaries)

    def summary(self) -> dict[str, float]:
        """`boundaries`, mean `think_prob`, `expected_latents` (the sum), and over all that were drawn the mean `gain`
        (nats) and the share that `helps`. Means of nothing are 0."""
        probs = [b.think_prob for b in self.boundaries]
        gains = [z.gain for b in self.boundaries for z in b.latents for _ in range(z.count)]
        return {
            "boundaries": len(probs),
            "think_prob": fmean(probs or [0]),
            "expected_latents": sum(probs),
            "gain": fmean(gains or [0]),
            "helps": fmean([gain > 0 for gain in gains] or [0]),
        }

    def rows(self) -> Iterator[Row]:
        """The lines shown, each once and in order; their runs join to the line without its end."""
        at: dict[int, list[ShownBoundary]] = {}
        for boundary in self.boundaries:
            at.setdefault(boundary.line, []).append(boundary)
        for number, runs in enumerate(highlight(self.name, self.text), 1):
            if not self.first <= number <= self.last:
                continue
            here, begin, shown = None, 0, number
            for boundary in at.get(number, []):
                if boundary.column:
                    yield Row(shown, _part(runs, begin, boundary.column), here)
                    begin, shown = boundary.column, None
                here = boundary
            yield Row(shown, _part(runs, begin, None), here)


def physical_lines(text: str) -> list[str]:
    """Lines without their ends; what follows the last newline is a line if there is any.

    Example: `"a\\r\\n\\nb\\n"` has the lines `"a"`, `""` and `"b"`.
    """
    rows = [row.removesuffix("\r") for row in text.split("\n")]
    return rows[:-1] if text.endswith("\n") else rows


def visible(text: str) -> str:
    """`text` with control characters and marks of direction as characters that can be seen; tabs stay."""
    return text.translate(_VISIBLE)


def highlight(name: str, text: str) -> list[Runs]:
    """Runs of each physical line of a file of that name. Lexers are asked for offsets only: their own text has other
    line ends."""
    try:
        lexer = get_lexer_for_filename(name)
    except ClassNotFound:
        lexer = TextLexer()
    tokens = [(token, value) for _, token, value in lexer.get_tokens_unprocessed(text)]
    if "".join(value for _, value in tokens) != text:  # a lexer that leaves something out
        tokens = [(Token, text)]
    rows: list[Runs] = [[]]
    for token, value in tokens:
        kind = next((kind for parent, kind in _KINDS if token in parent), "")
        for i, part in enumerate(value.split("\n")):
            if i:
                rows.append([])
            if part and rows[-1] and rows[-1][-1][0] == kind:
                part = rows[-1].pop()[1] + part
            if part:
                rows[-1].append((kind, part))
    lines = physical_lines(text)
    return [_part(runs, 0, len(line)) for runs, line in zip(rows, lines, strict=False)]


def _part(runs: Runs, begin: int, end: int | None) -> Runs:
    """Characters `begin` to `end` of some runs."""
    out, at = [], 0
    for kind, text in runs:
        piece = text[max(begin - at, 0) : None if end is None else max(end - at, 0)]
        at += len(text)
        if piece:
            out.append((kind, piece))
    return out


class _Places:
    """Where in a text the actions of its documents begin.

    Counted in bytes from the end, which needs neither BOS nor the dummy space that SentencePiece puts in front.
    """

    def __init__(self, text: str, documents: Sequence[Document], data: Sequence[bytes | None]):
        self.content = text.encode()
        self.rows = [0, *(i + 1 for i, byte in enumerate(self.content) if byte == 0x0A)]
        self.starts: list[list[int]] = []
        at = len(self.content)
        for document in reversed(documents):
            starts = []
            for action in reversed(document.actions):
                at -= sum(len(data[i] or b"") for i in document.input_ids[action.start : action.end])
                starts.append(max(at, 0))
            self.starts.insert(0, starts[::-1])

    def locate(self, chunk: int, boundary: int) -> tuple[int, int, str | None]:
        """Line and column of an action's first character that is not white space, and the white space of that line
        which stands before the action; `None` where the action begins elsewhere (a sentence behind another)."""
        start = at = self.starts[chunk][boundary]
        while self.content[at : at + 1].isspace():
            at += 1
        row = bisect_right(self.rows, at) - 1
        before = self.content[self.rows[row] : at].decode()
        column = len(before) if before.strip() else 0
        carry = None if column or start < self.rows[row] else self.content[self.rows[row] : start].decode()
        return row + 1, column, carry


def look(
    engine: RolloutEngine,
    documents: Sequence[Document],
    text: str,
    data: Sequence[bytes | None],
    action_format: ActionFormat,
    args: RA3Config,
    head: nn.Module | None = None,
    decides: str = "tokens",
    lines: range | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ShownBoundary, ...]:
    """Draws latents at the boundaries of a text and measures what they bring.

    Args:
        engine ([`RolloutEngine`]):
            The checkpoint.
        documents (`Sequence[Document]`):
            All chunks of the text in order.
        text (`str`):
            The text.
        data (`Sequence[bytes | None]`):
            Bytes of each token, as from `readable_bytes`.
        action_format ([`ActionFormat`]):
            What a latent looks like.
        args ([`RA3Config`]):
            `num_latents`, `horizon`, `discount`, `line_reduction`, `seed`.
        head ([`AbstractionHead`], *optional*):
            From hidden states `[S, D]` to think logits and gains `[S]`.
        decides (`str`, *optional*, defaults to `"tokens"`):
            Whose P(think) comes first, that of the `"tokens"` or of the `"head"`.
        lines (`range`, *optional*):
            Line numbers whose boundaries are wanted; all by default.
        progress (`Callable[[int, int], None]`, *optional*):
            Told after each chunk how many boundaries are done, and of how many.
    """
    places = _Places(text, documents, data)
    wanted = []
    for chunk, document in enumerate(documents):
        boundaries = [s for s in document.boundaries if lines is None or places.locate(chunk, s)[0] in lines]
        wanted.append((chunk, document, boundaries))
    total, out = sum(len(boundaries) for _, _, boundaries in wanted), []
    progress(0, total)
    for chunk, document, boundaries in wanted:
        if not boundaries:
            continue
        with torch.no_grad():
            group = engine.rollout(document, boundaries, args.num_latents, args.horizon, NoiseKey(args.seed, 1, 0))
            by_head = {} if head is None else _predictions(head, group)
        gains_TG = compute_returns(group, args.horizon, args.discount, args.line_reduction).gain_TG
        for t, boundary in enumerate(boundaries):
            line, column, carry = places.locate(chunk, boundary)
            mark = _decode(document.actions[boundary].boundary.think, data)
            indent = "" if carry is None else carry + mark[: len(mark) - len(mark.lstrip())]
            latents = _latents(group, t, gains_TG[t].tolist(), data, action_format)
            prob = float(group.gate_logps_A[boundary].exp())
            other, predicted = by_head.get(boundary, (None, None))
            if decides == "head" and other is not None:
                prob, other = other, prob
            out.append(ShownBoundary(line, column, indent, prob, latents, other, predicted))
        progress(len(out), total)
    return tuple(out)


def _predictions(head: nn.Module, group: RolloutGroup) -> dict[int, tuple[float, float]]:
    """P(think) and gain that a head gives, by boundary of the document."""
    logits, gain, *_ = head(group.states_SD)
    values = zip(logits.sigmoid().tolist(), gain.tolist(), strict=True)
    return dict(zip(group.document.boundaries, values, strict=True))


def _latents(
    group: RolloutGroup, t: int, gains: list[float], data: Sequence[bytes | None], action_format: ActionFormat
) -> tuple[ShownLatent, ...]:
    end = "" if action_format.end == "\n" else action_format.end
    counts = Counter((z.token_ids, z.stopped) for z in group.latents[t])
    found = {}
    for latent, gain in zip(group.latents[t], gains, strict=True):
        key = (latent.token_ids, latent.stopped)
        text = action_format.think + _decode(latent.token_ids, data) + end
        found[key] = ShownLatent(text, counts[key], latent.stopped, sum(latent.logps), gain)
    return tuple(sorted(found.values(), key=lambda z: (-z.count, -z.logp)))


def _decode(ids: Sequence[int], data: Sequence[bytes | None]) -> str:
    return b"".join(data[i] or b"" for i in ids).decode()


# ---- terminal ----


def print_file(shown: ShownFile, console: Console) -> None:
    """Prints a file to a terminal, or as plain text where `console` is none.

    Lines are wrapped in a terminal only, beside the columns of numbers.
    """
    found, wrap = shown.summary(), not console.is_terminal
    title = Text.assemble((visible(shown.name), "bold"), " as seen by ", (visible(shown.checkpoint), "bold"))
    console.print(title, soft_wrap=wrap)
    for line in (
        f"Boundaries: {found['boundaries']}, mean P(think) {found['think_prob']:.3f}, expected latents "
        f"{found['expected_latents']:.1f}; mean gain {found['gain']:+.2f} nats, above 0 for {found['helps']:.0%}.",
        f"P(think), by the {shown.decides}: probability of a latent before the line. gain: what the latent above the "
        f"line, of {shown.settings['num_latents']} the one drawn most often, adds to the log-likelihood of the next "
        f"lines (horizon {shown.settings['horizon']}), in nats.",
    ):
        console.print(Text(line, "dim"), soft_wrap=wrap)
    console.print()
    width = max(4, len(str(shown.last)))
    extra = [f"{'tokens' if shown.decides == 'head' else 'head':>6}", f"{'predicted':>9}"] if shown.has_head else []
    _print_row(console, [f"{'line':>{width}}", "P(think)", *extra, f"{'gain':>6}"], Text(), "dim")
    for row in shown.rows():
        cells = [f"{row.number or '':>{width}}", " " * 8, *(" " * len(name) for name in extra), " " * 6]
        if (boundary := row.boundary) is not None:
            _print_latent(console, boundary, cells)
            bars = " " * len(_BARS) if console.options.ascii_only else _BARS
            bar = bars[round(boundary.think_prob**0.5 * (len(bars) - 1))]
            cells[1] = f"{boundary.think_prob:6.3f} {bar}"
            if extra:
                cells[2:4] = [f"{boundary.other_prob:6.3f}", f"{boundary.predicted_gain:+9.2f}"]
        code = Text.assemble(*((visible(text), _STYLES.get(kind, "")) for kind, text in row.runs))
        _print_row(console, cells, code)


def _print_latent(console: Console, boundary: ShownBoundary, cells: list[str]) -> None:
    """The latent drawn most often, above the line whose empty `cells` these are."""
    best, drawn = boundary.latents[0], sum(latent.count for latent in boundary.latents)
    color = "green" if best.gain > 0 else "red"
    text = Text(boundary.indent + visible(best.text) + ("" if best.stopped else " …"), f"italic {color}")
    if best.count > 1:
        text.append(f"  ({best.count} of {drawn})", "dim")
    _print_row(console, [" " * len(cells[0]), *cells[1:-1], f"{best.gain:+6.2f}"], text, color)


def _print_row(console: Console, cells: list[str], text: Text, style: str = "dim cyan") -> None:
    numbers, edge = "  ".join(cells), " | " if console.options.ascii_only else " │ "
    text.expand_tabs(8)
    room = max(console.width - len(numbers) - len(edge), 16)
    folded = text.wrap(console, room, overflow="fold") if console.is_terminal and text.cell_len > room else [text]
    for i, part in enumerate(folded):
        gutter = Text(numbers if i == 0 else " " * len(numbers), style)
        console.print(Text.assemble(gutter, (edge, "dim"), part), soft_wrap=True)
