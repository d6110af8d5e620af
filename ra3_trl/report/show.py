"""What a checkpoint sees in a file, as records, as rows of highlighted lines, and printed to a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from statistics import fmean

from pygments.lexers import get_lexer_for_filename
from pygments.lexers.special import TextLexer
from pygments.token import Comment, Keyword, Name, Number, String, Token
from pygments.util import ClassNotFound
from rich.console import Console
from rich.text import Text

from ..analysis import shares


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
    what it adds to the log-likelihood of the next lines, and `by_line` what of it each of them has.
    """

    text: str
    count: int
    stopped: bool
    logp: float
    gain: float
    by_line: tuple[float, ...] = ()


@dataclass(frozen=True)
class ShownBoundary:
    """A place where a latent may stand: before character `column` of line `line`, both as a reader sees them.

    `line` counts from 1; `column` is 0 where nothing but white space stands before. `think_prob` is the P(think) that
    decides, `other_prob` that of the other of tokens and abstraction head, if there is a head; `predicted_gain` (nats)
    is the head's. `latents`: the one drawn most often first, of these the likeliest. `over_elsewhere` (nats) is what
    they bring more, on average, than as many that were drawn at another boundary of the file; `ahead` are the numbers
    of the lines that gains are of.
    """

    line: int
    column: int
    indent: str
    think_prob: float
    latents: tuple[ShownLatent, ...]
    other_prob: float | None = None
    predicted_gain: float | None = None
    over_elsewhere: float | None = None
    ahead: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line, or a piece of one that has boundaries inside (`number` is `None` from the second on), and the boundary
    before it."""

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
        """Sums up: `boundaries`, mean `think_prob`, `expected_latents` (the sum), and over all that were drawn the
        mean `gain` (nats) and the share that `helps`. Means of nothing are 0."""
        probs = [b.think_prob for b in self.boundaries]
        gains = [z.gain for b in self.boundaries for z in b.latents for _ in range(z.count)]
        return {
            "boundaries": len(probs),
            "think_prob": fmean(probs or [0]),
            "expected_latents": sum(probs),
            "gain": fmean(gains or [0]),
            "helps": fmean([gain > 0 for gain in gains] or [0]),
        }

    @property
    def over_elsewhere(self) -> float | None:
        """What latents bring more than those drawn at another boundary of the file, on average; `None` for one."""
        known = [b.over_elsewhere for b in self.boundaries if b.over_elsewhere is not None]
        return fmean(known) if known else None

    def sameness(self) -> tuple[float, str, float] | None:
        """Finds the share of different ones among all that were drawn, the most frequent, and its share."""
        texts = Counter[str]()
        for boundary in self.boundaries:
            for latent in boundary.latents:
                texts[latent.text] += latent.count
        return shares(texts) if texts else None

    def rows(self) -> Iterator[Row]:
        """Yields the lines shown, each once and in order; their runs join to the line without its end."""
        at: dict[int, list[ShownBoundary]] = {}
        for boundary in self.boundaries:
            at.setdefault(boundary.line, []).append(boundary)
        for number, runs in enumerate(highlight(self.name, self.text), 1):
            if not self.first <= number <= self.last:
                continue
            shown: int | None = number
            here, begin = None, 0
            for boundary in at.get(number, []):
                if boundary.column:
                    yield Row(shown, cut_runs(runs, begin, boundary.column), here)
                    begin, shown = boundary.column, None
                here = boundary
            yield Row(shown, cut_runs(runs, begin, None), here)


def physical_lines(text: str) -> list[str]:
    """Splits off lines without their ends; what follows the last newline is a line if there is any.

    Example: `"a\\r\\n\\nb\\n"` has the lines `"a"`, `""` and `"b"`.
    """
    rows = [row.removesuffix("\r") for row in text.split("\n")]
    return rows[:-1] if text.endswith("\n") else rows


def visible(text: str) -> str:
    """Replaces control characters and marks of direction by characters that can be seen; tabs stay."""
    return text.translate(_VISIBLE)


def highlight(name: str, text: str) -> list[Runs]:
    """Finds the runs of each physical line of a file of that name."""
    try:
        lexer = get_lexer_for_filename(name)
    except ClassNotFound:
        lexer = TextLexer()
    # Lexers are asked for offsets only: their own text has other line ends.
    tokens = [(token, value) for _, token, value in lexer.get_tokens_unprocessed(text)]
    if "".join(value for _, value in tokens) != text:  # a lexer that leaves something out
        tokens = [(Token, text)]
    kinds, rows, at = list[str](), list[Runs](), 0  # kinds by character
    for token, value in tokens:
        kinds += [next((kind for parent, kind in _KINDS if token in parent), "")] * len(value)
    for line in physical_lines(text):
        runs = groupby(zip(line, kinds[at : at + len(line)], strict=True), key=itemgetter(1))
        rows.append([(kind, "".join(character for character, _ in run)) for kind, run in runs])
        at = text.find("\n", at) + 1
    return rows


def cut_runs(runs: Runs, begin: int, end: int | None = None) -> Runs:
    """Takes the characters `begin` to `end` of some runs."""
    out, at = [], 0
    for kind, text in runs:
        piece = text[max(begin - at, 0) : None if end is None else max(end - at, 0)]
        at += len(text)
        if piece:
            out.append((kind, piece))
    return out


def print_file(shown: ShownFile, console: Console) -> None:
    """Prints a file to a terminal, or as plain text where `console` is none."""
    # A terminal gets wrapped lines, beside the columns of numbers; a pipe gets each line whole.
    sums, wrap = shown.summary(), not console.is_terminal
    title = Text.assemble((visible(shown.name), "bold"), " as seen by ", (visible(shown.checkpoint), "bold"))
    console.print(title, soft_wrap=wrap)
    for line in (
        f"Boundaries: {sums['boundaries']}, mean P(think) {sums['think_prob']:.3f}, expected latents "
        f"{sums['expected_latents']:.1f}; mean gain {sums['gain']:+.2f} nats, above 0 for {sums['helps']:.0%}.",
        *_sameness_lines(shown),
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
            # The square root, as in the page's shades: P(think) is mostly small.
            bar = bars[round(boundary.think_prob**0.5 * (len(bars) - 1))]
            cells[1] = f"{boundary.think_prob:6.3f} {bar}"
            if extra:
                cells[2:4] = [f"{boundary.other_prob:6.3f}", f"{boundary.predicted_gain:+9.2f}"]
        code = Text.assemble(*((visible(text), _STYLES.get(kind, "")) for kind, text in row.runs))
        _print_row(console, cells, code)


def _sameness_lines(shown: ShownFile) -> list[str]:
    """Says whether the latents tell anything about where they stand."""
    lines = []
    if (found := shown.sameness()) is not None:
        different, text, share = found
        lines.append(f"Of all latents drawn {different:.0%} are different; {share:.0%} are {visible(text)!r}.")
    if shown.over_elsewhere is not None:
        lines.append(
            f"A latent brings {shown.over_elsewhere:+.2f} nats more than one drawn at another boundary of this file: "
            "near 0 latents tell nothing about where they stand."
        )
    return lines


def _print_latent(console: Console, boundary: ShownBoundary, cells: list[str]) -> None:
    """Prints the latent drawn most often above the line whose empty `cells` these are."""
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
    for i, piece in enumerate(folded):
        gutter = Text(numbers if i == 0 else " " * len(numbers), style)
        console.print(Text.assemble(gutter, (edge, "dim"), piece), soft_wrap=True)
