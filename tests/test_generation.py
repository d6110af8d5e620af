"""Latents at generation: forced, banned, decided, shaped, and taken out again.

The model that writes is mostly `Texts`, a language model of a few given texts, so that every probability is known.
"""

from __future__ import annotations

import ast
import copy
import itertools
import math
import random
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import EOS
from transformers import LogitsProcessor, TextStreamer, pipeline

from ra3_trl import ACTION_FORMATS
from ra3_trl.generation import ThinkLogitsProcessor, strip_latents
from ra3_trl.models import add_tags
from ra3_trl.records import Latent
from ra3_trl.segmentation import PYTHON, Segmenter, splice


FLAT = "def f(x):\n    a = g(\n        x,\n    )\n    b = a\n    return b\n"
CODE = "def f(x):\n    if x:\n        y = g(\n            x,\n        )\n        return y\n    return x\n"


class Texts(LogitsProcessor):
    """A language model that knows sequences of tokens with weights: log-probs of what follows a prefix of some.

    Each other token has 1e-9. `likes` are added to the log-probs of some tokens.
    """

    def __init__(self, tokenizer, weights: dict[tuple[int, ...], float], likes: dict[int, float] | None = None):
        self.pad, self.weights, self.likes = tokenizer.pad_token_id, weights, likes or {}

    def __call__(self, input_ids, scores):
        out = torch.zeros_like(scores)
        for n, row in enumerate(input_ids.tolist()):
            row = tuple(itertools.dropwhile(lambda i: i == self.pad, row))
            for text, weight in self.weights.items():
                if len(text) > len(row) and text[: len(row)] == row:
                    out[n, text[len(row)]] += weight
        out = (out / out.sum(-1, keepdim=True).clamp(min=1e-9) + 1e-9).log()
        for token, more in self.likes.items():
            out[:, token] += more
        return out.log_softmax(-1)


@pytest.fixture(scope="module")
def models(tokenizers, tiny_model):
    """One small model for each tokenizer, made when it is asked for."""
    made = {}

    def get(tokenizer):
        if id(tokenizer) not in made:
            made[id(tokenizer)] = tiny_model("llama", tokenizer)
        return made[id(tokenizer)]

    return get


def document(tokenizer, text=CODE, action_format="python"):
    return Segmenter(tokenizer, ACTION_FORMATS[action_format], 10_000)(0, text)[0]


def latent_for(tokenizer, words):
    """A latent of these words, in tokens as they stand behind the marker."""
    ids = tokenizer("#" + words, add_special_tokens=False)["input_ids"]
    head = tokenizer("#", add_special_tokens=False)["input_ids"]
    assert ids[: len(head)] == head
    return Latent(tuple(ids[len(head) :]), True)


def all_splices(tokenizer, doc, boundaries, words=" why"):
    """Token ids of the document with a latent at each subset of the boundaries, by subset."""
    latent = latent_for(tokenizer, words)
    subsets = itertools.chain.from_iterable(itertools.combinations(boundaries, n) for n in range(len(boundaries) + 1))
    return {chosen: splice(doc, dict.fromkeys(chosen, latent)).input_ids for chosen in subsets}


