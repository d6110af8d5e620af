"""Formats other than Python: `//` languages, prose, tagged latents; nothing but the `ActionFormat` differs."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slow_path import bytes_of
from test_rollout import KEY, assert_group_is_exact, assert_latents_are_exact, assert_same_groups
from test_segmentation import assert_tiles, body_text
from transformers import AutoTokenizer

from ra3_trl import RA3Config
from ra3_trl.models import add_tags
from ra3_trl.policy import Policy, annotate
from ra3_trl.records import Latent
from ra3_trl.rollout import Backbone, BranchEngine, NoiseKey, SamplingParams
from ra3_trl.rollout.expand import ExpandEngine
from ra3_trl.segmentation import (
    ACTION_FORMATS,
    MARKDOWN,
    PROSE,
    PYTHON,
    PYTHON_TAGS,
    SLASHES,
    TAGS,
    ActionFormat,
    FragmentEncoder,
    Line,
    Segmenter,
    build_token_table,
    find_format,
    splice,
    tagged,
)


# ---- `//` languages: the first column says what a line is, > an action's first, / a comment, . neither ----

CPP = r"""
>#include <sys/types.h>  // it's
>#define MAX(a, b) \
.    ((a) > (b) \
./ no comment of ours \
.     ? (a) : (b))
>#error Don't
>const char *s = "http://x/*"; int n = 1'000'000;
>char c = '"', d = '\'', e = '/';
>auto r = u8R"x(
.// in a raw string )" "
.)x";
>/* block "
.// in a block
.*/ int y = 2; int z = y / n / 2;
/  // ours
>f(a,
.  // in a bracket
.  [&] {
>    g();
>  });
>int w; // carried on \
.int v;
>int u;
"""
JAVASCRIPT = r"""
>const re = /["'`/]\/[/*"(]/g, url = 'http://x'; // "
>if (a) /"(/.test(b)
>const t = `a
.// in a template ${ f(`
.// in one inside "`) } '`;
>let q = (a + b) / c / "x".length;
>foo(function () {
>  return /`/.exec(x[0] / 2) || y++ / 2;
>}, [
.  1,
.  // in a bracket
.]);
>const s = 'one \
.// in a string';
/// doc
>export { q };
"""
RUST = r"""
>#![allow(unused)]
>fn f<'a>(x: &'a str) -> &'a str { // it's
>    let c = '"'; let d = '\u{1F600}'; let s = "multi
.    // in a string";
>    let r = br#"raw "
.    // in a raw string
.    "#;
>    /* nested /* deeper */
.    // in a block
.    */
>    'outer: loop { break 'outer }
>    x
>}
"""
GO = """
>var q = `raw \\d "
.// in a raw string
.` + "x"
>var r = '`'
>switch x {
>case 1:
>\tg("\\"//", func() {
>\t\th()
>\t})
>}
"""
JAVA = r'''
>String t = """
.   // in a text block "quoted" \""" more
.   """;
>char c = '\'';
>@A("/*") class B<T> {
>    <U> void f(T x) {}
>}
'''
SWIFT = r'''
>let a = "\("x")//" /* /* */
.// nested */
>let b = #"""
.// in a raw string """
."""#
>let `class` = """
.// in a string
."""
'''
CODE = {"c++": CPP, "javascript": JAVASCRIPT, "rust": RUST, "go": GO, "java": JAVA, "swift": SWIFT}


def marked(source: str) -> tuple[str, list[tuple[int, bool]]]:
    """A text and (start, comment) of its lines by the marks in the first column."""
    text, lines = "", []
    for row in source.strip("\n").split("\n"):
        lines += [(len(text), row[0] == "/")] * (row[0] in ">/")
        text += row[1:] + "\n"
    return text, lines


@pytest.mark.parametrize("language", CODE)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_of_slashes_by_hand(language, newline):
    text, expected = marked(CODE[language])
    lines = SLASHES.segment(text)
    found = [(text[line.start :].partition("\n")[0], line.comment) for line in lines]
    assert found == [(text[start:].partition("\n")[0], comment) for start, comment in expected]
    crlf = text.replace("\n", newline)
    assert [line.start for line in SLASHES.segment(crlf)] == [
        line.start + text.count("\n", 0, line.start) * (len(newline) - 1) for line in lines
    ]
    assert all(not text[line.start : line.text_start].strip() for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        'x = "open\n',
        "/* open\n// c\n",
        "let x = `open ${ a }\n",
        "a\rb",
        "a\0b",
        "const x = <b>\n// text\n</b>;\n",  # JSX: a line of markup is text
        'if (x) { y }\n/"`/.test(z)\n',  # a regular expression, or a division by a string
        'import "C"\n',  # cgo: the comment before is code
    ],
)
def test_text_that_no_language_reads_is_plain(text, tokenizers):
    (document,) = Segmenter(tokenizers["newline_alone"], SLASHES, 1000)(0, text)
    assert (document.status, document.boundaries) == ("plain", ())


def test_what_looks_like_markup_is_none_without_its_end():
    assert SLASHES.segment("auto x = y < z;\nint w = <Foo>bar;\n") is not None
    # Rust's `::<T>` and C++'s `template <T>` follow a name; the comment holds what markup would end with.
    assert len(SLASHES.segment("let x = y.parse::<T>(); // </b>\nz();\n")) == 2


@pytest.mark.parametrize(
    "text",
    [
        "const t = `a ${ f(`\n// b`) }`;\nx;\n",  # Go would end the string at the second "`"
        "var t = `a\\` + `\n// b`\nx\n",  # JavaScript would not end it at the escaped one
        '/* a /* b */\nx; // " */\ny;\n',  # Rust's comment goes on for a line, if it is Rust
        'let t = R"\n// b";\nx(\'"\');\n',  # a string over two lines is Rust's
    ],
)
def test_where_languages_disagree_there_is_no_boundary(text):
    rows = [text[line.start :].partition("\n")[0] for line in SLASHES.segment(text)]
    assert rows == [text.partition("\n")[0], text.split("\n")[2]]


def test_no_boundary_before_a_shebang():
    """Nor behind it: it is as a comment. Rust's `#![...]` is code."""
    assert [line.comment for line in SLASHES.segment("#!/usr/bin/env -S node --x // it's\nx\n")] == [True, False]
    assert [line.comment for line in SLASHES.segment("#![allow(x)]\nx\n")] == [False, False]


def test_expected_indents_of_slashes():
    text = "f() {\n  if (x) { // {\n    g(a,\n        b);\n  }\n  switch (x) {\n  case 1:\n    h();\n  }\n}\n"
    # After `{` and `case 1:` one unit deeper than the line before: 4 spaces until 2 are seen at `if`. `g(` and `b` are
    # one line; the lines after `}` are expected where it stood.
    found = [len(line.indent) for line in SLASHES.segment(text)]
    assert found == [0, 4, 4, 4, 2, 4, 4, 4, 2]


@pytest.mark.parametrize(("text", "count"), [("", 0), (" \n\t\n", 0), ("x", 1), ("\ufeffx {\n\ty\n", 2), ("// é", 1)])
def test_odd_texts_of_slashes(text, count):
    lines = SLASHES.segment(text)
    assert len(lines) == count
    assert SLASHES.strip(text) == ("" if "é" in text else text)


def test_stripping_slashes():
    text = '// a\nx = "http://b"; // tail\nf(\n  // in\n  1,\n);\n//go:build linux\nt = `\n// text\n`;\n  // z'
    left = 'x = "http://b"; // tail\nf(\n  1,\n);\n//go:build linux\nt = `\n// text\n`;'
    assert SLASHES.strip(text) == left
    assert SLASHES.strip(text, after=5) == "// a\n" + left
    unread = 'x = "open\n// a\n'
    assert SLASHES.strip(unread) == unread


# ---- prose ----

PROSE_TEXT = (
    'Dr. J. Smith paid 3.5 dollars, e.g. in the U.S. or so. "Why?" he asked. (He knew.) Then... nothing!'
    "\n\nA heading\n\n1. One.\n2. Two, No. 7 etc. and so on. Really?! Yes…\n"
    "[1] A note. No note.\n\n你好。再见！ End without a stop"
)


def test_sentences_by_hand():
    lines = PROSE.segment(PROSE_TEXT)
    cuts = [0, *(line.start for line in lines), len(PROSE_TEXT)]
    pieces = [PROSE_TEXT[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert pieces == [
        "Dr. J. Smith paid 3.5 dollars, e.g. in the U.S. or so.",
        ' "Why?" he asked.',
        " (He knew.)",
        " Then... nothing!",
        "\n\nA heading",
        "\n\n1. One.",
        "\n2. Two, No. 7 etc. and so on.",
        " Really?!",
        " Yes…\n[1] A note.",  # an ellipsis ends nothing, so the note is none of ours
        " No note.",
        "\n\n你好。",
        "再见！",
        " End without a stop",
    ]
    # Chinese brings no space before what follows a stop.
    assert [line.indent for line in lines][-3:] == [" ", "", ""]
    assert not any(line.comment for line in lines)


def test_asides_are_latents_seen():
    text = "A cat. [ it is. black] B sat.\n\n[ a mat]\n\nC sees [ no aside] it. [d](url) is a link. [ open"
    found = [(text[line.start :][:9], line.comment) for line in PROSE.segment(text)]
    assert found == [
        (" [ it is.", True),
        (" B sat.\n\n", False),
        ("\n\n[ a mat", True),
        ("\n\nC sees ", False),
        (" [d](url)", True),  # begins with the marker, so that it is no line to score; nor is it stripped
        (" [ open", True),
    ]
    assert PROSE.strip(text) == "A cat. B sat.\n\nC sees [ no aside] it. [d](url) is a link. [ open"
    assert PROSE.strip(text, after=20) == text.replace("\n\n[ a mat]", "")


@pytest.mark.parametrize("text", ["", " ", "\n\n", "x", "No end", ". . .", "A.\r\n\r\nB c.\r\n", "\ufeffOne it. Two."])
def test_odd_texts_of_prose(text):
    lines = PROSE.segment(text)
    assert len(lines) == (1 if "B" in text or "Two" in text else 0)
    assert PROSE.strip(text) == text


# ---- each format on each kind of tokenizer ----

TAGGED_TEXT = "A: 1\n\n  B: 2\r\n\tC é 日本\nD"
PYTHON_TEXT = "def f(x):\n    # kept\n    if x:\n        return 1\n    return (2,\n        3)\n"
TEXTS = {
    "slashes": "int f(int x) {\n    if (x) {\n        return g(1,\n            2);\n    }\n\n    return x; // é\n}\n",
    "prose": "He ran. She sat (it rained).\n\nThe end was near. 你好。再见！ Was it? Yes!\nSo it was.",
    "markdown": "# A\n\n1. Do\n   ```py\n   if x:\n       f(\n   1)\n   ```\n\n> ~~~js\n> g(é);\n> h();\n> ~~~\n\nEnd",
    "tags": TAGGED_TEXT,
    "python_tags": PYTHON_TEXT,
}
LATENT = {
    "slashes": " why \"it's (é",
    "prose": " why (é 日本",
    "markdown": " why ```",
    "tags": " why # é",
    "python_tags": " why # é",
}
FORMATS = tuple(TEXTS)


@pytest.fixture(scope="module")
def tagged_tokenizers(tokenizers):
    """The four kinds with the tags, as `add_tags` leaves them; the others stay as they are."""
    out = {}
    for name, tokenizer in tokenizers.items():
        out[name] = copy.deepcopy(tokenizer)
        embeds = torch.nn.Module()
        embeds.get_input_embeddings = lambda t=tokenizer: torch.nn.Embedding(len(t) + 2, 4)
        embeds.get_output_embeddings = lambda: None
        add_tags(embeds, out[name], TAGS.tags)
    return out


@pytest.fixture(scope="module")
def setting(tokenizers, tagged_tokenizers):
    """Factory: format, tokenizer (with tags if need be) and document of a text."""

    def make(name: str, kind: str, text: str | None = None, **options):
        action_format = find_format(name)
        tokenizer = (tagged_tokenizers if action_format.tags else tokenizers)[kind]
        (document,) = Segmenter(tokenizer, action_format, 100_000, **options)(3, text or TEXTS[name])
        return action_format, tokenizer, document

    return make


def without_latents(action_format: ActionFormat, text: str) -> str:
    """The text a reader gets who takes all latents out."""
    if action_format.tags:
        return re.sub(rf"{action_format.think}[^\n]*?{action_format.end}", "", text)
    return action_format.strip(text)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["newline_alone", "newline_indent", "newline_punctuation", "sentencepiece"])
def test_splices_come_out_again(setting, name, kind):
    action_format, tokenizer, document = setting(name, kind)
    text = TEXTS[name]
    assert document.status == "actions"
    assert body_text(tokenizer, document.input_ids) == text
    assert_tiles(document)
    # By hand: 6 lines of C after the first; 7 sentences after the first; 3 lines; Python's 4 lines after the first and
    # its comment, which for a tag is a line as any other.
    assert len(document.boundaries) == {"slashes": 5, "prose": 7, "markdown": 4, "tags": 3, "python_tags": 4}[name]
    latent = Latent(FragmentEncoder(tokenizer)(LATENT[name]), stopped=True)
    for boundaries in (document.boundaries, *((s,) for s in document.boundaries)):
        example = splice(document, dict.fromkeys(boundaries, latent))
        spliced = body_text(tokenizer, example.input_ids)
        assert spliced.count(LATENT[name]) == len(boundaries)
        assert without_latents(action_format, spliced) == text, spliced
        # The expert's tokens stay as they are.
        kept = [i for i, of_latent in zip(example.input_ids, example.is_latent, strict=True) if not of_latent]
        assert tuple(kept) == document.input_ids
    again = action_format.segment(spliced)
    if not action_format.tags:  # read anew, the latents are the expert's comments
        assert sum(line.comment for line in again) == 1


def test_a_splice_of_prose_by_hand(setting):
    _, tokenizer, document = setting("prose", "newline_punctuation", "He ran.\n\nShe sat. It rained. End")
    latent = Latent(FragmentEncoder(tokenizer)(" so"), stopped=True)
    text = body_text(tokenizer, splice(document, dict.fromkeys(document.boundaries, latent)).input_ids)
    # ".\n\n" may be one token: then the aside stands behind it and gives the blank line back.
    merged = ".\n\n" in [body_text(tokenizer, [i]) for i in document.input_ids]
    head = "He ran.\n\n[ so]\n\nShe" if merged else "He ran. [ so]\n\nShe"
    assert text == f"{head} sat. [ so] It rained. [ so] End"


def test_asides_in_the_text_have_no_decision_beside_them(setting):
    for kind in ("newline_alone", "sentencepiece"):
        _, _, document = setting("prose", kind, "He ran. [ so] She sat. It rained.")
        assert [(a.comment, a.boundary is not None) for a in document.actions] == [
            (False, False), (True, False), (False, False), (False, True),
        ]  # fmt: skip


# ---- the table ----


def allowed_first(table) -> set[int]:
    return {int(i) for i in ((table.next_state_SV[0] >= 0) & ~table.blank_V).nonzero()[:, 0]} - set(
        table.stop_ids.tolist()
    )


def test_latents_of_slashes_begin_with_a_space_and_hold_no_backslash(tokenizer):
    table, data = build_token_table(tokenizer, len(tokenizer), action_format=SLASHES), bytes_of(tokenizer)
    assert {data[i][:1] for i in allowed_first(table)} == {b" "}
    python = build_token_table(tokenizer, len(tokenizer))
    assert set(table.stop_ids.tolist()) == set(python.stop_ids.tolist())
    for i, b in enumerate(data):
        if b and b.isascii() and i not in table.stop_ids:
            legal = int(python.next_state_SV[0, i]) >= 0 and b"\\" not in b
            assert (int(table.next_state_SV[0, i]) >= 0) == (legal and b"??/" not in b), b
    # Byte by byte: the three line ends of other languages have no way through, their neighbours do.
    for character in "\u0085\u2028\u2029é\u2027\u202a\u0086日🎉":
        state = 0
        for byte in character.encode():
            state = int(table.next_state_SV[state, data.index(bytes([byte]))]) if state >= 0 else -1
        assert (state == 0) == (character not in "\u0085\u2028\u2029"), repr(character)


def test_asides_end_at_every_token_that_holds_the_bracket(tokenizer):
    table, data = build_token_table(tokenizer, len(tokenizer), action_format=PROSE), bytes_of(tokenizer)
    holds = {i for i, b in enumerate(data) if b and b"]" in b}
    assert set(table.stop_ids.tolist()) == holds | {tokenizer.eos_token_id} and table.stop_id in holds
    newline = [i for i, b in enumerate(data) if b and b"\n" in b and b"]" not in b]
    assert newline and (table.next_state_SV[:, newline] == -1).all()


def test_the_end_tag_is_the_stop(tagged_tokenizers):
    for tokenizer in tagged_tokenizers.values():
        table = build_token_table(tokenizer, len(tokenizer) + 3, (0,), TAGS)
        think, end = (tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>"))
        assert table.stop_ids.tolist() == [end, *sorted({tokenizer.eos_token_id, 0})]
        newline = [i for i, b in enumerate(table.token_bytes) if b and b"\n" in b]
        for closed in (think, *newline):
            assert (table.next_state_SV[:, closed] == -1).all()


def test_formats_that_cannot_be_written_are_refused(tokenizers):
    tokenizer = tokenizers["newline_alone"]
    with pytest.raises(ValueError, match=r"<think>.*add_tags"):
        Segmenter(tokenizer, TAGS, 100)
    with pytest.raises(ValueError, match=r"<think>.*add_tags"):
        build_token_table(tokenizer, 600, action_format=TAGS)
    with pytest.raises(ValueError, match="may begin a latent.*'odd'"):
        build_token_table(tokenizer, 600, action_format=replace(SLASHES, name="odd", first="\x01"))
    with pytest.raises(ValueError, match="`end`.*ASCII"):
        ActionFormat("c", SLASHES.segment, "/*", "*/")
    with pytest.raises(ValueError, match="`tags`"):
        replace(TAGS, think="<why>")


def test_find_format():
    assert [find_format(name) for name in ("python", "slashes", "prose", "tags")] == [PYTHON, SLASHES, PROSE, TAGS]
    with pytest.raises(ValueError, match=r"`action_format` is 'latin'.*'python'.*'tags'.*ACTION_FORMATS\['latin'\] ="):
        find_format("latin")


def test_an_own_format_is_an_instance(tokenizers, monkeypatch):
    """Lua's comments: another marker on lines; not one line of other code."""
    own = ActionFormat("lua", lambda text: tuple(replace(line, indent="") for line in TAGS.segment(text)), "--", "\n")
    monkeypatch.setitem(ACTION_FORMATS, "lua", own)
    tokenizer = tokenizers["newline_indent"]
    (document,) = Segmenter(tokenizer, find_format("lua"), 100)(0, "x = 1\ny = 2\n")
    latent = Latent(FragmentEncoder(tokenizer)(" why"), stopped=True)
    assert body_text(tokenizer, splice(document, {1: latent}).input_ids) == "x = 1\n-- why\ny = 2\n"
    assert own.segment("a\n b") == (Line(0, 0, "", False), Line(2, 3, "", False))


# ---- tags ----


def test_a_tagged_splice_by_ids(tagged_tokenizers):
    """<think> latent </think> goes in between two of the expert's tokens; the carry is not repeated."""
    for kind, tokenizer in tagged_tokenizers.items():
        (document,) = Segmenter(tokenizer, PYTHON_TAGS, 1000)(0, PYTHON_TEXT)
        think, end = (tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>"))
        boundaries = {a.boundary for a in document.actions if a.boundary}
        assert {(b.think, b.close) for b in boundaries} == {((think,), (end,))}
        latent = Latent(FragmentEncoder(tokenizer)(" why"), stopped=True)
        ids = splice(document, dict.fromkeys(document.boundaries, latent)).input_ids
        text = body_text(tokenizer, ids)
        assert "<think> why</think>" in text
        if kind != "sentencepiece":  # it puts its dummy space behind a tag
            assert tuple(tokenizer(text)["input_ids"]) == ids[:-1]
        # Whoever skips special tokens does not see the tags.
        assert "think>" not in tokenizer.decode(list(ids), skip_special_tokens=True)


def test_a_text_with_tags_of_its_own_is_trained_plainly(tagged_tokenizers):
    tokenizer = tagged_tokenizers["newline_alone"]
    (document,) = Segmenter(tokenizer, TAGS, 1000)(0, "a\n<think> b</think>c\nd\n")
    assert (document.status, document.boundaries) == ("lossy", ())


def test_tagged_python_strips_what_python_strips(tokenizers, tagged_tokenizers):
    (document,) = Segmenter(tagged_tokenizers["newline_alone"], PYTHON_TAGS, 1000, "strip")(0, PYTHON_TEXT)
    assert "# kept" not in body_text(tagged_tokenizers["newline_alone"], document.input_ids)
    mine = tagged(PROSE, "mine", ("so",), "<aside>", "</aside>")
    assert set(mine.tags) == {"<aside>", "</aside>"} and mine.tags["</aside>"] == ("\n",)


WORDS = {"<think>": ("think", "reason"), "</think>": ("\n",)}


def word_rows(tokenizer, *texts: str) -> list[int]:
    """By hand, from bytes: the tokens of each word less a lone space (SentencePiece puts one before)."""
    data = bytes_of(tokenizer)
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return [i for i in ids if data[i] != b" "]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("room", [0, 1, 8])
def test_tags_begin_as_the_mean_of_their_words(tokenizer, tiny_model, tie, room):
    """With room for 0 of the 2 tags, for 1, and for more: the matrix grows by 2, by 1, and not at all."""
    tokenizer = copy.deepcopy(tokenizer)
    size = len(tokenizer)
    model = tiny_model("llama", tokenizer, vocab_size=size + room, tie_word_embeddings=tie)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    words = [word_rows(tokenizer, "think", "reason"), word_rows(tokenizer, "\n")]
    assert len(words[0]) > 1 and len(words[1]) == 1
    assert add_tags(model, tokenizer, WORDS) == (size, size + 1)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (after[0] is after[1]) == tie
    for old, new in zip(before, after, strict=True):
        assert len(new) == size + max(room, 2) == model.config.vocab_size
        assert torch.equal(new[:size], old[:size]) and torch.equal(new[size + 2 :], old[size + 2 :])
        for row, ids in zip(new[size : size + 2], words, strict=True):
            torch.testing.assert_close(row, sum(old[i] for i in ids) / len(ids))
    frozen = [p.clone() for p in model.parameters()]
    assert add_tags(model, tokenizer, WORDS) == (size, size + 1)  # a second time nothing happens
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.parameters(), strict=True))
    assert len(tokenizer) == size + 2


def test_saved_tags_are_the_same(tagged_tokenizers, tokenizers, tmp_path, tiny_model):
    for name, tokenizer in tagged_tokenizers.items():
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        size = len(tokenizers[name])
        assert [loaded.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")] == [size, size + 1]
        assert loaded("a<think> b</think>", add_special_tokens=False)["input_ids"][-1] == size + 1
        assert loaded.decode([size, size + 1], skip_special_tokens=True) == ""
    # A tokenizer with the tags and a model that never saw them: their rows are made.
    model = tiny_model("llama", tokenizers["sentencepiece"])
    add_tags(model, loaded, WORDS)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[size + 1], table[word_rows(loaded, "\n")[0]])
    # And the model is saved with them.
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(again.get_input_embeddings().weight, table)


def test_an_ordinary_token_becomes_special_and_keeps_its_embedding(tokenizers, tiny_model):
    """As Qwen3 has them: `<think>` is one id, but not special, so that a latent could hold it."""
    tokenizer = copy.deepcopy(tokenizers["newline_alone"])
    tokenizer.add_tokens(["<think>", "</think>"])
    model = tiny_model("llama", tokenizer)
    before = model.get_input_embeddings().weight.clone()
    ids = add_tags(model, tokenizer, WORDS)
    assert ids == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert (build_token_table(tokenizer, len(tokenizer), action_format=TAGS).next_state_SV[:, ids[0]] == -1).all()


@pytest.mark.parametrize("tie", [True, False])
def test_adapters_must_train_the_tags(tokenizers, tiny_model, tie):
    tokenizer = copy.deepcopy(tokenizers["newline_alone"])

    def adapted(model, **options):
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))

    with pytest.raises(ValueError, match="PeftModel without embeddings.*before"):
        add_tags(adapted(tiny_model("llama", tokenizer)), copy.deepcopy(tokenizer), WORDS)
    rows = list(add_tags(tiny_model("llama", tokenizer), tokenizer, WORDS))

    def model():
        return tiny_model("llama", tokenizer, tie_word_embeddings=tie)

    names = ["embed_tokens", "lm_head"]
    both = rows if tie else dict.fromkeys(names, rows)
    with pytest.raises(ValueError, match="learn to think") as error:
        add_tags(adapted(model()), tokenizer, WORDS)
    assert f"trainable_token_indices={both}" in str(error.value) and f"modules_to_save={names}" in str(error.value)
    with pytest.raises(ValueError, match="learn to think"):
        add_tags(adapted(model(), trainable_token_indices=rows[:1]), tokenizer, WORDS)
    for options in ({"trainable_token_indices": both}, {"modules_to_save": names}):
        assert list(add_tags(adapted(model(), **options), tokenizer, WORDS)) == rows
    if not tie:
        with pytest.raises(ValueError, match="learn to think"):  # the head would stay as it is
            add_tags(adapted(model(), trainable_token_indices=rows), tokenizer, WORDS)


def test_no_tags_do_nothing(tokenizers, tiny_model):
    size = len(tokenizers["newline_alone"])
    assert add_tags(tiny_model("llama", tokenizers["newline_alone"]), tokenizers["newline_alone"], {}) == ()
    assert len(tokenizers["newline_alone"]) == size


# ---- rollouts and annotation ----


def judge(slow_path, model, tokenizer, action_format, **params):
    """The slow path with this format's stop and bans, spelled out once more."""
    slow = slow_path(model, tokenizer, **params)
    end = action_format.end.encode()
    special = [tokenizer.convert_tokens_to_ids(tag) for tag in action_format.tags]
    for i in special:
        slow.data[i] = None
    ends = special[1:] or [i for i, b in enumerate(slow.data) if b and end in b]
    slow.stop_ids = [*ends, tokenizer.eos_token_id]
    banned = {"slashes": b"\\", "markdown": b"\\", "prose": b"["}.get(action_format.name, b"\n")
    if action_format in (SLASHES, MARKDOWN):
        slow.blank = [not b or b[:1] != b" " or not b.strip() for b in slow.data]
    slow.data = [None if b and (i in ends or banned in b) else b for i, b in enumerate(slow.data)]
    slow.forbidden = action_format.forbidden_bytes
    return slow


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["newline_indent", "sentencepiece"])
def test_engines_agree_in_each_format(setting, tiny_model, slow_path, name, kind):
    action_format, tokenizer, document = setting(name, kind)
    model = tiny_model("llama", tokenizer)
    backbone = Backbone(model)
    table = build_token_table(tokenizer, backbone.vocab_size, action_format=action_format)
    branch, expand = (
        kind(backbone, table, SamplingParams(max_length=4), 8192) for kind in (BranchEngine, ExpandEngine)
    )
    with torch.no_grad():  # a logit of such size, of either sign, that the stop is drawn at some steps
        model.lm_head.weight[table.stop_id] *= 10
    groups = [engine.rollout(document, document.boundaries[:4], 3, 2, KEY) for engine in (branch, expand)]
    assert_same_groups(*groups)
    latents = [z for row in groups[0].latents for z in row]
    assert any(z.stopped for z in latents)
    for latent in latents:
        text = b"".join(table.token_bytes[i] for i in latent.token_ids).decode()
        assert text.strip() and "think>" not in text and (action_format.tags or action_format.end not in text)
        assert not set(text) & set(action_format.forbidden + "\n") and (text[0] == " " or not action_format.first)
    if kind == "newline_indent":
        slow = judge(slow_path, model, tokenizer, action_format)
        assert_group_is_exact(groups[0], slow, horizon=2)
        assert_latents_are_exact(groups[0], slow)


@pytest.mark.parametrize("name", FORMATS)
def test_annotation_in_each_format(setting, tiny_model, tmp_path, name):
    action_format, tokenizer, document = setting(name, "newline_punctuation")
    backbone = Backbone(tiny_model("llama", tokenizer))
    table = build_token_table(tokenizer, backbone.vocab_size, action_format=action_format)
    engine = BranchEngine(backbone, table, SamplingParams(max_length=5))
    args = RA3Config(output_dir=str(tmp_path), prior_alpha=0.1, max_latent_length=5)
    found = annotate(Policy(engine, args), document, NoiseKey(seed=1, phase=1, step=0))
    assert found.placed
    text = body_text(tokenizer, found.input_ids)
    assert without_latents(action_format, text) == TEXTS[name] != text
