"""Fenced blocks of Markdown, and the programs in answers that hold them."""

from __future__ import annotations

import random
import re

import pytest

from ra3_trl.evaluation.answers import extract_program
from ra3_trl.segmentation import find_fences


F = "```"
ROW = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
GOOD = "def add(a, b):\n    return a + b\n"


def indented(code: str, by: str) -> str:
    return "".join(by + row for row in code.splitlines(keepends=True))


# Text, and of each block: language, code, what stands before its rows, whether it is closed.
BLOCKS = {
    "plain": (f"a\n{F}python\n{GOOD}{F}\nb", [("python", GOOD, "", True)]),
    "in a list": (f"1. a\n\n   {F}py\n{indented(GOOD, '   ')}   {F}\nb", [("py", GOOD, "   ", True)]),
    "on a list's own row": (f"- {F}py\n  x = 1\n  {F}\n", [("py", "x = 1\n", "  ", True)]),
    "rows less than their list": (f"1. a\n   {F}py\n{GOOD}   {F}\n", [("py", GOOD, "", True)]),
    "deep without a list": (f"a:\n        {F}py\n        x = 1\n        {F}\n", [("py", "x = 1\n", " " * 8, True)]),
    "in a quote": (f"> {F}js\n> f();\n> {F}\nb", [("js", "f();\n", "> ", True)]),
    "a quote ends it": (f"> {F}js\n> f();\nb", [("js", "f();\n", "> ", False)]),
    "tabs": (f"-\t{F}py\n\tx = 1\n\t\ty\n\t{F}", [("py", "x = 1\n\ty\n", " \t", True)]),
    "tildes": (f"~~~py\n{F}\nx\n~~~\n", [("py", f"{F}\nx\n", "", True)]),
    "longer": (f"{F}`md\n{F}py\nx\n{F}\n{F}``\n", [("md", f"{F}py\nx\n{F}\n", "", True)]),
    "CRLF": (f"a\r\n{F}py\r\nx\r\n{F}\r\n", [("py", "x\r\n", "", True)]),
    "never closed": (f"{F}py\nx\ny", [("py", "x\ny", "", False)]),
    "nothing in it": (f"{F}py\n{F}\n{F}", [("py", "", "", True), ("", "", "", False)]),
    "blank rows in a list": (f"- a\n  {F}\n  x\n\n\n  y\n  {F}", [("", "x\n\n\ny\n", "  ", True)]),
    "names": (f"{F}{{.Python .x}}\n{F}\n{F}c++ t\n{F}\n{F} src/a.rs\n{F}\n{F}py:a.txt\n{F}",
              [(name, "", "", True) for name in ("python", "c++", "rs", "py")]),
    "a mark in a string": (f"{F}\nx = '''\n{F}\n# ' '''\n{F}\n{F}\n3\n{F}", [
        ("", f"x = '''\n{F}\n# ' '''\n", "", True), ("", "3\n", "", True)]),
    "a string never closed": (f"{F}py\n'''\n{F}\na\n{F}py\nx\n{F}", [
        ("py", "'''\n", "", True), ("py", "x\n", "", True)]),
    "tags": (f"<think>\n{F}py\nx\n{F}\n</think>", [("py", "x\n", "", True)]),
    "code in a row": (f"{F}py x{F} and ``{F}py``", []),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    text, wanted = BLOCKS[name]
    fences = find_fences(text)
    assert [(f.language, f.code, f.prefix, f.closed) for f in fences] == wanted
    for fence in fences:
        rows = fence.code.splitlines(keepends=True)
        assert len(rows) == len(fence.rows) == len(fence.starts)
        assert all(text.startswith(code, at) for code, at in zip(rows, fence.rows, strict=True))
        assert all(text[at - 1] in "\r\n" for at in fence.starts)


def test_any_text_can_be_read():
    """Blocks are in order, do not overlap, and their code is the text's."""
    draw = random.Random(0)
    parts = [F, "~~~", f"{F}py", F + "`", " ", "  ", "\t", "\n", "\n\n", "> ", "- ", "1. ", "x", "'''", "#", "\r\n",
             "\r", "\0"]  # fmt: skip
    blocks = 0
    for _ in range(1000):
        text = "".join(draw.choices(parts, k=draw.randrange(40)))
        end = 0
        for fence in find_fences(text):
            assert all(end <= start <= row for start, row in zip(fence.starts, fence.rows, strict=True))
            assert fence.code == "".join(ROW.match(text, row)[0] for row in fence.rows)
            end = fence.rows[-1] if fence.rows else end
            blocks += 1
    assert blocks > 300


ANSWERS = {
    "plain": f"Sure:\n{F}python\n{GOOD}{F}\n",
    "in a list": f"1. Write it:\n\n   {F}python\n{indented(GOOD, '   ')}   {F}\n",
    "deep": f"So:\n      {F}python\n{indented(GOOD, '      ')}      {F}\n",
    "tildes": f"~~~python\n{GOOD}~~~\n",
    "four": f"{F}`python\n{GOOD}{F}`\n",
    "CRLF": f"{F}python\r\n{GOOD.replace(chr(10), chr(13) + chr(10))}{F}\r\n",
    "capitals": f"{F}Python\n{GOOD}{F}",
    "no language": f"{F}\n{GOOD}{F}",
    "a name of a file": f"{F}add.py\n{GOOD}{F}",
    "in a row": f"{F}python def add(a, b): return a + b{F}",
    "a docstring with a fence": (
        f"{F}python\ndef add(a, b):\n  '''\n  {F}\n  add(1, 2)\n  {F}\n  '''\n  return a + b\n{F}\n"
    ),
    "output": f"{F}python\n{GOOD}print(add(1, 2))\n{F}\nOutput:\n{F}\n3\n{F}\n",
    "output with words": f"{F}python\n{GOOD}{F}\n{F}\nThe sum is 3\n{F}\n{F}output\n3\n{F}",
    "output like code": f"{F}python\n{GOOD}{F}\n{F}\nresult = 3\n{F}\n",
    "shell": f"{F}python\n{GOOD}{F}\nRun it with\n{F}bash\npython add.py\n{F}\n",
    "JSON": f"{F}python\n{GOOD}{F}\n{F}json\n[1]\n{F}\n",
    "usage": f"{F}python\n{GOOD}{F}\n{F}python\nprint(add(1, 2))\n{F}\n",
    "usage by import": f"{F}python\n{GOOD}{F}\n{F}python\nfrom answer import add\nadd(1, 2)\n{F}\n",
    "a session": f"{F}python\n{GOOD}{F}\n{F}python\n>>> add(1, 2)\n3\n{F}\n",
    "usage cut off": f"{F}python\n{GOOD}{F}\n{F}python\nprint(add(1,",
    "a test": f"{F}python\n{GOOD}{F}\n{F}python\ndef test():\n    assert add(1, 2) == 3\n{F}\n",
    "a helper first": (
        f"{F}py\ndef plus(a, b):\n    return a + b\n{F}\n{F}py\ndef add(a, b):\n    return plus(a, b)\n{F}"
    ),
    "a draft first": f"{F}py\ndef add(a, b):\n    return a - b\n{F}\nBetter:\n{F}py\n{GOOD}{F}",
    "a draft in thought": f"<think>\n{F}py\ndef add(a, b): return 0\n{F}\n</think>\n{F}py\n{GOOD}{F}\n",
    "no fence behind thought": f"<think>\n{F}py\ndef add(a, b): return 0\n{F}\n</think>\n{GOOD}",
    "prose before": f"Here you are. It's short:\n\n{GOOD}",
    "prose around": f"Import what it needs:\n\nimport math\n\n\n{GOOD}\nThis adds the two, and that's all.\n- done\n",
    "prose that begins like code": f"from what I see, this will do:\nimport nothing else.\n\n{GOOD}",
    "tags": f"<answer>\n{F}py\n{GOOD}{F}\n</answer>",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_right_programs_are_right_in_any_fence(name):
    message = [{"role": "assistant", "content": ANSWERS[name]}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": ANSWERS[name]}]}]
    for completion in (ANSWERS[name], message, parts):
        space: dict = {}
        exec(extract_program([{"role": "user", "content": "Write add(a, b)."}], completion), space)
        assert space["add"](1, 2) == 3


@pytest.mark.parametrize("text", [
    f"Here:\n{GOOD}\ndef more(",  # cut off
    f"Here:\n{GOOD}    return (\n",
    "Here:\nimport math\nThat is all.\n",
    "No program at all.",
    "Done",  # Python, whatever it does
])  # fmt: skip
def test_what_is_no_whole_program_amid_prose_stays_as_it_is(text):
    assert extract_program([{"role": "user", "content": "Write add(a, b)."}], text) == text


@pytest.mark.parametrize(
    "last", [f"{F}py\ndef add(a, b)\n{F}", f"{F}py\ndef add(a, b):\n    return a - b\n{F}", f"{F}py\ndef add(a, b"]
)
def test_a_wrong_last_answer_stays_wrong(last):
    """A right draft before it does not count."""
    assert extract_program(None, f"{F}py\n{GOOD}{F}\n{last}") == last.split("\n", 1)[1].removesuffix(F)
