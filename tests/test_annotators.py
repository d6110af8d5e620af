"""The seam of annotation: what is proposed becomes latents or is counted, and the student says what it is worth."""

from __future__ import annotations

import ast
import json

import pytest
from conftest import needs_bwrap
from datasets import Dataset, load_dataset
from slow_path import continuation_logp

from ra3_trl.cli.main import main as ra3
from ra3_trl.hub import annotate_dataset, join_chunks
from ra3_trl.losses import log1mexp
from ra3_trl.policy import Annotation, Comment, Proposed, Tally
from ra3_trl.policy.annotators import (
    COPIES,
    NO_BOUNDARY,
    NO_ROOM,
    NOT_WORTH,
    TOO_LONG,
    TWICE,
    UNWRITABLE,
    as_latent,
    boundary_lines,
)
from ra3_trl.policy.tally import EXAMPLES
from ra3_trl.policy.traces.run import NO_CALL
from ra3_trl.records import Latent
from ra3_trl.segmentation import splice, token_bytes


TEXT = "def f(x):\n    y = x\n\n    z = '''\n    a'''\n    return y\n"
SETTINGS = {"max_length": 256, "max_latent_length": 16, "horizon": 2, "discount": 1.0, "penalty": 0.0}


class Says:
    """Proposes what it was made with, of each text in turn."""

    name = "says"

    def __init__(self, *proposed: Proposed):
        self.proposed = proposed

    def propose(self, sources):
        self.sources = sources
        return self.proposed


def says(*comments: tuple[int, str]) -> Says:
    return Says(Proposed(tuple(Comment(*comment) for comment in comments)))


@pytest.mark.parametrize("max_tokens", [24, 1000])
def test_the_line_of_a_boundary_is_where_its_latent_stands(tokenizer, segmenter, max_tokens):
    """Whatever the tokenizer and the cut; `join_chunks` finds a latent's line by what is spliced in."""
    data = token_bytes(tokenizer)
    comment = Latent(tuple(tokenizer("y")["input_ids"][-1:]), True)
    tried = 0
    for text in (TEXT * 3, "\ufeffif x:\r\n\ty = 'ß'\r\n\r\n\tz = 2\r\n", "\n\nx = 1\n\n\ny = 2"):
        chunks = segmenter(tokenizer, max_tokens)(0, text)
        for c, lines in enumerate(boundary_lines(text, chunks, data)):
            assert sorted(lines.values()) == list(chunks[c].boundaries)  # here no two are in one line
            for line, boundary in lines.items():
                placed = [splice(chunk, {boundary: comment} if i == c else {}) for i, chunk in enumerate(chunks)]
                assert [latent["line"] for latent in join_chunks(text, placed, data)[1]] == [line]
                tried += 1
    assert tried > 10


def test_where_special_tokens_stand_in_the_text_there_are_no_lines(tokenizers, segmenter):
    tokenizer = tokenizers["newline_alone"]
    text = f"x = 1\n{tokenizer.eos_token}\ny = 2\n"
    assert boundary_lines(text, segmenter(tokenizer)(0, text), token_bytes(tokenizer)) == [{}]


def test_what_is_proposed_is_placed_or_counted(make_trainer):
    """Line 5 is inside a string; a latent has at most 16 tokens, and `7q` has two."""
    trainer = make_trainer([TEXT], **SETTINGS)
    annotator = says(
        (2, "y = 3"), (2, "y = 3"), (5, "a"), (6, "of a\nb"), (6, "   "), (6, " return y"), (6, "7q" * 9),
        (6, "back"), (99, "beyond"), (0, "before"),
    )  # fmt: skip
    annotation, policy = Annotation(annotator, keep_all=True), trainer.policy
    documents = policy.segment(TEXT)
    with policy.inference():
        (examples,) = annotation(policy, [(TEXT, {"license": "MIT"}, documents)], policy._noise)
    (source,) = annotator.sources
    assert (source.text, source.row["license"], source.lines) == (TEXT, "MIT", (2, 4, 6))
    dropped = {TWICE: 1, NO_BOUNDARY: 3, UNWRITABLE: 2, COPIES: 1, TOO_LONG: 1}
    assert dict(annotation.tally.dropped) == dropped
    expected = "def f(x):\n    #y = 3\n    y = x\n\n    z = '''\n    a'''\n    #back\n    return y\n"
    assert policy.text(examples[0]) == expected and ast.dump(ast.parse(expected)) == ast.dump(ast.parse(TEXT))
    tally = annotation.tally
    assert (tally.texts, tally.proposed, tally.kept) == (1, 10, 2)


