"""No latent that may be drawn changes the program it stands in, whatever reads comments: Python, other compilers."""

from __future__ import annotations

import ast
import itertools
import random
import warnings
from dataclasses import replace

import pytest
import torch
from slow_path import bytes_of

from ra3_trl import ACTION_FORMATS, RA3Config
from ra3_trl.generation import AutoModelForCausalLMWithAbstractionHead, ThinkLogitsProcessor, strip_latents
from ra3_trl.policy import Policy
from ra3_trl.policy.annotate import annotate
from ra3_trl.rollout import NoiseKey, SamplingParams
from ra3_trl.rollout.backbone import Backbone
from ra3_trl.rollout.branch import BranchEngine
from ra3_trl.rollout.expand import ExpandEngine
from ra3_trl.rollout.sampler import LatentDistribution, draw
from ra3_trl.segmentation import MARKDOWN, PYTHON, SLASHES, Segmenter, build_token_table
from ra3_trl.segmentation.automaton import automaton_without


FILES = (  # rows 1 and 2 in all the ways in which a latent may come to stand there
    "x = 'é'\ny = 1\n", "\nx = 'é'\n", " \t\f\nx = 'é'\n", "\n\nx = 'é'\n", "\ufeffx = 'é'\n", "\ufeff\nx = 'é'\n",
    "\r\nx = 'é'\r\n", "\\\nx = 'é'\n", "'''é\n# coding: nonsense\n'''\nx = 1\n",
    "def f(\n    a,\n):\n    return 'é'\n",
    "for i in 'é':\n    x = i\nwith x as y:\n    pass\n", "#!/bin/python\nx = 'é'\n", "# é\n\nx = 'é'\n",
    "# -*- coding: utf-8 -*-\nx = 'é'\n", "class A:\n    '''é'''\n\n    x = 'é'\n",
)  # fmt: skip
PIECES = (
    " ", "\t", "#", "!", "-*- ", "en", "coding", "co", "ding", "Coding", ":", "=", "type", "ty", "pe", "Type",
    " ignore", "[x]", "nonsense", "latin-1", "int", "\\", "\u0085", "\u2028", "\ufeff", "é", "'''", '"""',
)  # fmt: skip
LATENTS = tuple("".join(pieces) for n in (1, 2, 3) for pieces in itertools.product(PIECES, repeat=n))
HOSTILE = (" coding: nonsense", " vim: set fileencoding=latin-1 :", "coding:x", "type: int", " type:ignore")
KEY = NoiseKey(seed=3, phase=1, step=0)


def reading(program: str) -> str:
    """What Python makes of the file: from its bytes, comments on types included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.dump(compile(program.encode(), "file", "exec", ast.PyCF_ONLY_AST | ast.PyCF_TYPE_COMMENTS))


def changes(program: str, wanted: str) -> bool:
    try:
        return reading(program) != wanted
    except (SyntaxError, ValueError, LookupError):
        return True


def placed(text: str, latent: str) -> list[str]:
    """`text` with the latent at each place where the format lets one stand."""
    lines, out = PYTHON.segment(text), []
    for before, line in zip((None, *lines), lines, strict=False):
        if line.latent and not line.comment and not (before and before.comment):
            out.append(f"{text[: line.start]}{line.indent}#{latent}\n{text[line.start :]}")
    return out


@pytest.fixture(scope="module")
def drawable(tokenizers):
    """`drawable(latent)`: whether it can be drawn byte by byte, under the table that everything samples by."""
    tokenizer = tokenizers["newline_alone"]
    table = build_token_table(tokenizer, len(tokenizer))
    one = {b: i for i, b in enumerate(bytes_of(tokenizer)) if b and len(b) == 1}

    def check(latent: str) -> bool:
        state = 0
        for byte in latent.encode():
            state = int(table.next_state[state, one[bytes([byte])]])
            if state < 0:
                return False
        return True

    return check


def test_no_latent_that_may_be_drawn_changes_a_program(drawable):
    """All 22,764 latents of up to three pieces, in two files in turn; what changes none stays free, but what holds
    `type:` behind something."""
    harmful, forbidden, texts = set(), {z for z in LATENTS if not drawable(z)}, itertools.cycle(FILES)
    wanted = {text: reading(text) for text in FILES}
    for latent in LATENTS:
        for text in FILES if latent in forbidden else (next(texts), next(texts)):
            if any(changes(program, wanted[text]) for program in placed(text, latent)):
                harmful.add(latent)
                break
    assert len(LATENTS) == 28 + 28**2 + 28**3 and len(harmful) > 50
    assert not harmful - forbidden
    assert all(any(text in z for text in ("coding:", "coding=", "type:")) for z in forbidden)
    assert not {" encoding", "coding", "Coding:", "type", "type :", " Type: int", "cotype"} & forbidden


@pytest.mark.slow
def test_no_latent_that_may_be_drawn_changes_a_program_in_any_file(drawable):
    wanted = {text: reading(text) for text in FILES}
    for latent in filter(drawable, LATENTS):
        assert not any(changes(program, wanted[text]) for text in FILES for program in placed(text, latent)), latent


def test_the_automaton_is_a_search_in_the_whole_text():
    """Texts that begin with one another's ends, cut anywhere: `abab` within `ababc`, and characters of three bytes."""
    texts = ("abc", "bcab", "ca:", "é\u2028", "\u2029")
    automaton = automaton_without(tuple(text.encode() for text in texts))
    rng, some = random.Random(0), 0
    for _ in range(3000):
        text = "".join(rng.choices("abc:é\u2028\u2029\u202a", k=rng.randint(1, 9)))
        data, at, state = text.encode(), 0, 0
        while at < len(data) and state >= 0:
            end = at + rng.randint(1, 4)
            state, at = int(automaton.run([data[at:end]])[state, 0]), end
        assert (state < 0) == any(part in text for part in texts), text
        some += state < 0
    assert 300 < some < 2700
    assert automaton.run([]).shape == (len(automaton.pending), 0)


