"""Text -> actions -> token boundaries: splices keep the program, nothing is lost, nothing peeks ahead."""

from __future__ import annotations

import ast
import copy
import logging
import random
import textwrap
from pathlib import Path

import pytest
from conftest import BOS, EOS, TOKENIZERS, _sentencepiece
from datasets import Dataset
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast

from ra3_trl.records import Latent
from ra3_trl.segmentation import (
    FragmentEncoder,
    count_documents,
    document_to_row,
    load_code_directory,
    prompt_ids,
    row_to_document,
    segment_dataset,
    splice,
    standard_library,
)
from ra3_trl.segmentation.datasets import content_id
from ra3_trl.segmentation.python import (
    count_code_lines,
    own_line_comments,
    segment_python,
    strip_python_comments,
)


def tree(text: str) -> str:
    """The program a text stands for. A BOM is read as Python reads a file; only bytes may begin with one."""
    return ast.dump(ast.parse(text.removeprefix("\ufeff")))


def body_text(tokenizer, ids, context_tokens: int = 0) -> str:
    """Text of ids without BOS and the final EOS, by the tokenizer's own decoder."""
    ids = list(ids)
    if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
        ids = ids[1:]
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    return tokenizer.decode(ids[context_tokens:], clean_up_tokenization_spaces=False)


def latents_of(tokenizer) -> list[Latent]:
    """Two latents: a plain one, and one that would open a string or continue the line if it were not a comment."""
    fragment = FragmentEncoder(tokenizer)
    return [Latent(fragment(text), stopped=True) for text in (" why", ' """ ( é \\')]


def assert_tiles(document) -> None:
    """Actions cover the trained tokens from the context on, in order; only the EOS may stand after them."""
    edges = [document.context, *(a.end for a in document.actions)]
    assert [a.start for a in document.actions] == edges[:-1]
    assert all(a.end > a.start for a in document.actions)
    assert len(document.input_ids) - edges[-1] in (0, 1)


ODD = {
    "tabs": "def f(x):\n\tif x:\n\t\treturn 1\n\treturn 2\n",
    "crlf": "def f(x):\r\n    if x:\r\n        return 1\r\n    return 2\r\n",
    "form feed": "x = 1\n\x0c\ndef f():\n    return 1\n\x0cy = 2\n",
    "bom": "\ufeffx = 1\ny = 2\nif y:\n    z = 3\n",
    "no newline at the end": "x = 1\nif x:\n    y = 2",
    "blank lines with spaces": "def f():\n    x = 1\n   \n\t\n    y = 2\n        \n    return y\n",
    "decorators": "@a\n@b(\n    1,\n)\nclass C:\n    @property\n    def f(self):\n        return 1\n",
    "comment after the colon": "def f(x):\n    if x: # c\n        return 1 # d\n    else: # e\n        return 2\n",
    "async": "async def f(x):\n    async with x as y:\n        await y\n    async for z in y:\n        yield z\n",
    "match": "match x:\n    case [1, _]:\n        y = 1\n    case {'a': b}:\n        y = b\n",
    "nested f-strings": "def f(x, y):\n    a = f\"{x!r:>{y}} {f'{x + 1}'}\"\n"
    "    b = f'''{\n        x\n    } # no'''\n    return a + b\n",
    "docstrings": 'def f():\n    """One.\n\n    # not a comment\n        Two:\n    """\n    return """a\nb"""\n',
    "brackets": "x = [\n    1,\n    # inside\n    2,\n]\ny = {\n'a':\n1}\nz = (x,\n     y)\n",
    "backslash": "x = 1 + \\\n    2\nassert x, \\\n  'a'\nif x and \\\n   x:\n    y = 1\n",
    "backslash at the line's start": "if x:\n    a = 1\n    \\\n  b = 2\nc = 3\n",
    "one line": "x = 1\n",
    "one line without newline": "x = 1",
    "comments only": "# a\n# b\n",
    "comment after a backslash": "x = 1 \\\n# c\ny = 2\n",
    "semicolons": "x = 1; y = 2\nif x: y = 3; z = 4\nw = lambda: 0\n",
    "try": "try:\n  x = 1\nexcept* ValueError:\n  y = 2\nfinally:\n  z = 3\n",
    "non-ASCII": "größe = 'ß→日本'\nif größe:\n    变量 = '🎉'\n    print(变量)\n",
    "deep dedent": "if a:\n  if b:\n    if c:\n      x = 1\ny = 2\n",
    "blank lines first": "\n\n\nx = 1\n\n\n\ny = 2\n",
    "indented comment": "def f():\n    # a\n    x = 1\n# odd place\n    y = 2\n    return y\n",
    "line separators in strings": "x = 'a\u2028b\x85c\x0b'\ny = 2\n",
    "trailing backslash comment": "x = 1 # a \\\ny = 2\n",
    "leading form feed": "\x0cx = 1\ny = 2\n",
    "type hints": "def f[T](x): pass\n" if hasattr(ast, "TypeVar") else "def f(x: int) -> 'T': pass\ny: int\nz = 1\n",
}