def test_a_proposal_is_worth_what_a_plain_forward_says(make_trainer, slow_path):
    """Over two lines, each renormalised by the mass of thinking; not placed where that is less than the penalty."""
    trainer = make_trainer([TEXT], **SETTINGS)
    policy, tokenizer = trainer.policy, trainer.processing_class
    (document,) = policy.segment(TEXT)
    annotation = Annotation(says((2, "y = 3")), keep_all=True)
    with policy.inference():
        ((example,),) = annotation(policy, [(TEXT, {}, [document])], policy._noise)
        (boundary,) = example.placed
        action = document.actions[boundary]
        latent = tokenizer("y = 3", add_special_tokens=False)["input_ids"]
        assert example.placed[boundary].token_ids == tuple(latent)
        prefix = list(document.input_ids[: action.start])
        gain, tail = 0.0, [*action.think, *latent, *action.close]
        slow = slow_path(trainer.model, tokenizer)
        for b in (boundary, boundary + 1):
            line = document.actions[b]
            tokens = document.input_ids[line.start : line.end]
            before = document.input_ids[action.start : line.start]
            without = continuation_logp(trainer.model, [*prefix, *before], tokens) - log1mexp(slow.gate(document, b))
            behind = [*prefix, *tail, *before]
            gate = continuation_logp(trainer.model, behind, line.think)
            gain += float(continuation_logp(trainer.model, behind, tokens) - log1mexp(gate) - without)
    assert example.gains == pytest.approx({boundary: gain}, abs=1e-3)
    report = annotation.tally.report()
    assert report["best"] == [
        {"gain": pytest.approx(gain, abs=1e-3), "comment": "y = 3", "line": "    y = x", "kept": True}
    ]
    assert report["worst"] == [] and sum(report["gains"]["counts"]) == 1
    policy.args.penalty = gain + 0.01
    policy.args.prior_alpha = 1e-9  # the prior is all for thinking
    frugal = Annotation(says((2, "y = 3")))
    with policy.inference():
        ((example,),) = frugal(policy, [(TEXT, {}, [document])], policy._noise)
    assert not example.placed and frugal.tally.dropped == {NOT_WORTH: 1} and frugal.tally.kept == 0
    policy.args.penalty = gain - 0.01
    with policy.inference():
        ((example,),) = frugal(policy, [(TEXT, {}, [document])], policy._noise)
    assert example.placed and frugal.tally.kept == 1


@pytest.mark.parametrize("horizon", [1, 2])
def test_of_several_proposals_the_best_is_kept(make_trainer, horizon):
    """Two at one boundary and one at the next are scored apart, as many at each; together they are no other."""
    trainer = make_trainer([TEXT], **SETTINGS | {"horizon": horizon})
    policy = trainer.policy
    (document,) = policy.segment(TEXT)
    two, one = [(2, "y = 3"), (2, "nothing")], [(4, "z")]
    gains = {}
    with policy.inference():
        for comments in ([two[0]], [two[1]], [two[0], *one], [two[1], *one], [*two[::-1], *one], [*two, *one]):
            annotation = Annotation(says(*comments), keep_all=True)
            ((example,),) = annotation(policy, [(TEXT, {}, [document])], policy._noise)
            gains[tuple(comments)] = example.worth
            report = annotation.tally.report()
            told = {entry["line"]: entry["comment"] for entry in (*report["best"], *report["worst"])}
            (row,) = [row for row in policy.text(example).split("\n") if row.startswith("    #")][:1]
            assert told["    y = x"] == row.removeprefix("    #")  # of several the one that is placed
    first, second = sorted(example.placed)
    best = max(two, key=lambda comment: gains[comment,][first])
    assert gains[(*two, *one)][first] == pytest.approx(gains[best,][first], abs=1e-4)
    # The second one's worth is what it adds behind the first one, which is the best at its place.
    assert gains[(*two, *one)][second] == pytest.approx(gains[best, *one][second], abs=1e-4)
    assert annotation.tally.dropped == {NOT_WORTH: 1}


