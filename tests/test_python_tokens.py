"""Tokens of Python text: those of Python 3.11's `tokenize` with PEP 701's f-strings, whatever Python runs."""

from __future__ import annotations

import ast
import hashlib
import io
import sys
import tokenize
from collections.abc import Iterator

import pytest
from conftest import CORPUS

from ra3_trl.segmentation import python_tokens
from ra3_trl.segmentation.python import own_line_comments, segment_python, statements_end, strip_python_comments
from ra3_trl.segmentation.python_tokens import read_tokens


BITS = (
    "'", '"', "'''", '"""', "#", "\\", "\n", "\n", "\r\n", "\t", " ", "    ", "  ", "(", ")", "[", "]", "{", "}", ":",
    "=", "x", "if x:\n", "pass\n", "def g():\n", "# c\n", "b'", 'r"', "u'", "1.5", "0x1", "1e5", "é", "½", "你", "𝐱",
    "$", "?", "!", "`", "!=", "@", "..", "lambda", "\f", "\ufeff", "\\\n", "\\\r\n", "\u2028", "\x0b", "\r", "\0",
    "\U00011f04", "\U00031350", "\U0002ebf0", "😀", "\ud800", "f'", 'f"""', "{x!r:>{y}}", "f'{x[", "rb'",
)  # fmt: skip


def hostile_texts(count: int) -> Iterator[str]:
    """Texts of odd pieces, and pieces of code with odd ones in it; the same on every Python."""
    state = 1

    def below(bound: int) -> int:
        nonlocal state
        state = state * 6364136223846793005 % 2**64 + 1442695040888963407  # Knuth's MMIX
        return (state >> 33) % bound

    for i in range(count):
        if i % 3:
            yield "".join(BITS[below(len(BITS))] for _ in range(1 + below(13)))
        else:
            start = below(len(CORPUS))
            text = list(CORPUS[start : start + below(300)])
            for _ in range(below(6)):
                text.insert(below(len(text) + 1), BITS[below(len(BITS))])
            yield "".join(text)


def result(text: str) -> tuple:
    lines = segment_python(text)
    rows = [comment.row for comment in own_line_comments(text)]
    cut = None if lines is None else [(line.start, line.text_start, line.indent, line.comment) for line in lines]
    return cut, rows, hash_of(strip_python_comments(text)), statements_end(text)


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def test_every_python_cuts_alike():
    """The number was the same on 3.11.7, 3.12.1 and 3.13.0. It changes with the rules, and with nothing else."""
    results = [result(text) for text in hostile_texts(3000)]
    assert 200 < sum(cut is not None for cut, *_ in results) < 2700
    assert hash_of(repr(results)) == "eb6243e6aa35"


# ---- the slow path: 3.11's own `tokenize` ----


def slow(text: str) -> tuple[bool, list[int]]:
    """Whether `text` is Python, and the characters at which its logical lines end, as far as it is."""
    ends, starts = [], [0]
    for row in text.split("\n"):
        starts.append(starts[-1] + len(row) + 1)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
            if token.type == tokenize.ERRORTOKEN:
                return False, ends
            if token.type == tokenize.NEWLINE and token.string:
                ends.append(starts[token.start[0] - 1] + token.start[1])
    except (tokenize.TokenError, SyntaxError):
        return False, ends
    return True, ends


def fast(text: str) -> tuple[bool, list[int]]:
    ends: list[int] = []
    for token in read_tokens(text):
        if token.kind == "error":
            return False, ends
        if token.kind == "line":
            ends.append(token.start)
    return True, ends


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="its tokenize is another from Python 3.12 on")
def test_lines_are_those_of_3_11():
    """Of texts without f-strings. What 3.11 read by its Unicode, letters beyond the first plane, is left out too."""
    left_out = ("f'", 'f"', "\0", "\r\r", "\ufeff", *BITS[52:55])
    texts = [text for text in hostile_texts(6000) if not any(piece in text.lower() for piece in left_out)]
    texts = [text for text in texts if "\r" not in text.replace("\r\n", "")]
    assert len(texts) > 2000
    for text in texts:
        assert fast(text) == slow(text), text