def standard_library_sources() -> list[str]:
    """40 files of the standard library, of 1 to 12 thousand characters, evenly picked."""
    files = [p for p in sorted(standard_library().glob("*.py")) if 1_000 <= p.stat().st_size <= 12_000]
    sources = [p.read_text("utf-8") for p in files[:: max(1, len(files) // 40)][:40]]
    assert len(sources) >= 30
    return sources


# ---- the tokenizers are what their names say ----


def test_tokenizers_have_the_property_of_their_name(tokenizers):
    text = "def f(x):\n    if x:\n        return 1\n\n\ny = 2\n"
    pieces = {
        name: [text[a:b] for a, b in t(text, return_offsets_mapping=True)["offset_mapping"]]
        for name, t in tokenizers.items()
    }
    assert [p for p in pieces["newline_alone"] if "\n" in p] == ["\n"] * 6
    assert "\n   " in pieces["newline_indent"] and "\n       " in pieces["newline_indent"]
    assert "):\n" in pieces["newline_punctuation"] and any(p.startswith("\n\n") for p in pieces["newline_punctuation"])
    sentencepiece = tokenizers["sentencepiece"]
    tokens = sentencepiece.convert_ids_to_tokens(sentencepiece(text)["input_ids"])
    assert tokens[:2] == ["<s>", "▁def"] and "<0x0A>" in tokens and "▁▁▁▁" in tokens


# ---- splices ----


def assert_splices_keep_the_program(tokenizer, document, text: str, one_by_one: bool) -> None:
    program = tree(text)
    for latent in latents_of(tokenizer):
        places = [document.boundaries, *((s,) for s in document.boundaries)] if one_by_one else [document.boundaries]
        for boundaries in places:
            spliced = body_text(tokenizer, splice(document, dict.fromkeys(boundaries, latent)).input_ids)
            assert tree(spliced) == program, spliced


@pytest.mark.parametrize("name", list(ODD))
def test_splicing_keeps_the_program_in_odd_texts(tokenizer, segmenter, name):
    text = ODD[name]
    (document,) = segmenter(tokenizer)(0, text)
    assert document.status == "actions"
    assert body_text(tokenizer, document.input_ids) == text
    assert_tiles(document)
    assert_splices_keep_the_program(tokenizer, document, text, one_by_one=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_splicing_keeps_the_program_in_the_standard_library(tokenizers, segmenter, kind):
    tokenizer, boundaries, lines = tokenizers[kind], 0, 0
    for text in standard_library_sources():
        (document,) = segmenter(tokenizer)(0, text)
        assert document.status == "actions"
        assert body_text(tokenizer, document.input_ids) == text
        assert_tiles(document)
        assert_splices_keep_the_program(tokenizer, document, text, one_by_one=False)
        boundaries += len(document.boundaries)
        lines += len(segment_python(text))
    # Most lines are open to a latent; the others are comments, lines after comments and the first ones.
    assert boundaries > 0.7 * lines


def test_the_check_of_programs_can_fail(tokenizers, segmenter):
    """A latent inside a docstring is seen by the check above: it is no tautology."""
    tokenizer = tokenizers["newline_alone"]
    text = 'x = """a\nb"""\ny = 1\n'
    (document,) = segmenter(tokenizer)(0, text)
    (latent, _), ids = latents_of(tokenizer), list(document.input_ids)
    newline = ids.index(FragmentEncoder(tokenizer)("\n")[0])
    boundary = document.actions[1].boundary
    wrong = ids[: newline + 1] + [*boundary.think, *latent.token_ids, *boundary.close] + ids[newline + 1 :]
    assert tree(body_text(tokenizer, wrong)) != tree(text)


@pytest.mark.parametrize(
    "text",
    ['x = """a\nb\n# c\n"""\n', "x = (1,\n\n2,\n# c\n3)\n", "x = 1 + \\\n2 + \\\n3\n", "f('a'\n'b')\n"],
)
def test_no_boundary_inside_a_logical_line(tokenizer, segmenter, text):
    text = f"a = 0\n{text}b = 1\n"
    (document,) = segmenter(tokenizer)(0, text)
    starts = [len(body_text(tokenizer, document.input_ids[: document.actions[s].start])) for s in document.boundaries]
    # Three logical lines; the first has a boundary only where nothing stands in front (never here: see below).
    assert [s for s in starts if s] == [
        text.index("x = ") if "x = " in text else text.index("f("),
        text.index("b = 1"),
    ]


def test_no_boundary_at_the_start_without_bos_and_none_before_eos(tokenizer, segmenter):
    (document,) = segmenter(tokenizer)(0, "x = 1\ny = 2\n")
    # SentencePiece has a BOS but its first token holds a dummy space, which may not follow a comment's newline.
    assert document.actions[0].boundary is None
    assert document.actions[-1].end == len(document.input_ids) - 1
    assert document.input_ids[-1] == tokenizer.eos_token_id
    assert document.input_ids.count(tokenizer.eos_token_id) == 1


def test_a_bos_token_opens_the_first_line(tokenizers, segmenter):
    """Byte-level with BOS (as Llama-3): the first line has a boundary, predicted from BOS."""
    backend = tokenizers["newline_punctuation"].backend_tokenizer
    raw = type(backend).from_str(backend.to_str())
    raw.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, raw.token_to_id(EOS))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, bos_token=EOS)
    (document,) = segmenter(tokenizer)(0, "x = 1\ny = 2\n")
    assert document.context == 1 and document.boundaries == (0, 1)
    assert document.actions[0].boundary.close == FragmentEncoder(tokenizer)("\n")
    ids = splice(document, dict.fromkeys(document.boundaries, latents_of(tokenizer)[0])).input_ids
    text = tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)
    assert text == "# why\nx = 1\n# why\ny = 2\n"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("x = (1,\ny = 2\n", "plain"),  # a bracket left open
        ("def f(:\n  return 'a\n", "plain"),  # a string left open
        ("if x:\n        y\n    z\n", "plain"),  # a dedent to nowhere
        ("x = 1\ry = 2\n", "untokenized"),  # a lone carriage return ends a line for Python, not for us
        ("x = 1\0\n", "plain"),
        ("x = $ + ?\n", "plain"),
    ],
)
def test_text_that_does_not_fit_is_kept_whole_without_boundaries(tokenizer, segmenter, text, status):
    (document,) = segmenter(tokenizer)(0, text)
    assert (document.status, document.boundaries) == (status, ())
    if status == "plain":
        assert body_text(tokenizer, document.input_ids) == text
    assert document.input_ids[-1] == tokenizer.eos_token_id != document.input_ids[-2]
    assert_tiles(document)