@pytest.mark.parametrize("latent", HOSTILE)
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.5}])
def test_a_model_that_wants_nothing_else_does_not_get_it(tokenizer, latent, params):
    """Each next token of the latent has all of the mass but a trifle: the one that would complete it is not drawn."""
    table = build_token_table(tokenizer, len(tokenizer))
    distribution = LatentDistribution(table, SamplingParams(16, **params))
    ids = tokenizer("#" + latent, add_special_tokens=False)["input_ids"]
    ids = ids[len(tokenizer("#", add_special_tokens=False)["input_ids"]) :]
    state, text = torch.zeros(1, dtype=torch.long), b""
    for step, token in enumerate(ids):
        logits = torch.zeros(1, len(tokenizer))
        logits[0, token] = 60.0
        drawn = draw(distribution, logits, state, step, torch.tensor([0.5], dtype=torch.float64))
        text += table.token_bytes[int(drawn.tokens_n)] or b""
        if int(drawn.tokens_n) != token:
            break
        state = drawn.state_n
    else:
        raise AssertionError(f"{latent!r} was drawn")
    assert text and not any(banned in text for banned in PYTHON.forbidden_bytes)
    assert bool(torch.isfinite(drawn.logps_n).all())


# ---- every way in which latents are written ----


TEXT = "\nx = 'é'\ny = 1\n"  # behind a blank row, where one may stand on row 2


@pytest.fixture
def parrot(tokenizers, tiny_model):
    """`parrot(latent)`: a model that thinks at every line and writes this latent, whatever stands before: its layers
    add nothing, and each token's embedding asks for the next one."""

    def make(latent: str):
        tokenizer = tokenizers["sentencepiece"]
        model = tiny_model("llama", tokenizer, hidden_size=64)
        marked = tokenizer("\n#" + latent, add_special_tokens=False)["input_ids"]
        newline = tokenizer.convert_tokens_to_ids("<0x0A>")
        chain = [*marked[marked.index(newline) :], newline]
        assert len(set(chain)) == len(chain) - 1 <= 32
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.zero_()
                if "norm" in name:
                    parameter.fill_(1.0)
            model.lm_head.weight.zero_()
            for k, (token, following) in enumerate(zip(chain, chain[1:], strict=False)):
                model.get_input_embeddings().weight[token] = torch.eye(64)[k]
                model.lm_head.weight[following] += 8 * torch.eye(64)[k]
        return model, tokenizer

    return make