# ---- f-strings ----

F_STRINGS = {  # one logical line before `y = 2`
    "its own quotes": "x = f'{a['b']}'\n",
    "its own quotes, in a format": "x = f'{a:{'>'}{10}}'\n",
    "rows in a field": "x = f'{\n    a,\n}'\n",
    "a comment in a field": "x = f'{a # }' no end\n}'\n",
    "what looks like lines": 'x = f"""{"""\ny = 1\n# no\n"""}"""\n',
    "nested": "x = f'{f'{f'{f'{1}'}'}'}'\n",
    "a format that ends with its row": "x = f'{a:d\n}'\n",
    "braces in text": "x = f'{{' f'}}' f'{{{a}}}'\n",
    "names of characters": "x = f'\\N{EN DASH}{a}'\n",
    "conversions and debugging": "x = f'{a!r:>{b}}{a = }{a!=b}{(lambda: 1)()}{ {1: 2}[1]}'\n",
    "quotes of others": "x = f\"{a['b']}'\" rf'''{a}' \"\"\" '''\n",
    "escaped quotes": "x = f'\\'{a}\\'' f'{a:\\'>10}'\n",
}


@pytest.mark.parametrize("name", F_STRINGS)
def test_f_strings_are_read_by_pep_701(name):
    text = F_STRINGS[name]
    assert [line.start for line in segment_python(text + "y = 2\n")] == [0, len(text)]
    assert own_line_comments(text) == []
    if sys.version_info >= (3, 12):
        ast.parse(text)


@pytest.mark.parametrize(
    "text",
    ["f'{a'", "f'{(]}'", "f'}'", "f'{a:'", 'f"""{a', "f'{a $ b}'", "f'a\n'", "f'{\"a}'", "f'{f\"{a'}'"],
)
def test_f_strings_without_an_end_are_no_python(text):
    assert segment_python(f"x = {text}\n") is None


def test_what_follows_a_broken_string_is_read_on():
    """A completion's later latents count too. Behind three quotes nobody knows what is text."""
    for broken in ("'a", "f'a", "f'{a $", "b'"):
        assert [comment.row for comment in own_line_comments(f"x = {broken}\n# c\n")] == [1], broken
    for broken in ("'''a", "f'''a", "f'''{a"):
        assert own_line_comments(f"x = {broken}\n# c\n") == [], broken


# ---- what a model may write ----


@pytest.mark.parametrize("odd", ["\ré", "\0", "\ud800", "$", "?", "!", "`", "😀", "\U00031350"])
def test_odd_characters_are_text_that_does_not_tokenize(odd):
    """Of these the `tokenize` of 3.12 raised errors of all kinds, or read operators. The third row is no Python."""
    text = f"# a\nx = 1\ny = 2 {odd}\n"
    assert segment_python(text) is None
    assert strip_python_comments(text) == text
    assert [comment.text for comment in own_line_comments(text)] == [" a"]
    assert statements_end(text) == len("# a\nx = 1\n")


@pytest.mark.parametrize("piece", ["f'{", "f'{x:{", "(", "f'''{f\"{(", "x = f'{(\n", "'", "\\\n", "f'{x:", "  "])
def test_hostile_depth_costs_no_more_than_length(monkeypatch, piece):
    """No recursion, and no start over at every opening: four times the text is four times the steps."""
    steps, pattern = [], python_tokens._TOKEN

    class Counting:
        def match(self, text: str, at: int):
            steps[-1] += 1
            return pattern.match(text, at)

    monkeypatch.setattr(python_tokens, "_TOKEN", Counting())
    for count in (2_000, 8_000):
        steps.append(0)
        list(read_tokens(piece * count))
    assert 0 < steps[1] <= 4 * steps[0] + 4