def lines_with_boundary(tokenizer, document) -> list[str]:
    """The text from each boundary to the next action."""
    return [
        tokenizer.decode(list(document.input_ids[a.start : a.end]), clean_up_tokenization_spaces=False).strip()
        for a in document.actions
        if a.boundary is not None
    ]


def test_an_end_of_text_of_its_own_is_the_end(tokenizer, segmenter):
    cut = segmenter(tokenizer)
    assert cut(0, CODE + EOS) == cut(0, CODE)
    assert cut(0, CODE + EOS, prompt_chars=10) == cut(0, CODE, prompt_chars=10)
    (document,) = cut(0, CODE + EOS, prompt_chars=len(CODE))  # nothing but the end is to be learned
    assert document.actions == () and document.input_ids[document.context :] == (tokenizer.eos_token_id,)
    assert cut(0, "x = 1\n" + EOS, prompt_chars=len("x = 1\n" + EOS)) == [] == cut(0, EOS)
    (strip,) = segmenter(tokenizer, existing_comments="strip")(0, f"x = 1\n# why{EOS}")
    assert body_text(tokenizer, strip.input_ids) == "x = 1"


def test_a_beginning_of_text_of_its_own_is_not_doubled(tokenizers, segmenter):
    tokenizer = tokenizers["sentencepiece"]  # adds one
    cut = segmenter(tokenizer)
    assert cut(0, BOS + CODE) == cut(0, CODE) and cut(0, CODE)[0].input_ids.count(tokenizer.bos_token_id) == 1
    assert cut(0, BOS + CODE, prompt_chars=len(BOS) + 10) == cut(0, CODE, prompt_chars=10)


def test_special_tokens_in_a_text_are_opaque(tokenizer, segmenter):
    """No boundary next to them; the rest of the text has its own, and all of it comes back."""
    text = f"def end(x):\n    eos = '{EOS}'\n    y = x\n{EOS}\nreturn_y = 1\nz = 2\n"
    (document,) = segmenter(tokenizer)(0, text)
    assert document.status == "actions" and document.input_ids.count(tokenizer.eos_token_id) == 3
    assert_tiles(document)
    # Not the lone token's line; that of the token in a string is beside letters and has one.
    lines = [line.replace(f"{EOS} ", EOS) for line in lines_with_boundary(tokenizer, document)]  # a dummy space
    assert lines[-4:] == [f"eos = '{EOS}'", "y = x", "return_y = 1", "z = 2"]
    beside = {i for a in document.actions if a.boundary for i in document.input_ids[max(a.start - 1, 0) : a.start + 1]}
    assert tokenizer.eos_token_id not in beside
    spliced = splice(document, dict.fromkeys(document.boundaries, latents_of(tokenizer)[0]))
    kept = [i for i, latent in zip(spliced.input_ids, spliced.is_latent, strict=True) if not latent]
    assert tuple(kept) == document.input_ids
    (several,) = segmenter(tokenizer)(0, f"x = 1{EOS}{EOS}y = 2\nz = 3\n{EOS}{EOS}")
    assert several.status == "actions" and lines_with_boundary(tokenizer, several)[-1] == "z = 3"
    assert several.input_ids.count(tokenizer.eos_token_id) == 4


