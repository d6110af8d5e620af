"""The format "markdown": latents in fenced code, and nowhere else."""

from __future__ import annotations

import ast

import pytest

from ra3_trl.records import Latent
from ra3_trl.segmentation import MARKDOWN, Segmenter, find_fences, splice


F = "```"
# The first column says what a row is: > a line of code, / a comment of its author, . anything else.
TEXT = rf'''
.# Title
.
.x = 1  is no code
.
.{F}python
>def f(x):
>    y = (x,
.         1)
.
/    # kept
>    return y
.{F}
.1. A list:
.
.   ~~~~py
>   if y:
>       s = """
.   ~~~~
.   """
.   ~~~~
.
.{F}bash
.ls  # no
.{F}
.> {F}rust
>> fn main() {{
>>     g();
.>
/>     // kept
>> }}
.> {F}
.{F}py
.>>> f(1)
.(1, 1)
.{F}
.{F}py
.a b c (
.{F}
.{F}
.x = 1
.{F}
.{F}python
>z = 3
>w = [4,
'''[1:]


def marked(text: str) -> tuple[str, str]:
    """A text without its first column, and that column."""
    rows = text.rstrip("\n").split("\n")
    return "\n".join(row[1:] for row in rows), "".join(row[0] for row in rows)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_which_rows_are_code(line_end):
    text, wanted = marked(TEXT)
    text = text.replace("\n", line_end)
    kinds = ["."] * len(wanted)
    for line in MARKDOWN.segment(text):
        if line.latent:
            kinds[text[: line.start].count("\n")] = "/" if line.comment else ">"
    # The last block ends in an open bracket: what is whole of it is read.
    assert "".join(kinds) == wanted[:-1] + "."


def test_what_is_expected_before_a_latent():
    """The indentation of the list or quote, and of the code as the lines before tell it; its language's marker."""
    text, _ = marked(TEXT)
    lines = {text[line.text_start :].split("\n")[0]: line for line in MARKDOWN.segment(text) if line.latent}
    assert lines["return y"].indent == "    " and lines["return y"].think is None
    assert lines["if y:"].indent == "   " and lines['s = """'].indent == "       "
    assert lines["g();"].indent == ">     " and lines["g();"].think == "//"


def test_comments_of_code_are_stripped_and_headings_stay():
    text, _ = marked(TEXT)
    assert MARKDOWN.strip(text) == text.replace("    # kept\n", "").replace(">     // kept\n", "")
    assert MARKDOWN.strip(text, text.index("# kept") + 1) == text.replace(">     // kept\n", "")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["newline_alone", "newline_indent", "newline_punctuation", "sentencepiece"])
def test_the_ast_of_each_block_is_kept(tokenizers, kind, line_end):
    """With a latent at every boundary, one that looks like a fence."""
    tokenizer, text = tokenizers[kind], marked(TEXT)[0].replace("\n", line_end)
    (document,) = Segmenter(tokenizer, MARKDOWN, 100_000)(0, text)
    latent = Latent(tuple(tokenizer(f"a {F} b", add_special_tokens=False)["input_ids"]), True)
    spliced = tokenizer.decode(splice(document, dict.fromkeys(document.boundaries, latent)).input_ids[:-1])
    assert document.status == "actions" and len(document.boundaries) >= 6
    before, after = find_fences(text), find_fences(spliced)
    assert [fence.language for fence in before] == [fence.language for fence in after]
    parsed = 0
    for one, other in zip(before, after, strict=True):
        if one.language not in ("python", "py"):
            assert one.language == "rust" or one.code == other.code
            continue
        try:
            tree = ast.parse(one.code.replace("\r\n", "\n"))
        except SyntaxError:
            continue
        assert ast.dump(tree) == ast.dump(ast.parse(other.code.replace("\r\n", "\n")))
        parsed += one.code != other.code
    assert parsed == 2