def test_what_may_be_a_latent(make_trainer, tokenizer):
    """What the sampler could have drawn: `magi` and a `c` begins what may not be said, and says nothing yet. Where a
    space is a token of its own, which may not begin a latent, it goes. Of 16 tokens, as `max_latent_length` says."""
    policy = make_trainer([TEXT], **SETTINGS).policy
    for text in ("magic", "a c", "x codin", "7q" * 8):
        latent = as_latent(policy, text)
        assert isinstance(latent, Latent)
        assert b"".join(policy.engine.table.token_bytes[i] for i in latent.token_ids).decode() == text
    assert as_latent(policy, "a coding: b") == UNWRITABLE and as_latent(policy, "7q" * 8 + "7") == TOO_LONG
    begin = as_latent(policy, " 7q").token_ids[0]
    assert not policy.engine.table.blank_V[begin]


def test_a_full_row_takes_no_more(make_trainer):
    """Left to right, until there is no room for another latent of the longest kind."""
    lines = "".join(f"x{i} = {i}\n" for i in range(12))
    trainer = make_trainer([lines], **SETTINGS | {"max_length": 100})
    documents = trainer.policy.segment(lines)
    annotation = Annotation(says(*((i + 2, f" a {i}") for i in range(11))), keep_all=True)
    with trainer.policy.inference():
        (examples,) = annotation(trainer.policy, [(lines, {}, documents)], trainer.policy._noise)
    tally = annotation.tally
    assert tally.kept and tally.dropped[NO_ROOM] and tally.kept + tally.dropped[NO_ROOM] == 11
    assert all(len(example.input_ids) <= 100 for example in examples)
    assert [sorted(e.placed) == sorted(e.placed)[: len(e.placed)] for e in examples]


def test_an_annotator_answers_for_each_text(make_trainer):
    """One that gives more or fewer has mixed them up; nobody who asks row by row would see that there are more."""
    policy = make_trainer([TEXT], **SETTINGS).policy
    for answers, gave in ((0, "0"), (2, "more than 1")):
        annotation = Annotation(Says(*[Proposed()] * answers))
        with pytest.raises(ValueError, match=rf"annotator 'says' gave {gave} answers to 1 texts; give one for each"):
            next(annotation(policy, [(TEXT, {}, policy.segment(TEXT))], policy._noise))
        with pytest.raises(ValueError, match=rf"annotator 'says' gave {gave} answers to 1 texts"):
            annotate_dataset(policy, Dataset.from_dict({"text": [TEXT]}), annotation=annotation)


def test_a_tally_keeps_the_ends():
    """30 gains of 0 to 29, in no order, keep 0 to 9 and 20 to 29."""
    tally = Tally(texts=3, proposed=30)
    for i in range(30):
        tally.score(float(7 * i % 30), f"c{i}", "line", kept=False)
    tally.drop("a", 2), tally.drop("a"), tally.drop("b", 0)
    report = tally.report()
    assert [e["gain"] for e in report["best"]] == [float(i) for i in range(29, 19, -1)] and EXAMPLES == 10
    assert [e["gain"] for e in report["worst"]] == [float(i) for i in range(10)]
    assert (report["texts"], report["proposed"], report["dropped"], report["mean_gain"]) == (3, 30, {"a": 3}, 14.5)
    # 0; 1; 2 and 3; 4 to 7; 8 to 15; 16 to 29
    assert report["gains"]["counts"] == [0] * 6 + [1, 0, 1, 2, 4, 8, 14]


