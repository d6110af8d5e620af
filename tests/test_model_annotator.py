"""Annotators that are asked: what a language model answers is data, and a server may fail in every way."""

from __future__ import annotations

import ast
import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from chat_server import chat_server, completion, slowly  # noqa: F401 - a fixture
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_trl.cli.main import main as ra3
from ra3_trl.policy import Annotation, Source
from ra3_trl.policy.annotators import COPIES, NO_BOUNDARY, UNWRITABLE, as_latent
from ra3_trl.policy.prompted import (
    AnnotatorError,
    Answer,
    AskingSettings,
    ChatServer,
    Cost,
    LocalModel,
    ModelAnnotator,
    Prompt,
    read_answer,
)
from ra3_trl.policy.prompted.annotator import NO_PLACE, SPECIAL, TOO_LONG
from ra3_trl.policy.prompted.answers import (
    CODE,
    COPIED,
    CUT,
    LENGTHY,
    MALFORMED,
    NO_LINE,
    NOTHING,
    SEVERAL_LINES,
    examples_in,
)
from ra3_trl.policy.prompted.server import BROKEN, NO_COMPLETION, REFUSED, TIMEOUT, read_completion


TEXT = "def f(x):\n    y = x + 1\n    return y\n\nassert f(1) == 2\n"  # of 5 lines
TINY = {"max_length": 256, "max_latent_length": 24, "horizon": 1, "penalty": 0.0}


# ---- answers ----


@pytest.mark.parametrize(
    ("answer", "comments", "dropped"),
    [
        ("3: # y is 2", [(3, "y is 2")], {}),
        ("Line 3: y is one more than x\n- 5: // f adds 1", [(3, "y is one more than x"), (5, "f adds 1")], {}),
        ("```\n3: # a\n5 | # b\n```", [(3, "a"), (5, "b")], {}),
        ("<think>\n2: # no\n</think>\n3: # a", [(3, "a")], {}),
        ("<think>\n2: # no", [], {CUT: 1}),
        ("Sure! Here you are:\n\n3: # a\n\nI hope that helps.", [(3, "a")], {MALFORMED: 2}),
        ("3: # a\nand more\nof it\n\n5: # b", [(5, "b")], {SEVERAL_LINES: 1}),
        ("3: # a\u2028b", [], {SEVERAL_LINES: 1}),
        ("3: # a\vb\r\n", [], {SEVERAL_LINES: 1}),
        ("0: # a\n6: # b\n999999999: # c\n5: # d", [(5, "d")], {NO_LINE: 3}),
        ("-3: # a\n3.5: # b\n1e2: # c\n\u0663: # d\n9999999999: # e", [], {MALFORMED: 5}),
        ("3: return y\n3: y = 2\n3: print(y)\n3: for v in y:\n3: else:\n3: int x;\n3: import os", [], {CODE: 7}),
        ("3: # y = 2\n3: not empty\n3: Note: short\n3: total", None, {}),
        ("3:\n3: #", [], {MALFORMED: 2}),
        (f"3: # {'a' * 1001}", [], {LENGTHY: 1}),
        ("```python\ndef g():\n    pass\n```", [], {MALFORMED: 2}),
        ('[{"line": 3, "comment": "a"}]', [], {MALFORMED: 1}),
        ("(" * 5000 + "\n3: " + "(" * 900, [(3, "(" * 900)], {MALFORMED: 1}),
        ("", [], {}),
    ],
)
def test_what_an_answer_says(answer, comments, dropped):
    """TEXT has 5 lines; rows right behind a comment belong to it."""
    proposed = read_answer(answer, TEXT)
    if comments is not None:
        assert [(c.line, c.text.strip()) for c in proposed.comments] == comments
    else:
        assert len(proposed.comments) == 4
    assert dict(proposed.dropped) == dropped
    assert proposed.none == ({} if answer else {NOTHING: 1})


def test_the_last_row_of_an_answer_that_was_cut_is_not_trusted():
    proposed = read_answer("3: # a\n5: # f ad", TEXT, cut=True)
    assert [c.line for c in proposed.comments] == [3] and proposed.dropped == {CUT: 1}
    assert len(read_answer("3: # a\n5: # f ad", TEXT).comments) == 2