@pytest.mark.parametrize("question", ["Add two numbers", "Don't use (a loop", 'Write """one'])
def test_code_behind_a_chat_keeps_its_boundaries(tokenizer, segmenter, question):
    """The prompt's special tokens need not be followed by code, and its prose need not be Python."""
    prompt = f"{EOS}user\n{question}{EOS}\n{EOS}assistant\n"
    (document,) = segmenter(tokenizer)(0, prompt + "def f(x):\n    y = x\n    return y\n", len(prompt))
    assert lines_with_boundary(tokenizer, document)[-2:] == ["y = x", "return y"]
    assert document.status == "actions" and len(document.boundaries) == 3
    (inline,) = segmenter(tokenizer)(0, f"{EOS}don't:{EOS} x = 1\ny = 2\n", len(f"{EOS}don't:{EOS} "))
    assert lines_with_boundary(tokenizer, inline) == ["y = 2"]  # the first line goes on with the prompt's row


def test_text_that_does_not_come_back_is_lossy(tokenizers, segmenter):
    backend = tokenizers["newline_indent"].backend_tokenizer
    changed = type(backend).from_str(backend.to_str())
    changed.normalizer = normalizers.Replace("y", "x")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=changed, eos_token=EOS)
    (document,) = segmenter(tokenizer)(0, f"x = 1\ny = 2\n{EOS}z = 3\n")
    assert (document.status, document.boundaries) == ("lossy", ())
    (document,) = segmenter(tokenizer)(0, f"x = 1\n{EOS}z = 2\nz = 3\n")
    assert (document.status, len(document.boundaries)) == ("actions", 1)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_a_prompt_is_not_ended(add_special_tokens):
    """As Llama's tokenizer does with `add_eos_token`: a text to be continued has one beginning and no end."""
    raw = _sentencepiece()
    ids = [(token, raw.token_to_id(token)) for token in (BOS, EOS)]
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
    ending = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, bos_token=BOS)
    raw = _sentencepiece()
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)
    plain = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, bos_token=BOS)
    for text in ("def f(x):\n", "", f"a{EOS}"):
        wanted = plain(text, add_special_tokens=add_special_tokens)["input_ids"]
        assert prompt_ids(ending, text, add_special_tokens) == wanted
    assert prompt_ids(ending, BOS + "x") == plain("x")["input_ids"]


def test_code_that_tokenizes_but_does_not_parse_has_actions(tokenizer, segmenter):
    (document,) = segmenter(tokenizer)(0, "x = = 1\nreturn return\ny = 2\n")
    assert document.status == "actions" and len(document.boundaries) == 2


def test_an_empty_text_has_no_document(tokenizer, segmenter):
    assert segmenter(tokenizer)(0, "") == []
    assert segmenter(tokenizer, existing_comments="strip")(0, "# only\n") == []
    assert segmenter(tokenizer)(0, "x = 1\n", prompt_chars=6) == []


@pytest.mark.parametrize("text", [" ", "\n", "\n\n \n", "\t", "#"])
def test_texts_of_white_space_work(tokenizer, segmenter, text):
    (document,) = segmenter(tokenizer)(0, text)
    assert document.boundaries == () and body_text(tokenizer, document.input_ids) == text


def test_random_mutations_never_lose_text(tokenizer, segmenter):
    """Lines of real code shuffled, cut and joined by odd characters: ids always give the text back, the program
    stays where there is one."""
    rng = random.Random(0)
    lines = standard_library_sources()[3].split("\n")
    parsed = 0
    for _ in range(150):
        begin = rng.randrange(len(lines) - 8)
        glue = rng.choice(["\n", "\n", "\r\n", "\n\n", "\n \n", "\n\x0c\n", "\n# é\n", " \\\n", ";\n"])
        text = textwrap.dedent(glue.join(lines[begin : begin + rng.randrange(1, 8)]))[rng.choice([0, 0, 1]) :]
        documents = segmenter(tokenizer)(0, text)
        if not text:
            continue
        (document,) = documents
        assert body_text(tokenizer, document.input_ids) == text
        assert_tiles(document)
        try:
            tree(text)
        except SyntaxError:
            continue
        parsed += 1
        assert_splices_keep_the_program(tokenizer, document, text, one_by_one=False)
    assert parsed > 10


# ---- the think prefix ----


def test_think_prefix_and_closure_by_hand(tokenizers, segmenter):
    """After `if x:` at indent 4 a line at indent 8 is expected.

    "\\n" alone and "):\\n": no carry, so think = 8 spaces + "#", close = "\\n". "\\n" + 7 spaces (the natural token
    before " return"): carry 7, so think = 1 space + "#", close = "\\n" + 7 spaces.
    """
    text = "def f(x):\n    if x:\n        return 1\n"
    expected = {
        "newline_alone": (8, 0),
        "newline_indent": (1, 7),
        "newline_punctuation": (8, 0),
        "sentencepiece": (8, 0),
    }
    for kind, (spaces, carry) in expected.items():
        tokenizer = tokenizers[kind]
        (document,) = segmenter(tokenizer)(0, text)
        boundary = document.actions[2].boundary
        written = [*document.input_ids[: document.actions[2].start], *boundary.think]
        assert body_text(tokenizer, written).endswith("if x:\n        #"), kind
        assert FragmentEncoder(tokenizer)(" " * spaces + "#") == boundary.think, kind
        assert FragmentEncoder(tokenizer)("\n" + " " * carry) == boundary.close, kind


