"""What the page of `ra3 play` shows, as functions of a policy: P(think) while code is typed, latents before a line
with what they bring each of the lines that follow, and completions with and without thinking.

The numbers are those of `ra3 show` ([`look`]); the page itself is in `cli/playground.py`.
"""

from __future__ import annotations

from copy import copy

import torch

from ..generation import readable_end
from ..models import context_length
from ..policy import Policy
from ..segmentation import prompt_ids
from .look import look
from .page import GAIN_SCALE, render
from .show import Row, ShownBoundary, ShownFile, cut_runs, highlight, physical_lines, visible


EXAMPLE = """\
def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
"""
MOST_CHARACTERS = 20_000  # of a text: what a page can show, and look at while somebody types
MOST_LATENTS = 64
MOST_TOKENS = 1024
_ENDINGS = {"python": "py", "python_tags": "py", "slashes": "c", "markdown": "md"}


def see(policy: Policy, text: str, checkpoint: str = "this policy") -> ShownFile:
    """Finds P(think) at each boundary of a text that may not be finished, by one forward.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            The checkpoint.
        text (`str`):
            The text; of one that can't be read to its end, the rows that can.
        checkpoint (`str`, *optional*):
            What to call the policy.

    Returns:
        [`ShownFile`] of what could be read, without latents.

    Raises:
        `ValueError`: for a text that is empty, too long, or can't be read at all.
    """
    read = _readable(policy, text)
    return look(policy, read, _name(policy), checkpoint, latents=False)


def draw(policy: Policy, text: str, line: int, num_latents: int = 8, seed: int = 42) -> ShownFile:
    """Draws latents at the boundary before a line and measures what they bring the lines that follow.

    They are those of `ra3 show` with the same `seed` and `num_latents`.

    Args:
        policy ([`~ra3_trl.policy.Policy`]), text (`str`):
            As for [`see`].
        line (`int`):
            Number of the line, from 1.
        num_latents (`int`, *optional*, defaults to 8), seed (`int`, *optional*, defaults to 42):
            How many, and which.

    Raises:
        `ValueError`: as [`see`]; for a line before which no latent may stand, and numbers out of their range.
    """
    _check_number("num_latents", num_latents, 1, MOST_LATENTS)
    _check_number("seed", seed, 0, 2**31 - 1)
    read = _readable(policy, text)
    args = copy(policy.args)
    args.num_latents, args.seed = int(num_latents), int(seed)
    count = len(physical_lines(read))
    if isinstance(line, int) and 1 <= line <= count:
        shown = look(policy.changed(args=args), read, _name(policy), lines=range(line, line + 1))
        if shown.boundaries:
            return shown
    places = sorted({b.line for b in see(policy, read).boundaries})
    cure = f"choose one of {', '.join(map(str, places))}" if places else "type a second line"
    raise ValueError(f"`line` is {line}, before which no latent may stand; {cure}.")