def run(model, processors, ids, **settings):
    """Generated rows, prompts (a list of ids each, padded on the left here) included."""
    rows = ids if isinstance(ids[0], (list, tuple)) else [ids]
    pad, width = model.config.pad_token_id, max(map(len, rows))
    batch = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    settings = {"max_new_tokens": 96, "do_sample": False} | settings
    out = model.generate(batch, attention_mask=mask, logits_processor=processors, **settings).tolist()
    return [r[width - len(rows[n // (len(out) // len(rows))]) :] for n, r in enumerate(out)]


def prompt_of(doc):
    """Tokens up to the first boundary."""
    return doc.input_ids[: doc.actions[doc.boundaries[0]].start]


def own_line_comments(text):
    """Comments at column 0 of a logical line: rows that vanish, brackets left alone."""
    lines = ACTION_FORMATS["python"].segment(text)
    return [text[line.start :].split("\n")[0] for line in lines if line.comment]


def boundaries_behind_first_line(doc):
    return [s for s in doc.boundaries if doc.actions[s].start > doc.context]


# ---- always, auto, never against splice ----


def test_always_writes_what_splice_writes(tokenizer, models):
    doc = document(tokenizer)
    boundaries = boundaries_behind_first_line(doc)
    assert len(boundaries) == 4  # if, y = g(...), return y, return x; not the rows in the bracket
    wanted = splice(doc, dict.fromkeys(boundaries, latent_for(tokenizer, " why"))).input_ids
    prompt = doc.input_ids[: doc.actions[boundaries[0]].start]
    # The model hardly thinks (1e-4) and would rather end the text than a latent (e^7, all other stops 1).
    texts = Texts(tokenizer, {doc.input_ids: 1.0, wanted: 1e-4}, likes={tokenizer.eos_token_id: 7.0})
    got = run(models(tokenizer), [texts, ThinkLogitsProcessor(tokenizer, "always")], prompt)[0]
    assert tuple(got) == wanted


@pytest.mark.parametrize("chosen", [(), (0, 2), (1, 2, 3)])
def test_auto_leaves_the_decision_to_the_model(tokenizer, models, chosen):
    doc = document(tokenizer)
    boundaries = boundaries_behind_first_line(doc)
    placed = dict.fromkeys([boundaries[i] for i in chosen], latent_for(tokenizer, " why"))
    wanted = splice(doc, placed).input_ids
    prompt = doc.input_ids[: doc.actions[boundaries[0]].start]
    got = run(models(tokenizer), [Texts(tokenizer, {wanted: 1.0}), ThinkLogitsProcessor(tokenizer)], prompt)[0]
    assert tuple(got) == wanted


def test_never_writes_no_comment_however_much_the_model_wants_one(tokenizer, models):
    doc = document(tokenizer)
    markers = [
        i for i, b in enumerate(ThinkLogitsProcessor(tokenizer)._vocabulary.table.token_bytes) if b and b"#" in b
    ]
    assert markers
    texts = Texts(tokenizer, {doc.input_ids: 1.0}, likes=dict.fromkeys(markers, 30.0))
    prompt = doc.input_ids[: doc.actions[1].start]
    assert run(models(tokenizer), [texts], prompt, max_new_tokens=1)[0][-1] in markers  # it does want one
    # Behind code a comment may stand, so these are kept out by weight: the model wants them at line starts only.
    got = run(models(tokenizer), [AtLineStart(tokenizer, texts), ThinkLogitsProcessor(tokenizer, "never")], prompt)
    assert tuple(got[0]) == doc.input_ids


class AtLineStart(LogitsProcessor):
    """`texts`, whose likes count only while a line is blank."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.likes = tokenizer, texts, texts.likes

    def __call__(self, input_ids, scores):
        rows = []
        for row in input_ids:
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            blank = not text.rpartition("\n")[2].strip() and text.count("(") == text.count(")")
            self.texts.likes = self.likes if blank else {}
            rows.append(self.texts(row[None], scores[:1]))
        self.texts.likes = self.likes
        return torch.cat(rows)


def test_never_bans_the_marker_behind_spaces_of_any_number(tokenizer, models):
    """A model that writes nothing but spaces, newlines and `#` gets no `#` at the start of a line."""
    data = ThinkLogitsProcessor(tokenizer)._vocabulary.table.token_bytes
    likes = {i: 12.0 for i, b in enumerate(data) if b and not b.strip(b" \n#")}
    assert any(b"#" in data[i] for i in likes) and any(b"\n" in data[i] for i in likes)
    texts = Texts(tokenizer, {}, likes=likes)
    ids = tokenizer("if x:\n    y\n")["input_ids"]
    processor = ThinkLogitsProcessor(tokenizer, "never")
    rows = run(
        models(tokenizer), [texts, processor], ids, do_sample=True, num_return_sequences=8, max_new_tokens=40, top_k=0
    )
    text = "".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    assert "#" not in text and text.count("\n") > 20
    free = run(models(tokenizer), [texts], ids, do_sample=True, num_return_sequences=8, max_new_tokens=40, top_k=0)
    assert "#" in "".join(tokenizer.decode(row, skip_special_tokens=True) for row in free)


# ---- where a boundary is ----


@pytest.mark.parametrize(
    ("before", "legal"),
    [
        ("x = 1\n", True),
        ("if x:\n", True),
        ("x = 1\n\n\n", True),
        ("x = f(\n", False),
        ("x = [1,\n", False),
        ('x = """a\n', False),
        ("x = 1 + \\\n", False),
        ("# said\n", False),  # no latent directly behind a comment
        ("x = 1\n  # said\n", False),
        ("x = 1  # said\n", True),
        ("x = 'a\n", False),  # does not tokenize
        ("x = 1", False),
        ("if x:\n        y = 1\n    z = 2\n", False),  # nor does this
    ],
)
def test_boundaries_are_those_of_the_format(tokenizer, models, before, legal):
    ids = tokenizer(before)["input_ids"]
    row = run(models(tokenizer), [ThinkLogitsProcessor(tokenizer, "always")], ids, max_new_tokens=4)[0]
    assert tokenizer.decode(row, skip_special_tokens=True)[len(before) :].lstrip(" ").startswith("#") == legal


def test_the_indent_of_a_latent_follows_from_the_lines_before(tokenizer, models):
    for before, indent in (("if x:\n  if y:\n", 4), ("if x:\n   y\n", 3), ("class A:\n\n", 4), ("y\n", 0)):
        ids = tokenizer(before)["input_ids"]
        row = run(models(tokenizer), [ThinkLogitsProcessor(tokenizer, "always")], ids, max_new_tokens=6)[0]
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert text.startswith(before + " " * indent + "#"), text


def test_a_special_token_ends_the_text_before(tokenizer, models):
    """`f(` before an EOS is of another text: behind it there is no open bracket."""
    open_bracket = tokenizer("f(\n")["input_ids"]
    ids = [*open_bracket, tokenizer.eos_token_id, *tokenizer("x = 1\n", add_special_tokens=False)["input_ids"]]
    row = run(models(tokenizer), [ThinkLogitsProcessor(tokenizer, "always")], ids, max_new_tokens=2)[0]
    assert b"#" in bytes(tokenizer.decode(row[len(ids) :]), "utf-8")


def test_a_prompt_that_is_no_code(tokenizer, models):
    """Behind prose nothing tokenizes as Python; read apart from it, the completion does."""
    ids = tokenizer("It's a chat:\n")["input_ids"]
    for prompt_is_code in (True, False):
        processor = ThinkLogitsProcessor(tokenizer, "always", prompt_is_code=prompt_is_code, max_latent_length=3)
        first, second = (run(models(tokenizer), [processor], ids, max_new_tokens=2)[0] for _ in range(2))
        assert first == second  # used again
        assert ("#" in tokenizer.decode(first[len(ids) :])) != prompt_is_code


def test_a_second_prompt_that_goes_on_from_the_first(tokenizers, models):
    """Of a chat's second turn the first answer is prompt too, and no part of the code."""
    tokenizer = tokenizers["newline_alone"]
    processor = ThinkLogitsProcessor(tokenizer, "always", prompt_is_code=False)
    for prompt in ("It's a chat:\n", "It's a chat:\nand it's the second turn:\n"):
        ids = tokenizer(prompt)["input_ids"]
        row = run(models(tokenizer), [processor], ids, max_new_tokens=2)[0]
        assert tokenizer.decode(row[len(ids) :]).startswith("#")


def test_a_text_may_begin_with_a_latent_but_not_its_padding(tokenizers):
    """With one special token for all, as GPT-2 has it: behind it a prompt may begin, behind a finished row nothing."""
    tokenizer = copy.deepcopy(tokenizers["newline_alone"])
    tokenizer.bos_token = EOS
    processor = ThinkLogitsProcessor(tokenizer, "always")
    bos, marker = tokenizer.bos_token_id, *tokenizer("#")["input_ids"]
    scores = torch.zeros(2, len(tokenizer))
    out = processor(torch.tensor([[bos, bos], [bos, 7]]), scores)
    assert out[0].argmax() == marker and torch.equal(out[1], scores[1])
    assert torch.equal(processor(torch.tensor([[bos, 7, bos], [bos, bos, 7]]), scores), scores)


# ---- decisions ----


def two_texts(tokenizer, p_think):
    """A document whose first boundary gets a latent with probability `p_think`, as a model, and both texts."""
    doc = document(tokenizer)
    boundary = boundaries_behind_first_line(doc)[0]
    plain, thought = doc.input_ids, splice(doc, {boundary: latent_for(tokenizer, " why")}).input_ids
    model = Texts(tokenizer, {plain: 1 - p_think, thought: p_think})
    return model, doc.input_ids[: doc.actions[boundary].start], plain, thought


@pytest.mark.parametrize("p_think", [0.2, 0.7])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 1.0])
def test_threshold_on_the_prefix(tokenizer, models, p_think, threshold):
    """P(think), the product of the prefix's tokens, is `p_think`."""
    texts, prompt, plain, thought = two_texts(tokenizer, p_think)
    processor = ThinkLogitsProcessor(tokenizer, threshold=threshold)
    got = tuple(run(models(tokenizer), [texts, processor], prompt, max_new_tokens=len(thought) - len(prompt))[0])
    wanted = thought if p_think >= threshold else plain
    assert got[: len(wanted)] == wanted