def test_the_prefix_does_not_peek_at_the_next_line(tokenizer, segmenter):
    """What stands before the boundary's token fixes the prefix; the next line shows in the carry alone."""
    head = "def f(x):\n    while x:\n        if x:\n"
    nexts = [
        "            return 1\n",
        "        pass\n",
        "    y = 2\n",
        "z = 3\n",
        "                w\n",
        "\n\nq = 1\n",
    ]
    seen: dict[str, set[tuple[int, ...]]] = {}
    for following in nexts:
        text = head + following
        (document,) = segmenter(tokenizer)(0, text)
        action = document.actions[3]
        before = body_text(tokenizer, document.input_ids[: action.start])
        carry = before[before.rindex("\n") + 1 :]
        if before.startswith(head) and before.rstrip(" ") == head:
            seen.setdefault(carry, set()).add(action.boundary.think)
            written = body_text(tokenizer, [*document.input_ids[: action.start], *action.boundary.think])
            # Expected indent: 12, one unit below `if`; a carry that is already longer is followed by "#" at once.
            assert written[len(head) :] == " " * max(12, len(carry)) + "#"
    assert seen and all(len(prefixes) == 1 for prefixes in seen.values())
    assert "" in seen


def test_the_expected_indent_follows_from_the_lines_before():
    text = "if a:\n  if b:\n    c\nd\nif e:\n\tf\n\tif g:\n\t\th\nfor i in j: k\nl = {\n1: 2}\nm\n"
    # After a colon one unit deeper, else as the line before; never the line's own indent. The unit is 4 spaces,
    # Python's habit, until one is seen: 2 spaces at `if b` (so `c` at 2 + 2), a tab at `f` (so `h` at two tabs).
    # `d`, `for` and `l` are expected where the line before them stood.
    expected = ["", "    ", "    ", "    ", "", "  ", "\t", "\t\t", "\t\t", "", ""]
    assert [line.indent for line in segment_python(text)] == expected


# ---- the expert's own comments ----


def test_kept_comments_have_no_boundary_directly_before_or_after(tokenizer, segmenter):
    text = "a = 1\nb = 2\n# one\n# two\nc = 3\nd = 4\n"
    (document,) = segmenter(tokenizer)(0, text)
    kinds = [(a.comment, a.boundary is not None) for a in document.actions]
    # a: nothing before it; b: free; both comments: no boundary before; c: directly after one; d: free
    assert kinds == [(False, False), (False, True), (True, False), (True, False), (False, False), (False, True)]


def test_stripped_comments_leave_the_program_and_no_comment(tokenizer, segmenter):
    text = "# top\na = 1\nif a:\n    # one\n    b = '# no'  # end\n# two\nc = [\n    # in\n    3]\nd = 4\n"
    (document,) = segmenter(tokenizer, existing_comments="strip")(0, text)
    left = "a = 1\nif a:\n    b = '# no'  # end\nc = [\n    3]\nd = 4\n"
    assert body_text(tokenizer, document.input_ids) == left
    assert not any(a.comment for a in document.actions) and len(document.boundaries) == 4


@pytest.mark.parametrize("name", list(ODD))
def test_stripping_keeps_the_program_in_odd_texts(name):
    assert tree(strip_python_comments(ODD[name])) == tree(ODD[name])


def test_stripping_keeps_the_program_in_the_standard_library():
    removed = 0
    for text in standard_library_sources():
        stripped = strip_python_comments(text)
        assert tree(stripped) == tree(text)
        removed += text.count("\n") - stripped.count("\n")
    assert removed > 100


COMMENTS = {
    # text: its own-line comments (row, what follows the `#`), rows of code
    "# a\nx = 1  # b\n\n    #c\n": ([(0, " a"), (3, "c")], 1),
    'x = """\n# no\n\n"""\n# a\n': ([(4, " a")], 3),
    "x = [\n    # a\n    1]\n": ([(1, " a")], 2),
    "x = 1 \\\n# behind code\ny = 2\n": ([], 3),
    "# a \\\n# b\r\nx = 1 # c \\\n# d\n": ([(0, " a \\"), (1, " b"), (3, " d")], 1),
    "\ufeff# a\nx = 1": ([(0, " a")], 1),
    "# a\nx = (\n    # b": ([(0, " a"), (2, " b")], 1),  # cut
    '# a\nx = """\n# no': ([(0, " a")], 2),  # cut in a string
    "# a\nif x:\n    y\n  z\n# b\n": ([(0, " a")], 4),  # no Python from the dedent on
    "# a\nx = '\0'\n# b\n": ([(0, " a")], 2),  # nor what holds NUL or a bare carriage return
    "# a\nx = 1\ré\n# b\n": ([(0, " a")], 2),
    "": ([], 0),
}