# ---- the command ----


PROGRAMS = [
    "def f(n):\n    a = n + 1\n    b = a * 2\n    return b - 1\n\nassert f(1) == 3\n",
    "def g(n):\n    a = n + 1\n    b = a * 2\n    return b\n",
    "x = 1\ny = 2\n",
    "while True: pass\n",
]


@pytest.fixture
def saved(tmp_path, tiny_model, tokenizers):
    """`saved(*flags)`: the arguments of `ra3 annotate` on programs, the second with a test beside it."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tests = [[], ["assert g(1) == 4"], [], []]
    rows = [json.dumps({"text": text, "tests": test}) for text, test in zip(PROGRAMS, tests, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def command(*flags: str) -> list[str]:
        place = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--use_cpu"]
        return ["annotate", str(tmp_path / "model"), *place, "--max_length", "256", *flags]

    return command


@needs_bwrap
def test_the_command_with_traces(saved, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert ra3(saved("--annotator", "trace", "--keep", "all", "--report", str(report))) == 0
    rows = load_dataset(str(tmp_path / "out"), split="train").to_list()
    assert [len(row["latents"]) for row in rows] == [1, 1, 0, 0]
    lines = rows[0]["annotated_text"].split("\n")
    latent = rows[0]["latents"][0]
    assert lines[latent["line"] - 1].strip() == "# a = 2, b = 4" and isinstance(latent["gain"], float)
    assert lines[latent["line"]] == "assert f(1) == 3"
    # no call of what stands behind it, so arguments are told
    assert rows[1]["annotated_text"].split("\n")[3:5] == ["    # n = 1, a = 2, b = 4", "    return b"]
    for row, text in zip(rows, PROGRAMS, strict=True):
        assert ast.dump(ast.parse(row["annotated_text"])) == ast.dump(ast.parse(text))
    found = json.loads(report.read_text())
    assert (found["texts"], found["proposed"], found["kept"], found["dropped"]) == (4, 2, 2, {})
    assert found["none"] == {NO_CALL: 2} and len(found["best"]) == 2 and sum(found["gains"]["counts"]) == 2
    out = capsys.readouterr().out
    assert "4 texts, 2 proposals, 2 kept." in out and f"No proposal: 2 {NO_CALL}" in out and "best " in out


@needs_bwrap
def test_what_the_student_is_not_helped_by_goes(saved, tmp_path, capsys):
    assert ra3(saved("--annotator", "trace", "--penalty", "1000")) == 0
    rows = load_dataset(str(tmp_path / "out"), split="train").to_list()
    assert [row["annotated_text"] for row in rows] == PROGRAMS
    assert f"Not kept: 2 {NOT_WORTH}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--annotator", "poem"], "`annotator` is 'poem'; use one of 'policy', 'trace'"),
        (["--annotator", "trace", "--keep", "some"], "`keep` is 'some'; use one of 'resample', 'all'"),
        (["--keep", "all"], "`keep` is 'all', but the policy's own latents are chosen by `annotation`"),
        (["--report", "r.json"], "`report` is 'r.json', but the policy's own"),
        (["--annotator", "trace", "--proposal", "fim"], "`annotator` is 'trace' and `proposal` 'fim'"),
        (["--annotator", "trace", "--report", "no/such/r.json"], "`report` is 'no/such/r.json'; name a file"),
        (
            ["--annotator", "trace", "--action_format", "prose"],
            "`action_format` is 'prose', but the annotator 'trace'",
        ),
    ],
)
def test_annotators_that_can_not_work_are_refused(saved, capsys, flags, says):
    assert ra3(saved(*flags)) == 2
    assert says in capsys.readouterr().err