def test_the_chance_of_a_prefix_is_the_product_of_its_tokens(tokenizers):
    """0.5 for the spaces, 0.8 for the marker behind them: 0.4."""
    tokenizer = tokenizers["newline_alone"]
    row = tokenizer("if x:\n")["input_ids"]
    spaces, marker = ThinkLogitsProcessor(tokenizer)._vocabulary.fragment("    #")
    first, second = (torch.full((1, len(tokenizer)), -math.inf) for _ in range(2))
    first[0, [spaces, 7]] = torch.tensor([0.5, 0.5]).log()
    second[0, [marker, 7]] = torch.tensor([0.8, 0.2]).log()
    for threshold, thinks in ((0.35, True), (0.45, False)):
        processor = ThinkLogitsProcessor(tokenizer, threshold=threshold)
        assert torch.allclose(processor(torch.tensor([row]), first).exp(), first.exp())  # still the model's choice
        out = processor(torch.tensor([[*row, spaces]]), second)[0].exp()
        assert out[marker] == float(thinks) and out[7] == float(not thinks)


def test_more_threshold_is_less_thinking(tokenizer, models):
    """The model thinks before four lines with 0.2, 0.4, 0.6 and 0.8, each by itself."""
    doc = document(tokenizer, "def f(x):\n    a = 1\n    b = 2\n    c = 3\n    return a\n")
    boundaries = boundaries_behind_first_line(doc)
    chances = dict(zip(boundaries, (0.2, 0.4, 0.6, 0.8), strict=True))
    texts = all_splices(tokenizer, doc, boundaries)
    weights = {
        ids: math.prod(p if boundary in chosen else 1 - p for boundary, p in chances.items())
        for chosen, ids in texts.items()
    }
    prompt = doc.input_ids[: doc.actions[boundaries[0]].start]
    for threshold, thinking in ((0.1, 4), (0.3, 3), (0.5, 2), (0.7, 1), (0.9, 0)):
        processors = [Texts(tokenizer, weights), ThinkLogitsProcessor(tokenizer, threshold=threshold)]
        assert tuple(run(models(tokenizer), processors, prompt)[0]) == texts[tuple(boundaries[4 - thinking :])]