def complete(
    policy: Policy,
    text: str,
    think: str = "auto",
    threshold: float | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 42,
) -> str:
    """Goes on with a text, with latents where `think` says.

    Args:
        policy ([`~ra3_trl.policy.Policy`]), text (`str`):
            As for [`see`]; all of the text, read or not, is the prompt.
        think (`str`, *optional*, defaults to `"auto"`), threshold (`float`, *optional*):
            As in [`~ra3_trl.AutoModelForCausalLMWithAbstractionHead.generate`], by the P(think) that [`see`] shows: an
            abstraction head's only where it is the policy's gate.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Most tokens, latents counted.
        temperature (`float`, *optional*, defaults to 0), seed (`int`, *optional*, defaults to 42):
            0 takes the likeliest token each time; above it tokens are drawn.

    Returns:
        `str`: the new text.

    Raises:
        `ValueError`: for an empty or too long text, and numbers out of their range.
    """
    _check_text(text)
    _check_number("max_new_tokens", max_new_tokens, 1, MOST_TOKENS)
    _check_number("temperature", temperature, 0, 10)
    _check_number("seed", seed, 0, 2**31 - 1)
    used, context = len(prompt_ids(policy.tokenizer, text)), context_length(policy.backbone.causal_lm)
    if context is not None and used + max_new_tokens > context:
        raise ValueError(
            f"`max_new_tokens` is {max_new_tokens:g} behind {used} tokens of `text`, but the model's context holds "
            f"{context}; lower it or shorten the text."
        )
    drawn = {"temperature": float(temperature), "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    if policy.args.gate != "head":
        policy = policy.changed(head=None)
    tokenizer = policy.tokenizer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        return policy.generate(
            text, think, threshold, max_new_tokens=int(max_new_tokens), do_sample=temperature > 0,
            pad_token_id=padding, **drawn,
        )  # fmt: skip


def _check_text(text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("`text` is empty; type or paste some code.")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"`text` has {len(text):,} characters; {MOST_CHARACTERS:,} are looked at here at most: paste a part of "
            "it, or write its page by `ra3 show CHECKPOINT FILE --html page.html`."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        row = text.count("\n", 0, error.start) + 1
        raise ValueError(
            f"`text` has half of a character in line {row}, which no tokenizer takes; delete it."
        ) from error


def _check_number(name: str, value: float, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"`{name}` is {value!r}; use a number from {least:,} to {most:,}.")


def _readable(policy: Policy, text: str) -> str:
    """The rows of `text` that can be read, from its start on."""
    _check_text(text)
    action_format = policy.args.action_format
    read = text[: readable_end(text, action_format)]
    if not read.strip():
        raise ValueError(
            f"`text` can't be read as {action_format!r} (a syntax error, or another language); mend it, or open the "
            "checkpoint with another `--action_format`."
        )
    return read


def _name(policy: Policy) -> str:
    """A file's name from which colours follow."""
    return f"text.{_ENDINGS.get(policy.args.action_format, 'txt')}"


# ---- as HTML, for any page with report/play.css ----


def render_gates(shown: ShownFile, text: str, threshold: float, line: int | None = None) -> str:
    """Renders P(think) before each line of `text`, of which `shown` is what could be read; the chosen `line` is
    marked."""
    rows = list(shown.rows())
    read = len(physical_lines(shown.text))
    rest = [Row(number, runs, None) for number, runs in enumerate(highlight(shown.name, text), 1) if number > read]
    above = sum(b.think_prob >= threshold for b in shown.boundaries)
    return render(
        "play_gates.html.jinja", shown=shown, rows=rows, rest=rest, threshold=threshold, above=above, line=line,
        summary=shown.summary(),
    )  # fmt: skip


def render_latents(shown: ShownFile) -> str:
    """Renders the latents that [`draw`] drew, each with its gain on every line of the horizon."""
    lines = physical_lines(shown.text)
    tables = [(boundary, [(n, lines[n - 1].strip()) for n in boundary.ahead]) for boundary in shown.boundaries]
    return render("play_latents.html.jinja", shown=shown, tables=tables, code=lines, scale=GAIN_SCALE)


def render_completion(policy: Policy, prompt: str, completion: str, title: str) -> str:
    """Renders what was written behind a prompt; own-line comments, which latents are, stand out."""
    rows = highlight(_name(policy), prompt + completion)[prompt.count("\n") :]
    kinds = [{kind for kind, piece in runs if piece.strip()} for runs in rows]
    thoughts = [of_row == {"comment"} for of_row in kinds]
    rows[:1] = [cut_runs(runs, len(prompt) - prompt.rfind("\n") - 1) for runs in rows[:1]]
    return render("play_completion.html.jinja", title=title, rows=list(zip(rows, thoughts, strict=True)))


def label(boundary: ShownBoundary, lines: list[str]) -> str:
    """Names a boundary in a list: `"12: return x (P 0.031)"`."""
    code = visible(lines[boundary.line - 1].strip())
    return f"{boundary.line}: {code if len(code) <= 40 else code[:39] + '…'} (P {boundary.think_prob:.3f})"