@pytest.mark.parametrize("text", list(COMMENTS), ids=range(len(COMMENTS)))
def test_own_line_comments_and_lines_of_code(text):
    comments, code = COMMENTS[text]
    found = own_line_comments(text)
    assert [(comment.row, comment.text) for comment in found] == comments
    assert all(text[comment.start :].startswith("#" + comment.text) for comment in found)
    assert count_code_lines(text) == code


def test_own_line_comments_from_a_character_on():
    """What stands before it decides what a row is, and is not counted itself."""
    text = '"""\n# no\n# begun\n"""\n# a\nx = 1\n'
    at = text.index("# begun") + 3
    assert [comment.text for comment in own_line_comments(text, at)] == [" a"]
    assert count_code_lines(text, at) == 3  # the rest of a row, the quotes, x
    assert own_line_comments("# a", 1) == [] and count_code_lines("# a", 1) == 0


@pytest.mark.parametrize("name", list(ODD))
def test_segments_and_strips_by_the_same_comments(name):
    rows = ODD[name].removeprefix("\ufeff").split("\n")
    comments = {comment.row for comment in own_line_comments(ODD[name])}
    lines = segment_python(ODD[name])
    assert {ODD[name][: line.start].count("\n") for line in lines if line.comment} <= comments
    kept = strip_python_comments(ODD[name]).removeprefix("\ufeff").split("\n")
    assert kept == [row for i, row in enumerate(rows) if i not in comments]


def test_stripping_leaves_the_prompt_alone():
    text = "# a\nx = 1\n# b\ny = 2\n"
    assert strip_python_comments(text, after=len("# a\nx = 1\n")) == "# a\nx = 1\ny = 2\n"


# ---- chunks ----


def trained(document) -> tuple[int, ...]:
    return document.input_ids[document.context :]


@pytest.mark.parametrize("max_tokens", [16, 40, 97])
@pytest.mark.parametrize("name", ["heapq.py", "fnmatch.py"])
def test_chunks_lose_nothing_and_train_nothing_twice(tokenizer, segmenter, name, max_tokens):
    text = (standard_library() / name).read_text("utf-8")[:6000]
    text = text[: text.rindex("\n\n") + 1]
    (whole,) = segmenter(tokenizer)(7, text)
    chunks = segmenter(tokenizer, max_tokens)(7, text)
    assert len(chunks) > 3
    assert [c.chunk for c in chunks] == list(range(len(chunks))) and {c.doc_id for c in chunks} == {7}
    assert sum((trained(c) for c in chunks), ()) == trained(whole)
    for before, chunk in zip(chunks, chunks[1:], strict=False):
        assert chunk.context == 1 and chunk.input_ids[0] == before.input_ids[-1]
    for chunk in chunks:
        assert len(chunk.input_ids) <= max_tokens
        assert_tiles(chunk)
    # Every boundary lands in exactly one chunk, with the number its noise is keyed by.
    found = [(a.index, a.boundary) for c in chunks for a in c.actions if a.boundary]
    assert found == [(a.index, a.boundary) for a in whole.actions if a.boundary]


def test_a_line_longer_than_a_chunk_is_cut_inside(tokenizer, segmenter):
    text = "a = 0\nx = [" + "1, " * 300 + "]\nb = 2\n"
    (whole,) = segmenter(tokenizer)(0, text)
    chunks = segmenter(tokenizer, 64)(0, text)
    assert sum((trained(c) for c in chunks), ()) == trained(whole)
    assert all(len(c.input_ids) <= 64 for c in chunks)
    assert [a.index for c in chunks for a in c.actions if a.boundary] == [1, 2]  # once before x, once before b


def test_prompts_are_context_and_completions_have_the_actions(tokenizer, segmenter):
    prompt, completion = "def f(x):\n    y = x\n", "    z = y\n    return z\n"
    (document,) = segmenter(tokenizer)(0, prompt + completion, len(prompt))
    text = body_text(tokenizer, document.input_ids[document.context :])
    # With "\n" + 3 spaces in one token, the part of the completion inside it belongs to the context.
    assert completion.endswith(text.lstrip(" ")) and text.strip().startswith("z = y")
    assert document.actions[0].start == document.context
    first = [document.actions[i].start for i in document.boundaries]
    assert len(first) == 2 and first[0] == document.context
    assert_tiles(document)


def test_a_token_across_prompt_and_completion_is_context(tokenizers, segmenter):
    """`def f():` + `\\n    return 1\\n` where "):\\n" may be one token: no token is trained that holds prompt text."""
    prompt, completion = "def f():", "\n    return 1\n"
    for tokenizer in tokenizers.values():
        (document,) = segmenter(tokenizer)(0, prompt + completion, len(prompt))
        context = body_text(tokenizer, document.input_ids[: document.context])
        assert context.startswith(prompt)
        shorter = body_text(tokenizer, document.input_ids[: document.context - 1])
        assert len(shorter) < len(prompt)