@pytest.mark.parametrize("gate", [0.2, 0.7])
def test_a_gate_decides_in_the_models_place(tokenizer, models, gate):
    texts, prompt, plain, thought = two_texts(tokenizer, 1 - gate)  # the tokens say the contrary
    answers = []

    def ask():
        answers.append(gate if not answers else 0.0)
        return torch.tensor(answers[-1:])

    got = run(models(tokenizer), [texts, ThinkLogitsProcessor(tokenizer, gate=ask)], prompt)[0]
    assert tuple(got) == (thought if gate >= 0.5 else plain)
    assert len(answers) == 5  # once before each of four lines, once at the end; not behind a latent


def test_a_gate_is_asked_at_decisions_only(tokenizers, models):
    tokenizer = tokenizers["newline_indent"]

    def gate():
        raise AssertionError("asked where nothing is decided")

    ids = tokenizer("x = f(\n")["input_ids"]
    rows = run(models(tokenizer), [ThinkLogitsProcessor(tokenizer, gate=gate)], ids, max_new_tokens=1)
    assert len(rows[0]) == len(ids) + 1
    with pytest.raises(AssertionError, match="asked"):
        ids = tokenizer("x = f()\n")["input_ids"]
        run(models(tokenizer), [ThinkLogitsProcessor(tokenizer, gate=gate)], ids, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"shape \(3,\).*1 rows"):
        run(models(tokenizer), [ThinkLogitsProcessor(tokenizer, gate=lambda: torch.zeros(3))], ids, max_new_tokens=1)


# ---- inside a latent ----


def test_a_latent_is_drawn_as_it_was_trained(tokenizer, models):
    """Log-probs inside: the stop is all of newline and EOS at the closure's first token; blanks can't begin."""
    processor = ThinkLogitsProcessor(tokenizer)
    ids = [*tokenizer("if x:\n")["input_ids"]]
    doc = document(tokenizer, "if x:\n    y = 1\n    z = 2\n")
    action = doc.actions[boundaries_behind_first_line(doc)[0]]
    boundary = action.boundary
    ids = [*doc.input_ids[: action.start], *boundary.think]
    table = processor._vocabulary.table
    torch.manual_seed(0)
    scores = torch.randn(1, len(tokenizer))
    first = processor(torch.tensor([ids]), scores)[0].exp()
    assert first[table.stop_ids].sum() == 0 and first[table.blank_V].sum() == 0
    assert first.sum() == pytest.approx(1, abs=1e-5)
    word = latent_for(tokenizer, " why").token_ids
    later = processor(torch.tensor([[*ids, *word]]), scores)[0].exp()
    allowed = (table.next_state_SV[0] >= 0).clone()
    allowed[table.stop_ids] = True
    stop = scores[0, table.stop_ids].logsumexp(0) - scores[0, allowed].logsumexp(0)
    assert later[boundary.close[0]].item() == pytest.approx(stop.exp().item(), rel=1e-5)
    assert later[table.stop_ids].sum().item() == pytest.approx(stop.exp().item(), rel=1e-5)
    for k in range(1, len(boundary.close)):
        closing = processor(torch.tensor([[*ids, *word, *boundary.close[:k]]]), scores)[0]
        assert closing.isfinite().nonzero().tolist() == [[boundary.close[k]]]
    behind = processor(torch.tensor([[*ids, *word, *boundary.close]]), scores)
    assert torch.equal(behind[0], scores[0])  # the line is the model's own