def row_2(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ").split("\n")[1]


def ways(model, tokenizer, action_format, tmp_path):
    """Row 2 as each of the ways writes it."""
    backbone = Backbone(model)
    table = build_token_table(tokenizer, backbone.vocab_size, action_format=action_format)
    (document,) = Segmenter(tokenizer, action_format, 1000)(0, TEXT)
    first = document.boundaries[0]
    engines = [kind(backbone, table, SamplingParams(16)) for kind in (BranchEngine, ExpandEngine)]
    engines.append(BranchEngine(backbone, table, SamplingParams(16, top_p=0.9)))
    for engine in engines:
        (group,) = engine.rollouts([document], [(first,)], 3, 1, KEY)
        yield from (tokenizer.decode([*document.actions[first].think, *z.token_ids]) for z in group.latents[0])
    for way in ("policy", "resample"):
        args = RA3Config(output_dir=str(tmp_path), max_latent_length=16, prior_alpha=0.1, use_cpu=True)
        example = annotate(Policy(engines[0], args), document, KEY, way)
        if first in example.placed:
            yield row_2(tokenizer, example.input_ids)
    prompt = torch.tensor([tokenizer("\n")["input_ids"]])
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    for think, threshold in (("auto", None), ("auto", 0.5), ("always", None)):
        processor = ThinkLogitsProcessor(tokenizer, think, threshold=threshold, action_format=action_format.name)
        yield row_2(tokenizer, model.generate(prompt, logits_processor=[processor], **settings)[0])
        wrapper = AutoModelForCausalLMWithAbstractionHead(model, tokenizer=tokenizer)
        wrapper.abstraction_head.config = replace(
            wrapper.abstraction_head.config, action_format=action_format.name, max_latent_length=16
        )
        yield row_2(tokenizer, wrapper.generate(prompt, think=think, threshold=threshold, **settings)[0])


@pytest.mark.parametrize("latent", ["coding: z", "type: z"])
def test_every_way_of_writing_latents_keeps_it_out(parrot, tmp_path, monkeypatch, latent):
    model, tokenizer = parrot(latent)
    rows = list(ways(model, tokenizer, PYTHON, tmp_path))
    assert len(rows) >= 9 + 1 + 6
    for row in rows:
        assert row.startswith(f"#{latent[:4]}") and latent[: latent.index(":") + 1] not in row, row
        assert not changes(f"\n{row}\nx = 'é'\n", reading("\nx = 'é'\n"))
    # It would have written just that.
    free = replace(PYTHON, name="free", forbidden_texts=())
    monkeypatch.setitem(ACTION_FORMATS, "free", free)
    assert sum(row == f"#{latent}" for row in ways(model, tokenizer, free, tmp_path)) >= 9 + 6


@pytest.mark.parametrize(
    "name, text", [("python", "\ufeffx = 1\ny = 2\n"), ("slashes", "\ufeffint x;\nint y;\n"),
                   ("markdown", "```py\n\ufeffx = 1\ny = 2\n```\n")],
)  # fmt: skip
def test_nothing_stands_before_a_byte_order_mark(name, text):
    lines = [line for line in ACTION_FORMATS[name].segment(text) if line.latent]
    assert [text[line.start :].split("\n")[0] for line in lines] in (["y = 2"], ["int y;"])


# ---- other languages, and taking comments out again ----


def test_orders_to_compilers_are_no_latents_of_slashes(tokenizers):
    tokenizer = tokenizers["newline_alone"]
    one = {b: i for i, b in enumerate(bytes_of(tokenizer)) if b and len(b) == 1}
    for latent in (" +build ignore", " @ts-nocheck", " what??/", " swift-tools-version:5", " a\\", " coding: x"):
        for action_format in (SLASHES, MARKDOWN):
            table, state = build_token_table(tokenizer, len(tokenizer), action_format=action_format), 0
            for byte in latent.encode():
                state = int(table.next_state[state, one[bytes([byte])]]) if state >= 0 else -1
            assert (state < 0) == (action_format is MARKDOWN or "coding" not in latent), (latent, action_format.name)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("# a \\\n# b\nx = 1\n", "x = 1\n"),
        ("x = 1  # a \\\n# b\ny = 2\n", "x = 1  # a \\\ny = 2\n"),
        ("def f():\n    # a \\\n    # b \\\n    # c\n    return 1\n", "def f():\n    return 1\n"),
        ("# a \\\r\n# b\r\nx = 1\r\n", "x = 1\r\n"),
        ("f(1,  # a \\\n# b\n2)\n", "f(1,  # a \\\n2)\n"),
        ("x = 1 + \\\n# b\n", "x = 1 + \\\n# b\n"),  # a backslash behind code carries the row on
        ("s = 'a\\\n# b'\n# c\n", "s = 'a\\\n# b'\n"),
    ],
)
def test_a_comment_that_ends_in_a_backslash_carries_nothing(text, wanted):
    assert strip_latents(text) == wanted