@pytest.mark.parametrize("max_tokens", [32, 50])
def test_a_prompt_longer_than_a_chunk_keeps_its_end(tokenizer, segmenter, max_tokens):
    prompt = "".join(f"a{i} = {i}\n" for i in range(60))
    completion = "".join(f"b{i} = {i}\n" for i in range(20))
    (whole,) = segmenter(tokenizer)(0, prompt + completion, len(prompt))
    chunks = segmenter(tokenizer, max_tokens)(0, prompt + completion, len(prompt))
    assert sum((trained(c) for c in chunks), ()) == trained(whole)
    assert all(len(c.input_ids) <= max_tokens for c in chunks)
    assert chunks[0].context > 1  # some of the prompt is there
    context = chunks[0].input_ids[: chunks[0].context]
    assert whole.input_ids[whole.context - len(context) : whole.context] == context
    assert [a.index for c in chunks for a in c.actions] == [a.index for a in whole.actions]


# ---- splice ----


def test_splice_by_hand(tokenizers, segmenter):
    """`x = 1 / y = 2 / z = 3` with a latent of two tokens before `y`: think (1) + 2 + close (1) = 4 more tokens."""
    tokenizer = tokenizers["newline_alone"]
    (document,) = segmenter(tokenizer)(0, "x = 1\ny = 2\nz = 3\n")
    latent = Latent(tuple(tokenizer(" why not", add_special_tokens=False)["input_ids"]), stopped=True)
    boundary = document.actions[1].boundary
    example = splice(document, {1: latent})
    added = len(boundary.think) + len(latent.token_ids) + len(boundary.close)
    start = document.actions[1].start
    assert len(example.input_ids) == len(document.input_ids) + added
    assert [i for i, flag in enumerate(example.is_latent) if flag] == list(range(start, start + added))
    # The first token of a row is never predicted; everything else is trained, the EOS too.
    assert example.labels == (-100, *example.input_ids[1:])
    assert [a.start for a in example.document.actions] == [0, start + added, document.actions[2].start + added]
    # Boundaries stay: before an annotated line stands the decision not to think again.
    assert (
        example.document.boundaries == document.boundaries == (1, 2)
        and example.document.input_ids == example.input_ids
    )
    assert splice(document, {}).input_ids == document.input_ids


# ---- data sets ----

CODE = "def f(x):\n    y = x\n    return y\n"


def test_dataset_forms_and_round_trip(tokenizers, segmenter):
    make = segmenter(tokenizers["newline_indent"])
    by_text = segment_dataset(Dataset.from_dict({"text": [CODE, "x = 1\n"]}), make)
    (document,) = make(0, CODE)
    assert row_to_document(by_text[0]) == document == row_to_document(document_to_row(document))
    assert row_to_document(by_text[1]) == make(1, "x = 1\n")[0]
    named = segment_dataset(Dataset.from_dict({"source": [CODE]}), make, text_field="source")
    assert row_to_document(named[0]) == document
    made = segment_dataset(
        Dataset.from_dict({"a": [CODE[:10]], "b": [CODE[10:]]}), make, formatting_func=lambda e: e["a"] + e["b"]
    )
    assert row_to_document(made[0]) == document
    halves = Dataset.from_dict({"prompt": [CODE[:10]], "completion": [CODE[10:]]})
    assert row_to_document(segment_dataset(halves, make)[0]) == make(0, CODE, 10)[0]


def test_streams_and_columns_with_our_names(tokenizers, segmenter):
    """A user's columns may be called as ours are."""
    make = segmenter(tokenizers["newline_indent"], 16)
    rows = Dataset.from_dict({"text": [CODE, CODE], "start": ["a", "b"], "status": [1, 2], "chunk": [None, None]})
    wanted = [document for i in range(2) for document in make(i, CODE)]
    assert [row_to_document(r) for r in segment_dataset(rows, make)] == wanted
    # In a stream documents are numbered by their content, as shards and workers come in any order.
    streamed = [row_to_document(r) for r in segment_dataset(rows.to_iterable_dataset(), make)]
    assert streamed == make(content_id(CODE), CODE) * 2 and content_id(CODE) != content_id(CODE + "\n")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, ["messages"]),
        ({"code": CODE}, ["code"]),
        ({"prompt": CODE}, ["prompt"]),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": "x"}, ["prompt", "completion", "list"]),
        ({"prompt": "x", "completion": [{"role": "user", "content": "hi"}]}, ["prompt", "completion", "list"]),
        ({"text": ["a", "b"]}, ["text", "list"]),
        ({"image": "x.png", "label": 1}, ["image", "label"]),
    ],
)
def test_other_forms_are_refused_by_the_names_of_their_columns(tokenizers, segmenter, row, named):
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError, match="what can be read is|RA3MidTrainer reads") as error:
        segment_dataset(dataset, segmenter(tokenizers["newline_indent"]))
    for name in named:
        assert name in str(error.value)
    assert "formatting_func" in str(error.value) and "completion" in str(error.value)