def test_the_prompts_example_is_no_comment_on_a_text():
    """Small models repeat it. Its numbered text, in rows without a sign, is none; in another prompt nothing is."""
    told = {"all are added up, what is missing is the division by their number", "1 + 2 + 6 = 9, and 9 / 3 = 3.0"}
    assert examples_in(Prompt.read().template) == told and examples_in("Say # a or # b of 1 | # x: {text}") == set()
    answer = "3: #1 + 2 + 6 = 9, and 9 / 3 = 3.0\n5: # f(1) is 1 + 1"
    for prompt, lines in ((None, [5]), (Prompt("{text}"), [3, 5])):
        (proposed,) = ModelAnnotator(Says(answer), prompt).propose([Source(TEXT, (3, 5))])
        assert [comment.line for comment in proposed.comments] == lines
        assert proposed.dropped == ({} if prompt else {COPIED: 1})


hostile = st.one_of(
    st.text(),
    st.lists(
        st.tuples(st.integers(-1, 9), st.sampled_from(("", " ", " # ", " // ")), st.text(max_size=12)).map(
            lambda row: f"{row[0]}:{row[1]}{row[2]}"
        )
    ).map("\n".join),
    st.lists(
        st.sampled_from(
            (
                "3: # coding: utf-8",
                "2: # type: ignore",
                "3: # \ud800",
                "3: # a\0b",
                "3: # a\rb = 1",
                "3: # <|end|>",
                "5: # </s>",
                "3: # a\\",
                '3: # """',
                "2: #\ty",
                "5: # \ufeff",
                "3: # a\x1b[2J",
                "3: #     return y",
                "3: # \u202e",
                "1: # ok",
                "3: # ok",
            )  # fmt: skip
        )
    ).map("\n".join),
)


@pytest.fixture(scope="module")
def student(tiny_model, tokenizers):
    from ra3_trl import Policy

    tokenizer = tokenizers["newline_indent"]
    return Policy.open(tiny_model("llama", tokenizer), tokenizer=tokenizer, use_cpu=True, **TINY)


class Says:
    """Answers what it was made with."""

    name, max_tokens, special = "says", 10, ChatServer.special

    def __init__(self, *answers: str | Answer):
        self.answers, self.asked = answers, []

    def count(self, prompt):
        return len(prompt)

    def write(self, prompts):
        self.asked += prompts
        return iter([Answer(a) if isinstance(a, str) else a for a in self.answers])

    def close(self):
        pass


@settings(max_examples=25, deadline=None, derandomize=True)
@given(hostile)
def test_whatever_is_answered_the_program_stays_the_same(student, answer):
    """Each proposal is kept or dropped, and what is kept is comments of one line."""
    annotation = Annotation(ModelAnnotator(Says(answer)), keep_all=True)
    documents = student.segment(TEXT)
    with student.inference():
        (examples,) = annotation(student, [(TEXT, {}, documents)], student._noise)
    text, tally = student.text(examples[0]), annotation.tally
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(TEXT))
    left = [row for row in text.split("\n") if not row.lstrip().startswith("#")]
    assert "\n".join(left) == TEXT
    assert tally.proposed == tally.kept + tally.dropped.total() and tally.none.total() == (not tally.proposed)
    assert all(0 < len(latent.token_ids) <= 24 for latent in examples[0].placed.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_is_a_latent_or_a_reason(student, text):
    assert as_latent(student, text)


def test_reasons_of_both_sides_are_counted(student):
    """Line 4 is empty; PEP 263's words are no comment; one comment is the next line."""
    answer = "4: # a\n3: # coding: utf-8\n2: # now y = x + 1\n9: # b\n3: # ok\nbut\n\n3: return y\n5: # ok"
    annotation = Annotation(ModelAnnotator(Says(answer)), keep_all=True)
    with student.inference():
        list(annotation(student, [(TEXT, {}, student.segment(TEXT))], student._noise))
    dropped = {NO_LINE: 1, SEVERAL_LINES: 1, CODE: 1, NO_BOUNDARY: 1, UNWRITABLE: 1, COPIES: 1}
    assert annotation.tally.dropped == dropped and annotation.tally.kept == 1 and annotation.tally.proposed == 7


# ---- what is asked ----


def test_a_prompt_numbers_the_lines(tmp_path):
    """Braces in the text and the prompt stand for themselves; the last newline begins no line."""
    file = tmp_path / "prompt.txt"
    file.write_text("\ufeffSay {so}:\n{text}\nEnd.\n", "utf-8")
    prompt = Prompt.read(file)
    assert prompt("a = {text}\n\n b\n") == "Say {so}:\n1 | a = {text}\n2 |\n3 |  b\nEnd."
    assert prompt.digest != Prompt.read().digest == Prompt.read().digest and "NUMBER: # NOTE" in Prompt.read()("x")


@pytest.mark.parametrize("content", [b"no place", b"{text} {text}", b"\xff{text}", b"{text}" + b"a" * 100_000, None])
def test_a_prompt_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="`prompt`"):
        Prompt.read(file)