def test_a_closure_of_several_tokens_is_written_out(tokenizers, monkeypatch):
    """A vocabulary may have a token for two newlines and three spaces and none for one newline and three spaces."""
    tokenizer = tokenizers["newline_indent"]
    newline, spaces, carry = tokenizer.convert_tokens_to_ids(["Ċ", "ĠĠĠ", "ĊĠĠĠ"])
    processor = ThinkLogitsProcessor(tokenizer)
    fragment = processor._vocabulary.fragment
    monkeypatch.setattr(
        processor._vocabulary, "fragment", lambda text: (newline, spaces) if text == "\n   " else fragment(text)
    )
    start = tokenizer("if x:")["input_ids"]
    row = [*start, carry, *fragment(" #"), *latent_for(tokenizer, " why").token_ids]
    scores = torch.zeros(1, len(tokenizer))
    shaped = processor(torch.tensor([row]), scores)[0]
    assert shaped[newline] > shaped[start[0]] and shaped[carry] == -math.inf  # all stops are one, at the first token
    closing = processor(torch.tensor([[*row, newline]]), scores)[0]
    assert closing.isfinite().nonzero().tolist() == [[spaces]]
    assert torch.equal(processor(torch.tensor([[*row, newline, spaces]]), scores), scores)
    # A comment that is no latent, for it stands elsewhere, is closed as its writer likes.
    assert torch.equal(processor(torch.tensor([[*start, newline, *row[-4:], newline]]), scores), scores)


def test_a_comment_that_no_latent_could_be_is_left_alone(tokenizers):
    """Half a character, a control character: the prompt has them, and the model may end the line as it likes."""
    tokenizer = tokenizers["newline_alone"]
    scores = torch.zeros(1, len(tokenizer))
    for text, latent in (("x\n# a", True), ("x\n# a\x01 b", False)):
        row = torch.tensor([tokenizer(text)["input_ids"]])
        assert torch.equal(ThinkLogitsProcessor(tokenizer)(row, scores), scores) != latent


def test_latents_have_their_longest_length(tokenizer, models):
    doc = document(tokenizer)
    for longest in (1, 3):
        processor = ThinkLogitsProcessor(tokenizer, "always", max_latent_length=longest)
        no_stop = Texts(tokenizer, {}, likes=dict.fromkeys(processor._vocabulary.table.stop_ids.tolist(), -30.0))
        prompt = doc.input_ids[: doc.actions[1].start]
        boundary = doc.actions[1].boundary
        latent = len(boundary.think) + longest + len(boundary.close)
        row = run(models(tokenizer), [no_stop, processor], prompt, max_new_tokens=latent, do_sample=True)[0]
        assert tuple(row[-len(boundary.close) :]) == boundary.close
        assert tokenizer.decode(row[len(prompt) :]).count("\n") == 1


# ---- batches, beams, sampling, pipelines ----

MODES = [{"think": "always"}, {"think": "never"}, {}, {"threshold": 0.05}]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_batch_is_its_rows(tokenizer, models, mode):
    prompts = ["def f(x):\n", "if x:\n  y = (\n", "class A:\n    def g(self, x):\n        return 1\n", "x"]
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    # A tiny model writes few newlines by itself.
    data = ThinkLogitsProcessor(tokenizer)._vocabulary.table.token_bytes
    likes = Likes({i: 6.0 for i, b in enumerate(data) if b and b"\n" in b})
    settings = {"max_new_tokens": 24, "max_latent_length": 5} | mode
    length = settings.pop("max_new_tokens")
    make = lambda: [likes, ThinkLogitsProcessor(tokenizer, **settings)]  # noqa: E731
    together = run(models(tokenizer), make(), ids, max_new_tokens=length)
    alone = [run(models(tokenizer), make(), row, max_new_tokens=length)[0] for row in ids]
    end = [row.index(tokenizer.pad_token_id) if tokenizer.pad_token_id in row else len(row) for row in together]
    assert [row[:n] for row, n in zip(together, end, strict=True)] == alone


class Likes(LogitsProcessor):
    """The model's own scores, more for some tokens."""

    def __init__(self, likes):
        self.likes = likes

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, list(self.likes)] += torch.tensor(list(self.likes.values()))
        return scores


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "do_sample": True}, {"do_sample": True}])
@pytest.mark.parametrize("think", ["always", "never"])
def test_what_is_forced_holds_under_every_search(tokenizer, models, settings, think):
    """Every legal line behind the prompt has one latent, or none, whatever penalties and truncation there are."""
    code = CODE if think == "always" else FLAT
    doc = document(tokenizer, code)
    boundaries = boundaries_behind_first_line(doc)
    words = [" why", " so x"]
    weights = {}
    for n, word in enumerate(words):
        for chosen, ids in all_splices(tokenizer, doc, boundaries, word).items():
            weights[ids] = 0.1 + 0.01 * n + 0.02 * len(chosen)
    prompt = doc.input_ids[: doc.actions[boundaries[0]].start]
    torch.manual_seed(0)
    processors = [Texts(tokenizer, weights), ThinkLogitsProcessor(tokenizer, think)]
    extra = {"repetition_penalty": 3.0, "top_k": 5, "temperature": 0.7} if settings.get("do_sample") else {}
    rows = run(models(tokenizer), processors, prompt, max_new_tokens=100, **settings, **extra)
    for row in rows:
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert strip_latents(text) == code
        assert len(own_line_comments(text)) == (len(boundaries) if think == "always" else 0)