def test_an_empty_dataset_is_refused(tokenizers, segmenter):
    with pytest.raises(ValueError, match="empty"):
        segment_dataset(Dataset.from_dict({"text": []}), segmenter(tokenizers["newline_indent"]))


def test_counts_add_up(tokenizer, segmenter):
    texts = {
        "with_actions": [CODE, "# c\nx = 1\ny = 2\nz = 3\n", "a = 1\n" * 40],
        "no_boundary": ["x = 1\n", "# only\n"],
        "plain": ["x = (\n", "x = 'a\n", "a = (1\n" * 40],
        "untokenized": ["x = 1\ry = 2\r", "s = '''a\rb'''\nt = 1\n"],  # row ends that Python takes, and we do not
        "lossy": ["x = 1\ny = '\u00e9'\n"],
        "empty": ["", ""],
    }
    rows = Dataset.from_dict({"text": [t for group in texts.values() for t in group]})
    tokenizer = copy.deepcopy(tokenizer)
    before = [n for n in [tokenizer.backend_tokenizer.normalizer] if n is not None]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\u00e9", "e"), *before])
    counts = count_documents(rows, segment_dataset(rows, segmenter(tokenizer, 64)))
    assert {name: counts[name] for name in texts} == {name: len(group) for name, group in texts.items()}
    assert counts["documents"] == sum(counts[name] for name in texts) == 13
    whole = [segmenter(tokenizer)(0, t)[0] for t in rows["text"] if t]
    assert counts["tokens"] == sum(len(d.input_ids) - max(d.context, 1) for d in whole)
    # Boundaries: y and z (x is after a comment); 39 of 40 lines; two lines of f.
    assert counts["boundaries"] == 2 + 2 + 39
    assert counts["kept_comments"] == 2
    assert counts["chunks"] == len(segment_dataset(rows, segmenter(tokenizer, 64)))


# ---- folders of code ----


def test_load_code_directory(tmp_path, caplog):
    (tmp_path / "LICENSE").write_text("\n  MIT License\n\nCopyright\n")
    (tmp_path / "good.py").write_text(
        f"import os\n\n\n@deco\n{CODE}    # tail\n\nclass C:\n    a = 1\n    b = 2\n    c = 3\n"
    )
    package = tmp_path / "package"
    package.mkdir()
    (package / "tagged.py").write_text(f"# SPDX-License-Identifier: Apache-2.0\n{CODE}    z = 1\n    w = 2\n")
    (package / "crlf.py").write_bytes(b"def g():\r\n    a = 1\r\n    b = 2\r\n    return a\r\n")
    (package / "bad.py").write_text("def f(:\n")
    (package / "latin.py").write_bytes(
        "# -*- coding: latin-1 -*-\ndef f():\n    x = 'é'\n    y = 1\n    return x\n".encode("latin-1")
    )
    (package / "empty.py").write_text("")
    with caplog.at_level(logging.WARNING):
        dataset = load_code_directory(tmp_path)
    rows = {(r["path"], r["line"]): r for r in dataset}
    assert set(rows) == {("good.py", 4), ("good.py", 10), ("package/tagged.py", 2), ("package/crlf.py", 1)}
    assert rows["good.py", 4]["text"] == f"@deco\n{CODE}"
    assert rows["package/crlf.py", 1]["text"].count("\r\n") == 4
    assert rows["good.py", 4]["license"] == "MIT License" == rows["package/crlf.py", 1]["license"]
    assert rows["package/tagged.py", 2]["license"] == "Apache-2.0"
    for row in dataset:
        tree(row["text"])
    assert "2 of 6 files" in caplog.text  # bad.py and latin.py; empty.py parses and has nothing


def test_a_file_with_a_bom_is_read(tmp_path):
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbfdef g():\n    a = 1\n    b = 2\n    return a\n")
    assert load_code_directory(tmp_path)["text"] == ["def g():\n    a = 1\n    b = 2\n    return a\n"]


def test_long_classes_are_taken_apart(tmp_path):
    body = "".join(f"    def f{i}(self):\n        a = {i}\n        b = 2\n        return a\n\n" for i in range(5))
    (tmp_path / "a.py").write_text(f"class C:\n{body}")
    dataset = load_code_directory(tmp_path, max_lines=10)
    assert dataset["text"][1] == "def f1(self):\n    a = 1\n    b = 2\n    return a\n"
    assert dataset["line"] == [2, 7, 12, 17, 22]
    assert len(load_code_directory(tmp_path, max_lines=100)) == 1


def test_folders_without_code_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        load_code_directory(tmp_path / "nowhere")
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="1 Python files"):
        load_code_directory(tmp_path)


def test_the_standard_library_is_the_default_corpus(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text(f"{CODE}    # one more\n    z = 1\n")
    monkeypatch.setattr("ra3_trl.segmentation.corpus.standard_library", lambda: Path(tmp_path))
    assert load_code_directory()["license"] == ["PSF-2.0"]