def test_the_page_shows_the_prompt():
    page = (Path(__file__).parents[1] / "docs" / "cold_start.md").read_text("utf-8")
    assert Prompt.read().template in page


def test_what_need_not_be_asked_is_not():
    """Nor paid for: of three texts one is asked about, of 100 characters and the prompt's own."""
    model = Says("2: # a")
    annotator = ModelAnnotator(model, Prompt("{text}"))
    sources = [Source("x\n"), Source("y <|im_end|>\n", (1,)), Source("a" * 100, (1, 2))]
    proposed = list(annotator.propose(sources))
    assert model.asked == [f"1 | {'a' * 100}"] and [p.none for p in proposed] == [{NO_PLACE: 1}, {SPECIAL: 1}, {}]
    cost = sum((annotator.cost(source) for source in sources), Cost())
    assert cost == Cost(3, 3, 1, 104, 10) and cost.price((1e6, 2e6)) == 104 + 2 * 10
    assert cost.report(None)["price"] is None


def test_answers_are_not_mixed_up_with_texts_that_were_not_asked_about():
    annotator = ModelAnnotator(Says("1: # a", Answer(none=TIMEOUT), "1: # b"))
    sources = [Source("x\n", (1,)), Source("y\n"), Source("z\n", (1,)), Source("u\n", (1,))]
    said = [(tuple(c.text for c in p.comments), dict(p.none)) for p in annotator.propose(sources)]
    assert said == [((" a",), {}), ((), {NO_PLACE: 1}), ((), {TIMEOUT: 1}), ((" b",), {})]
    assert annotator.spent["requests"] == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_tokens", 0), ("temperature", -1), ("temperature", float("nan")), ("batch_size", 0), ("timeout", 0),
     ("timeout", float("inf")), ("max_retries", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` is {value}; it must be"):
        AskingSettings(**{setting: value})


# ---- a model on this machine ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, tokenizers):
    """Folders of two tiny models, the second of a chat."""
    folders = []
    for i, name in enumerate(("student", "annotator")):
        tokenizer = tokenizers["newline_indent"]
        folder = tmp_path_factory.mktemp("models") / name
        tiny_model("llama", tokenizer, seed=i).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    (folders[1] / "chat_template.jinja").write_text(template)
    return folders


def test_a_batch_answers_as_one_by_one(saved):
    """Greedy, prompts of different lengths; the end of the text ends an answer."""
    prompts = ["x = 1", "def f(x):\n    return x\n" * 4, "y"]
    asked = AskingSettings(max_tokens=12, batch_size=3)
    model = LocalModel(str(saved[1]), asked)
    answers = list(model.write(prompts))
    alone = [next(model.write([prompt])) for prompt in prompts]
    assert answers == alone
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = model.tokenizer(f"[{prompt}]>", add_special_tokens=False).input_ids
        assert model.encode(prompt) == ids and answer.prompt_tokens == len(ids) == model.count(prompt)


def test_an_answer_that_did_not_end_was_cut(saved):
    """The end counts as a token of it; padding behind it does not."""
    model = LocalModel(str(saved[1]))
    (word,), end = model.tokenizer("x", add_special_tokens=False).input_ids, model.tokenizer.eos_token_id
    assert model._answer((1, 2), [word, word, end, end]) == Answer("xx", False, None, 2, 3)
    assert model._answer((1, 2), [word, word]) == Answer("xx", True, None, 2, 2)


def test_draws_follow_from_what_is_asked(saved):
    asked = AskingSettings(max_tokens=8, temperature=1.0)
    model = LocalModel(str(saved[1]), asked)
    (first,) = model.write(["x"])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert [a for p in ("y", "x") for a in model.write([p])][1] == first
    assert torch.equal(state, torch.get_rng_state())
    assert next(LocalModel(str(saved[1]), asked, seed=1).write(["x"])) != first


def test_a_text_without_room_in_the_context_is_counted(saved):
    model = LocalModel(str(saved[1]), AskingSettings(max_tokens=8))
    long = "x = 1\n" * 2000
    kinds = [answer.none for answer in model.write(["x", long, "y"])]
    assert kinds == [None, TOO_LONG, None] and next(model.write([long])).none == TOO_LONG
    model.model.config.max_position_embeddings = model.count("x") + 8  # just room enough
    assert next(model.write(["x"])).none is None
    model.model.config.max_position_embeddings -= 1
    assert next(model.write(["x"])).none == TOO_LONG


def test_what_ends_the_turn_of_a_model_is_not_shown_to_it(saved):
    model = LocalModel(str(saved[1]))
    end = model.tokenizer.eos_token
    (proposed,) = ModelAnnotator(model).propose([Source(f"x = '{end}'\n", (1,))])
    assert proposed.none == {SPECIAL: 1}


# ---- a server ----


@pytest.fixture
def ask(chat_server):  # noqa: F811
    """`ask(prompts, reply, **settings)`: all answers."""
    pytest.importorskip("openai", reason="needs the extra ra3-trl[openai]")
    made = []

    def ask(prompts, reply=None, **how):
        if reply is not None:
            chat_server.reply = reply
        model = ChatServer(
            "m", chat_server.url, AskingSettings(**{"max_retries": 1, "batch_size": 2, "timeout": 20} | how)
        )
        made.append(model)
        return list(model.write(prompts))

    yield ask
    for model in made:
        model.close()


def echo(request, number=0):
    return 200, completion(f"1: # {request['messages'][0]['content']}")


def test_answers_come_in_order_and_so_many_at_a_time(ask, chat_server, monkeypatch):  # noqa: F811
    """The first takes longest; never more than three requests at once."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    prompts = [f"p{i}" for i in range(12)]

    def reply(request, number):
        return slowly(0.3 if "p0" in str(request["messages"]) else 0.02, echo(request))

    answers = ask(prompts, reply, batch_size=3, max_tokens=9)
    assert [a.text for a in answers] == [f"1: # p{i}" for i in range(12)]
    assert 2 <= chat_server.at_once <= 3 and (answers[0].prompt_tokens, answers[0].answer_tokens) == (7, 3)
    assert {(r["model"], r["max_tokens"], r["temperature"]) for r in chat_server.requests} == {("m", 9, 0.0)}
    assert "seed" not in chat_server.requests[0] and set(chat_server.keys) == {"Bearer key"}


@pytest.mark.parametrize("bad", [(500, "{}"), (503, "<html>"), (429, "{}"), (408, "{}"), None])
def test_what_passes_is_tried_again(ask, chat_server, bad):  # noqa: F811
    """The first two tries of each prompt fail, the third does not."""
    tries = {}

    def reply(request, number):
        text = request["messages"][0]["content"]
        tries[text] = tries.get(text, 0) + 1
        return bad if tries[text] < 3 else echo(request)

    answers = ask(["a", "b"], reply, max_retries=2)
    assert [a.text for a in answers] == ["1: # a", "1: # b"] and len(chat_server.requests) == 6


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((500, '{"error": "x"}'), BROKEN),
        ((502, "<html>Bad gateway</html>"), BROKEN),
        ((400, '{"error": {"message": "no"}}'), REFUSED),
        ((200, "<html>Welcome</html>"), NO_COMPLETION),
        ((200, "{"), NO_COMPLETION),
        ((200, '{"choices": []}'), NO_COMPLETION),
        ((200, '{"choices": {"0": 1}}'), NO_COMPLETION),
        ((200, '{"error": "sorry"}'), NO_COMPLETION),
        ((200, '{"a":' * 3000), NO_COMPLETION),
        ((200, completion(None)), NO_COMPLETION),
        ((200, completion([{"type": "text"}])), NO_COMPLETION),
    ],
)
def test_a_server_that_fails_is_counted_then_ends_the_run(ask, chat_server, reply, reason):  # noqa: F811
    """Behind an answer three failures are counted, as is one more after another answer; four in a row end it."""
    good = ("g", "h")

    def answer(request, number):
        return echo(request) if request["messages"][0]["content"] in good else reply

    answers = ask(["g", "a", "b", "c", "h", "d"], answer, max_retries=0)
    assert [a.none for a in answers] == [None, reason, reason, reason, None, reason]
    with pytest.raises(AnnotatorError, match=rf"'m' at {chat_server.url} has not answered 4 requests in a row"):
        ask(["g", "a", "b", "c", "d", "h"], answer, max_retries=0)
    with pytest.raises(AnnotatorError, match="has not answered the first request"):
        ask(["a", "g"], answer, max_retries=0)


def test_failures_are_counted_from_one_part_of_a_corpus_to_the_next(chat_server):  # noqa: F811
    """A file may hold a single text."""
    pytest.importorskip("openai", reason="needs the extra ra3-trl[openai]")
    chat_server.reply = lambda request, number: (500, "{}") if number else echo(request)
    model = ChatServer("m", chat_server.url, AskingSettings(max_retries=0))
    assert [next(model.write(["a"])).none for _ in range(4)] == [None, BROKEN, BROKEN, BROKEN]
    with pytest.raises(AnnotatorError, match="4 requests in a row"):
        next(model.write(["a"]))
    model.close()


def test_a_server_that_takes_too_long(ask):
    answers = ask(["a", "b"], lambda r, n: slowly(1.5, echo(r)) if "b" in str(r["messages"]) else echo(r),
                  timeout=0.4, max_retries=0)  # fmt: skip
    assert [a.none for a in answers] == [None, TIMEOUT]


@pytest.mark.parametrize(("status", "says"), [(401, "key"), (403, "key"), (404, "no model m")])
def test_what_no_further_request_can_mend_ends_the_run(ask, chat_server, status, says):  # noqa: F811
    with pytest.raises(AnnotatorError, match=f"refuses: .*{says}"):
        ask(["a"] * 20, lambda request, number: (status, json.dumps({"error": {"message": says}})))
    assert len(chat_server.requests) <= 5


def test_a_drawn_answer_has_a_seed_and_one_that_was_cut_says_so(ask, chat_server):  # noqa: F811
    def reply(request, number):
        return 200, completion("1: # a", "length" if "long" in str(request["messages"]) else "stop")

    answers = ask(["long", "short"], reply, temperature=0.5)
    assert [(a.text, a.cut) for a in answers] == [("1: # a", True), ("1: # a", False)]
    assert {(r["seed"], r["temperature"]) for r in chat_server.requests} == {(42, 0.5)}


def test_few_texts_are_read_ahead(chat_server):  # noqa: F811
    """A corpus may be large: twice the batch of 2 with the one whose answer is given."""
    pytest.importorskip("openai", reason="needs the extra ra3-trl[openai]")
    chat_server.reply, read = echo, []
    model = ChatServer("m", chat_server.url, AskingSettings(batch_size=2))
    answers = model.write(read.append(i) or f"p{i}" for i in range(9))
    assert next(answers).text == "1: # p0" and len(read) == 4
    assert next(answers).text == "1: # p1" and len(read) == 5
    assert len([*answers]) == 7
    model.close()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_text_that_is_too_long_for_the_server_is_the_texts_own_affair(ask, status):
    """Even if there are many of them, and first."""
    message = '{"error": {"message": "This model\'s maximum context length is 9 tokens."}}'
    answers = ask("aaaaaab", lambda r, n: (status, message) if r["messages"][0]["content"] == "a" else echo(r))
    assert [a.none for a in answers] == [TOO_LONG] * 6 + [None]


def test_where_no_server_is(monkeypatch):
    pytest.importorskip("openai", reason="needs the extra ra3-trl[openai]")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(AnnotatorError, match=f"'m' at {url} can't be reached: "):
            list(ChatServer("m", url, AskingSettings(max_retries=0)).write(["a"]))


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "http://", "http://h:port", "http://me:secret@h/v1", "http://h/v1?key=1"]
)
def test_addresses_that_are_none_or_hold_a_password_are_refused(url):
    with pytest.raises(ValueError, match="`base_url`") as refused:
        ChatServer("m", url)
    assert "secret" not in str(refused.value) and "key=1" not in str(refused.value)


NAMES = ("choices", "message", "content", "usage", "prompt_tokens", "completion_tokens", "finish_reason")
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
)


@given(JSON)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_json_is_a_completion_or_none(content):
    answer = read_completion(json.dumps(content))
    assert (answer.none == NO_COMPLETION) != bool(answer.text or answer.none is None)


# ---- the command ----

PROGRAMS = [f"def f{i}(x):\n    y = x + {i}\n    return y\n\nassert f{i}(1) == {i + 1}\n" for i in range(4)]


@pytest.fixture
def annotate(tmp_path, saved):
    """`annotate(*flags)`: runs the command; programs in a file, a file a shard."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROGRAMS))
    words = ["annotate", str(saved[0]), "--dataset_name", str(tmp_path / "rows.jsonl"), "--use_cpu", "--keep", "all",
             "--max_length", "200", "--max_latent_length", "24", "--horizon", "1", "--shard_rows", "1",
             "--output_dir", str(tmp_path / "out"), "--report", str(tmp_path / "report.json")]  # fmt: skip
    return lambda *flags: ra3([*words, *flags])


def test_a_server_that_goes_away_leaves_what_is_finished(annotate, ask, chat_server, tmp_path, capsys):  # noqa: F811
    """After two texts it dies; the same command goes on with the third and asks for no text twice."""
    flags = ["--annotator", "m", "--annotator_base_url", chat_server.url, "--annotator_max_retries", "0"]
    chat_server.reply = lambda request, number: (200, completion("3: # done")) if number < 2 else (401, "{}")
    assert annotate(*flags) == 2
    error = capsys.readouterr().err
    assert "the annotator 'm' at" in error and "2 files are finished and kept" in error
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.parquet")}
    assert len(before) == 2
    chat_server.reply = lambda request, number: (200, completion("3: # done"))
    assert annotate(*flags) == 0
    texts = chat_server.texts()
    assert len(texts) == 5 and [
        next(i for i in range(4) if f"def f{i}(" in t.split("The text:")[1]) for t in texts
    ] == [0, 1, 2, 2, 3]
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in before.items())
    rows = load_dataset(str(tmp_path / "out"), split="train").to_list()
    assert [row["annotated_text"] for row in rows] == [
        text.replace("    return y", "    # done\n    return y") for text in PROGRAMS
    ]
    report = json.loads((tmp_path / "report.json").read_text())  # of this run
    assert (report["texts"], report["proposed"], report["kept"]) == (2, 2, 2)
    assert report["spent"] == {"requests": 2, "prompt_tokens": 14, "answer_tokens": 6}
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (made["annotator"], made["annotator_base_url"]) == ("m", chat_server.url)
    assert made["annotator_prompt"] == Prompt.read().digest and made["annotator_temperature"] == 0
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{text}")
    assert annotate(*flags, "--annotator_prompt", str(prompt)) == 2
    assert "`annotator_prompt`" in capsys.readouterr().err and len(chat_server.requests) == 5


def test_costs_are_told_before_anything_is_asked(annotate, chat_server, saved, tmp_path, capsys):  # noqa: F811
    """4 texts of 3 boundaries: 4 requests, at most 4 * 100 tokens of answers at 3 a million."""
    flags = ["--dry_run", "--annotator_max_tokens", "100", "--annotator_prices", "0", "3"]
    assert annotate("--annotator", "m", "--annotator_base_url", chat_server.url, *flags) == 0
    out = capsys.readouterr().out
    assert "4 requests to m: about " in out and "at most 400 answer tokens" in out and "Nothing was asked" in out
    told = json.loads((tmp_path / "report.json").read_text())
    assert (told["documents"], told["requests"], told["max_answer_tokens"]) == (4, 4, 400)
    assert told["boundaries"] == 12 and told["price"] == pytest.approx(400 * 3 / 1e6)
    counted = LocalModel(str(saved[0])).tokenizer
    assert told["prompt_tokens"] == sum(len(counted(Prompt.read()(text)).input_ids) for text in PROGRAMS)
    assert not chat_server.requests and not (tmp_path / "out").exists()
    assert annotate("--annotator", str(saved[1]), *flags) == 0
    assert "4 requests to" in capsys.readouterr().out


def test_a_model_on_this_machine(annotate, saved, tmp_path, capsys):
    """What it says is noise, and all of it is counted; a second run finds all done."""
    flags = ["--annotator", str(saved[1]), "--annotator_max_tokens", "40", "--annotator_batch_size", "4"]
    assert annotate(*flags) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["proposed"] == report["kept"] + sum(report["dropped"].values()) and report["texts"] == 4
    assert report["spent"]["requests"] == 4 and report["spent"]["answer_tokens"] > 0
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert made["annotator"] == "annotator" and made["annotator_weights"] and str(tmp_path.parent) not in str(made)
    assert annotate(*flags, "--dry_run") == 0 and "0 requests" in capsys.readouterr().out


def test_the_student_is_no_annotator(annotate, saved, tmp_path, capsys):
    """By its name, by a link, by a copy elsewhere, and by what a server calls it: this, or a link."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in saved[0].iterdir():
        (copy / path.name).symlink_to(path)
    link = tmp_path / "link"
    link.symlink_to(saved[0])
    server = ["--annotator_base_url", "http://127.0.0.1:9/v1"]
    for flags in ([str(saved[0])], [str(link)], [str(copy)], ["student", *server], [str(link), *server]):
        assert annotate("--annotator", *flags) == 2
        assert "which is the checkpoint, the student" in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*.parquet"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--annotator", "no/such/model/at-all"], "at-all'; use one of 'policy', 'trace', or the folder"),
        (["--annotator", "trace", "--annotator_prompt", "x"], "`annotator_prompt` is 'x', but the annotator 'trace'"),
        (["--annotator_base_url", "http://h/v1", "--keep", "resample"], "`report` is "),
        (["--annotator", "m", "--annotator_base_url", "h"], "`annotator_base_url` is 'h'; give an address"),
        (["--annotator", "m", "--annotator_temperature", "nan"], "`annotator_temperature` is nan; it must be"),
        (["--annotator", "m", "--annotator_prompt", "no/file"], "`annotator_prompt` is 'no/file', which is no file"),
        (["--annotator", "m", "--annotator_prices", "-1", "0"], "`annotator_prices` is [-1.0, 0.0]; give two numbers"),
    ],
)  # fmt: skip
def test_what_can_not_be_asked_is_refused(annotate, capsys, flags, says):
    assert annotate(*flags) == 2
    assert says in capsys.readouterr().err


# ---- the real server ----


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """`transformers serve` with SmolLM2-135M-Instruct: its address and what it calls the model."""
    from ra3_trl.cli.smollm2 import smollm2

    for name in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(name, reason="needs the extras ra3-trl[openai] and transformers[serving]")
    try:
        model = smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port",
               str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    log = tmp_path_factory.mktemp("serve") / "log"
    with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            for _ in range(240):
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", str(model)
        finally:
            process.terminate()


@pytest.mark.slow
def test_transformers_serve(real_server, annotate, tmp_path, monkeypatch, capsys):
    """Its answers are those of the same model here; what they hold is kept or counted. A model that it has not ends
    the run."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url, model = real_server
    flags = ["--annotator_base_url", url, "--annotator_max_tokens", "48", "--annotator_batch_size", "2"]
    assert annotate("--annotator", model, *flags, "--annotator_max_retries", "1") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["texts"] == 4 and report["spent"]["requests"] == 4 and report["spent"]["answer_tokens"] > 4
    assert report["proposed"] == report["kept"] + sum(report["dropped"].values())
    prompts = [Prompt.read()(text) for text in PROGRAMS[:2]]
    asked = AskingSettings(max_tokens=48, batch_size=1)
    here = list(LocalModel(model, asked, {"dtype": "float32"}).write(prompts))
    there = list(ChatServer(model, url, asked).write(prompts))
    assert [a.text.strip() for a in there] == [a.text.strip() for a in here]
    assert [a.prompt_tokens for a in there] == [a.prompt_tokens for a in here]
    with pytest.raises(AnnotatorError):
        list(ChatServer("no/such-model", url, AskingSettings(max_retries=0)).write(["a"]))