def test_beams_pay_nothing_for_a_ban(tokenizers, models):
    """The model thinks with 0.9. Never thinking, one line costs log 1 and not log 0.1 among the rest."""
    tokenizer = tokenizers["newline_alone"]
    texts, prompt, plain, _ = two_texts(tokenizer, 0.9)
    out = models(tokenizer).generate(
        torch.tensor([prompt]), num_beams=2, max_new_tokens=len(plain) - len(prompt), length_penalty=0.0,
        logits_processor=[texts, ThinkLogitsProcessor(tokenizer, "never")], return_dict_in_generate=True,
        output_scores=True, do_sample=False,
    )  # fmt: skip
    assert out.sequences[0, : len(plain)].tolist() == list(plain)
    assert out.sequences_scores[0].item() == pytest.approx(0, abs=1e-3)


def test_sampling_keeps_the_models_rate(tokenizers, models):
    """P(think) = 0.7 at the first boundary: of 200 texts 140 think, standard deviation sqrt(200*0.7*0.3) = 6.5."""
    tokenizer = tokenizers["newline_indent"]
    texts, prompt, _, thought = two_texts(tokenizer, 0.7)
    torch.manual_seed(0)
    rows = run(
        models(tokenizer), [texts, ThinkLogitsProcessor(tokenizer)], prompt, do_sample=True,
        num_return_sequences=200, max_new_tokens=6, top_k=0,
    )  # fmt: skip
    thinking = sum(tuple(row) == thought[: len(row)] for row in rows)
    assert abs(thinking - 140) < 4 * 6.5


@pytest.mark.parametrize("think", ["auto", "always", "never"])
def test_pipeline_streamer_and_empty_prompts(tokenizer, models, think, capsys):
    model = models(tokenizer)
    processor = ThinkLogitsProcessor(tokenizer, think, max_latent_length=4)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": 8, "do_sample": False, "logits_processor": [processor]}
    one = generator("def f(x):\n    y = x\n", **settings)[0]["generated_text"]
    two = generator(["def f(x):\n    y = x\n", "x\n"], batch_size=2, **settings)
    assert two[0][0]["generated_text"] == one
    if think != "auto":
        assert ("#" in one) == (think == "always")
    ids = tokenizer("def f(x):\n    y = x\n", return_tensors="pt")
    model.generate(ids.input_ids, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **settings)
    # Behind a newline `TextStreamer` decodes anew, and SentencePiece's decoder drops a space where a text begins.
    streamed, at_once = (
        [row.strip() for row in text.rstrip("\n").split("\n")] for text in (capsys.readouterr().out, one)
    )
    assert streamed == at_once
    empty = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id]])
    assert model.generate(empty, **settings).shape[1] > 1
    embeddings = model.get_input_embeddings()(ids.input_ids)
    assert model.generate(inputs_embeds=embeddings, **settings).shape[1] > 0


def test_finished_rows_wait_for_the_others(tokenizer, models):
    """One row ends at once, the other goes on; end of text and padding are no place to think at."""
    doc = document(tokenizer)
    eos = tokenizer.eos_token_id
    prompt = doc.input_ids[: doc.actions[1].start]
    short = tokenizer("y")["input_ids"]
    texts = Texts(tokenizer, {doc.input_ids: 1.0, (*short, eos): 1.0})
    for pad in (tokenizer.pad_token_id, eos):
        rows = run(
            models(tokenizer), [texts, ThinkLogitsProcessor(tokenizer, "never")], [short, prompt], pad_token_id=pad
        )
        assert tuple(rows[1]) == doc.input_ids
        assert rows[0][: len(short) + 1] == [*short, eos] and set(rows[0][len(short) + 1 :]) <= {pad}


def test_steps_back_change_nothing(tokenizer):
    """Assisted decoding asks for shorter prefixes again; nothing may depend on the order of calls."""
    doc = document(tokenizer)
    torch.manual_seed(0)
    ids = splice(doc, dict.fromkeys(boundaries_behind_first_line(doc), latent_for(tokenizer, " why"))).input_ids
    first = len(doc.input_ids[: doc.actions[1].start])
    scores = torch.randn(1, len(tokenizer))
    for mode in ({"think": "always"}, {"threshold": 1e-4}):
        processor = ThinkLogitsProcessor(tokenizer, **mode)
        ahead = [processor(torch.tensor([ids[:n]]), scores) for n in range(first, len(ids))]
        again = [processor(torch.tensor([ids[:n]]), scores) for n in (*range(first + 9, len(ids)),)]
        assert all(torch.equal(a, b) for a, b in zip(ahead[9:], again, strict=True))


def test_vocabularies_wider_than_the_tokenizer(tokenizers, tiny_model):
    """Rows of the head without a token: never in a latent, and no crash where a model writes one."""
    tokenizer = tokenizers["newline_alone"]
    model = tiny_model("llama", tokenizer, vocab_size=len(tokenizer) + 7)
    beyond = dict.fromkeys(range(len(tokenizer), len(tokenizer) + 7), 30.0)
    ids = tokenizer("def f(x):\n")["input_ids"]
    row = run(model, [Likes(beyond), ThinkLogitsProcessor(tokenizer, "always", max_latent_length=3)], ids)[0]
    boundary = len(tokenizer("    #", add_special_tokens=False)["input_ids"])
    assert max(row[: len(ids) + boundary + 4]) < len(tokenizer) <= max(row)


# ---- other formats ----

JAVA = "int f(int x) {\n  if (x > 0) {\n    g(\n      x);\n    return 1;\n  }\n  return x;\n}\n"


def test_slashes(tokenizer, models):
    doc = document(tokenizer, JAVA, "slashes")
    boundaries = boundaries_behind_first_line(doc)
    latent = latent_for(tokenizer, " why")
    wanted = splice(doc, dict.fromkeys(boundaries, latent)).input_ids
    texts = Texts(tokenizer, {doc.input_ids: 1.0, wanted: 1e-3})
    prompt = doc.input_ids[: doc.actions[boundaries[0]].start]
    got = run(models(tokenizer), [texts, ThinkLogitsProcessor(tokenizer, "always", action_format="slashes")], prompt)
    assert tuple(got[0][: len(wanted)]) == wanted
    text = tokenizer.decode(got[0][: len(wanted)], skip_special_tokens=True)
    assert text.count("// why") == len(boundaries) == 6 and strip_latents(text, "slashes") == JAVA
    data = ThinkLogitsProcessor(tokenizer)._vocabulary.table.token_bytes
    likes = {i: 12.0 for i, b in enumerate(data) if b and not b.strip(b" \n/")}
    never = ThinkLogitsProcessor(tokenizer, "never", action_format="slashes")
    for free in (False, True):
        processors = [Texts(tokenizer, {}, likes), *([] if free else [never])]
        rows = run(models(tokenizer), processors, doc.input_ids[:-1], do_sample=True, num_return_sequences=8)
        rows = [row for text in rows for row in tokenizer.decode(text, skip_special_tokens=True).split("\n")]
        assert any(row.lstrip().startswith("//") for row in rows) == free


@pytest.fixture(scope="module", params=["newline_indent", "sentencepiece"])
def tagged(request, tokenizers, tiny_model):
    """(tokenizer with tags, model)"""
    tokenizer = copy.deepcopy(tokenizers[request.param])
    model = tiny_model("llama", tokenizer)
    add_tags(model, tokenizer, ACTION_FORMATS["python_tags"].tags)
    return tokenizer, model


def test_tags(tagged):
    tokenizer, model = tagged
    text = CODE.replace("    return x\n", "\n\n    return x\n")  # blank rows: one latent before them, none behind
    doc = document(tokenizer, text, "python_tags")
    boundaries = boundaries_behind_first_line(doc)
    latent = latent_for(tokenizer, " why")
    wanted = splice(doc, dict.fromkeys(boundaries, latent)).input_ids
    texts = Texts(tokenizer, {doc.input_ids: 1.0, wanted: 1e-3})
    prompt = doc.input_ids[: doc.actions[boundaries[0]].start]
    always = ThinkLogitsProcessor(tokenizer, "always", action_format="python_tags", max_latent_length=4)
    written = tokenizer.decode(run(model, [texts, always], prompt)[0])
    assert written.startswith("def f(x):\n") or tokenizer.bos_token
    body = written.removesuffix(tokenizer.eos_token).removeprefix(tokenizer.bos_token or "")
    assert "<think> why</think>" in body
    assert body.count("<think>") == body.count("</think>")
    never = ThinkLogitsProcessor(tokenizer, "never", action_format="python_tags")
    wants = Texts(tokenizer, {doc.input_ids: 1.0}, likes=dict.fromkeys(always._vocabulary.tags.values(), 30.0))
    assert tuple(run(model, [wants, never], prompt)[0]) == doc.input_ids
    auto = ThinkLogitsProcessor(tokenizer, action_format="python_tags")
    assert tuple(run(model, [Texts(tokenizer, {wanted: 1.0}), auto], prompt)[0]) == wanted


def test_no_second_tagged_latent_before_a_line(tagged):
    tokenizer, model = tagged
    always = ThinkLogitsProcessor(tokenizer, "always", action_format="python_tags")
    think, end = always._vocabulary.tags.values()
    ids = tokenizer("x = 1\n", add_special_tokens=False)["input_ids"]
    newline = ids[-1]
    scores = torch.zeros(1, len(tokenizer))
    assert always(torch.tensor([ids]), scores).argmax() == think
    for behind in ([], [newline], [newline, newline]):
        row = torch.tensor([[*ids, think, ids[0], end, *behind]])
        assert always(row, scores)[0, think] == always(row, scores)[0, end] == -math.inf
    row = torch.tensor([[*ids, think, ids[0], end, *ids]])
    assert always(row, scores).argmax() == think


# ---- stripping ----


def test_strip_keeps_the_ast_and_says_what_goes():
    text = "# top\nx = '''\n# in a string\n'''  # behind\nif x:\n    # why\n    y = [\n        # in it\n        1]\n"
    bare = strip_latents(text)
    assert ast.dump(ast.parse(bare)) == ast.dump(ast.parse(text))
    assert bare == "x = '''\n# in a string\n'''  # behind\nif x:\n    y = [\n        1]\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ""),
        ("# a\nx = f(\n# b\n", "x = f(\n# b\n"),  # cut: the bracket's rows stay as they are
        ("# a\nx = 1\n# b", "x = 1"),
        ("# a\nx = 'cut", "x = 'cut"),
        ("# a\nif x:\n    # b\n    y = 1\n  z = 2\n# c", "if x:\n    y = 1\n  z = 2\n# c"),
        ("It's prose\n# not Python\n", "It's prose\n# not Python\n"),
    ],
)
def test_strip_of_text_that_is_cut(text, wanted):
    assert strip_latents(text) == wanted


def test_strip_other_formats():
    assert strip_latents("a;\n// why\nb;\n", "slashes") == "a;\nb;\n"
    text = "x = 1\n<think> a</think>y = 2\n# kept\n<think> cut"
    assert strip_latents(text, "python_tags") == "x = 1\ny = 2\n# kept\n"
    assert strip_latents("It rained. [ so] He slowed.", "prose") == "It rained. He slowed."


# ---- errors ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"think": "sometimes"}, "`think` is 'sometimes'; choose one of 'auto', 'always', 'never'"),
        ({"threshold": 1.5}, "`threshold` is 1.5"),
        ({"threshold": float("nan")}, "`threshold` is nan"),
        ({"think": "always", "threshold": 0.5}, "`threshold` is 0.5 and `think` is 'always'"),
        ({"think": "never", "gate": print}, "`gate` is .*`think` is 'never'"),
        ({"max_latent_length": 0}, "`max_latent_length` is 0"),
        ({"action_format": "pyton"}, "`action_format` is 'pyton'"),
        ({"action_format": "prose"}, "`action_format` is 'prose', whose latents do not begin behind a newline"),
        ({"action_format": "python_tags"}, r"`tokenizer` lacks the special tokens \['<think>', '</think>'\]"),
    ],
)
def test_errors_name_field_value_and_cure(tokenizers, settings, message):
    with pytest.raises(ValueError, match=message):
        ThinkLogitsProcessor(tokenizers["newline_indent"], **settings)


def test_a_model_without_the_tags_is_refused(tagged):
    processor = ThinkLogitsProcessor(tagged[0], action_format="python_tags")
    with pytest.raises(ValueError, match="logits for 300 tokens"):
        processor(torch.tensor([[5]]), torch.zeros(1, 300))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False
        bos_token_id = eos_token_id = None

        def __len__(self):
            return 7

    with pytest.raises(ValueError, match="`tokenizer` is Slow, .* pass a fast tokenizer"):
        ThinkLogitsProcessor(Slow())


# ---- used again, and damaged ----


def test_another_prompt_that_begins_like_the_one_before(tokenizers):
    """Used again on a prompt that is longer than the first and shorter than the first with its completion."""
    tokenizer = tokenizers["newline_indent"]
    scores, marker = torch.zeros(1, len(tokenizer)), tokenizer("#")["input_ids"][0]

    def bans(processor, prompt: str, completion: str) -> list[bool]:
        ids, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        rows = [torch.tensor([ids + after[:k]]) for k in range(len(after) + 1)]
        return [bool(processor(row, scores)[0, marker].isinf()) for row in rows]

    used, fresh = (ThinkLogitsProcessor(tokenizer, "never", prompt_is_code=False) for _ in range(2))
    bans(used, "Write code", "\nx = 1\ny = 2\nz = 3\nfoo(1, 2, 3)\nbar(4)\n")
    found, wanted = (bans(p, "Write code that's short", "\nx = 1\n") for p in (used, fresh))
    assert found == wanted and any(wanted) and not all(wanted)


@pytest.mark.parametrize("begin", ["'\n", "f(\n", "'''\n", "Here's the code:\n"])
def test_strip_takes_no_longer_for_what_can_not_be_read(begin):
    """Row by row it would be read 3,000 times, minutes for 60 kB; at once it takes a fraction of a second."""
    text = begin + "if x:\n    y = 1\n" * 3000
    start = time.perf_counter()
    assert strip_latents(text) == text
    assert time.perf_counter() - start < 10


def test_the_whole_statements_of_a_damaged_text():
    """As by trying row after row from the end."""
    rng, code = random.Random(0), Path(textwrap.__file__).read_text("utf-8")[:6000]
    for _ in range(60):
        text = code[: rng.randrange(len(code))]
        at, damage = rng.randrange(len(text) + 1), rng.choice(["", "'", "(", "'''", "$", "   bad\n", "}", "\0"])
        text = text[:at] + damage + text[at:]
        end = len(text)
        while end and PYTHON.segment(text[:end]) is None:
            end = text.rfind("\n", 0, end - 1) + 1
        assert strip_latents(text) == PYTHON.strip(text[:end], 0) + text[end:]
