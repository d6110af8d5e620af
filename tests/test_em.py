"""Schedule, packing, annotation: the EM loop's parts on their own."""

from __future__ import annotations

import ast
import importlib
import textwrap
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ra3_trl import RA3Config
from ra3_trl.em import mstep_loss, pack, plan_schedule, split_example
from ra3_trl.losses import compute_returns
from ra3_trl.policy import Policy, annotate, annotate_all, evaluate_documents, finish_metrics
from ra3_trl.policy.annotate import _choose_by_resampling, _log_prior
from ra3_trl.records import Action, AnnotatedExample, Boundary, Document, Latent, RolloutGroup
from ra3_trl.rollout import GATE, Backbone, BranchEngine, NoiseKey, SamplingParams
from ra3_trl.segmentation import build_token_table, splice


NOISE = NoiseKey(seed=1, phase=1, step=0)
annotation = importlib.import_module("ra3_trl.policy.annotate")  # the module, not the function of its name


def test_schedule_is_a_pure_function_of_the_step():
    schedule = plan_schedule(2, 3, 5, -1, 1, None)
    kinds = "".join(schedule.phase_at(step).kind for step in range(schedule.total))
    assert kinds == "EEEMMMMM" * 2
    phase = schedule.phase_at(9)  # 9 = 8 (first iteration) + 1
    assert (phase.kind, phase.iteration, phase.step, phase.length) == ("E", 1, 1, 3)
    assert [schedule.phase_at(s).number for s in (0, 3, 8, 11)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("m_steps", "max_steps", "epochs", "updates", "expected"),
    [
        (7, -1, 1.0, 10, 7),  # told
        (-1, 30, 1.0, 10, 12),  # 30 // 2 iterations - 3 E-updates
        (-1, -1, 3.0, 10, 15),  # 3 passes of 10 updates over 2 iterations
        (-1, -1, 1.0, 3, 2),  # 3 updates over 2 iterations, rounded up so that no document is left out
        (-1, -1, 0.1, 10, 1),  # 1 update, over 2 iterations
        (-1, -1, 1.25, 6, 4),  # 7.5 updates are 8, 4 in each iteration
    ],
)
def test_schedule_lengths(m_steps, max_steps, epochs, updates, expected):
    assert plan_schedule(2, 3, m_steps, max_steps, epochs, updates).m_steps == expected


def test_schedule_refuses_what_has_no_length():
    with pytest.raises(ValueError, match="max_steps"):
        plan_schedule(1, 3, -1, -1, 1, None)
    with pytest.raises(ValueError, match="e_steps=50"):
        plan_schedule(1, 50, -1, 20, 1, 10)
    with pytest.raises(ValueError, match="`num_train_epochs` is 0"):
        plan_schedule(1, 3, -1, -1, 0, 10)


def example(length: int, first: int = 0) -> AnnotatedExample:
    ids = tuple(range(first, first + length))
    document = Document(0, 0, ids, (), 1)
    return AnnotatedExample(document, ids, (-100, *ids[1:]), (False,) * length)


@pytest.mark.parametrize("packing", [True, False])
def test_packing_loses_nothing(packing):
    # Lengths 5, 3, 4, 9 in rows of 8: the 9 is split into 8 and (context token 7 and) 1 more.
    examples = [example(5, 100), example(3, 200), example(4, 300), example(9, 400)]
    rows = pack(examples, 8, packing)
    trained = sorted(rows.labels[rows.labels != -100].tolist())
    assert trained == sorted(t for e in examples for t in e.labels[1:])
    # 8 | 5 + 3 | 4 + 2, best fit decreasing; unpacked every piece has a row of its own.
    assert rows.input_ids.shape == ((3, 8) if packing else (5, 8))
    assert rows.num_tokens == len(trained)
    starts = (rows.position_ids == 0) & (rows.labels == -100)
    assert int(starts.sum()) >= 5  # each of the 5 pieces starts at position 0


@pytest.mark.parametrize("packing", [True, False])
def test_flat_rows_are_the_same_text_without_padding(setting, packing):
    """What flash attention and a router loss get: one row, the same loss."""
    _, engine, document = setting
    pieces = [splice(document, {}), example(5, 100), example(3, 200), example(4, 300)]
    rows = pack(pieces, len(document.input_ids) + 6, packing)  # packed: the document and 5, then 4 and 3
    flat = rows.flat()
    assert flat.input_ids.shape == (1, len(document.input_ids) + 12)  # 5 + 3 + 4 tokens and no padding
    assert (rows.position_ids == 0).sum() > (flat.position_ids == 0).sum() == 4
    losses = [mstep_loss(engine.backbone, r, 50.0)[0].item() for r in (rows, flat)]
    assert rows.num_tokens == flat.num_tokens and losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_split_piece_begins_with_the_token_before_it():
    pieces = split_example(example(10), 4)
    assert [p.input_ids[0].tolist() for p in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [p.position_ids[0].tolist() for p in pieces] == [[0, 1, 2, 3]] * 3
    assert [int(p.labels[0, 0]) for p in pieces] == [-100, -100, -100]


SOURCE = textwrap.dedent(
    '''
    def area(shape, unit=1):
        """Area of a shape."""
        total = 0
        for a, b in shape:
            if a > b:
                a, b = b, a
            total += (b - a) * unit
        return total
    '''
).lstrip()


@pytest.fixture
def setting(tokenizers, tiny_model, segmenter):
    tokenizer = tokenizers["newline_indent"]
    backbone = Backbone(tiny_model("llama", tokenizer))
    table = build_token_table(tokenizer, len(tokenizer))
    engine = BranchEngine(backbone, table, SamplingParams(max_length=5))
    return tokenizer, engine, segmenter(tokenizer)(0, SOURCE)[0]


@pytest.mark.parametrize("way", ["policy", "resample"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_annotation_keeps_the_program(setting, tmp_path, way, horizon):
    tokenizer, engine, document = setting
    args = RA3Config(output_dir=str(tmp_path), annotation=way, horizon=horizon, prior_alpha=0.2, max_latent_length=5)
    if way == "policy":
        # The gate is forced open by a noise of 0: u < p always.
        class Zero(NoiseKey):
            def uniform(self, doc_id, index, latent, token):
                u = super().uniform(doc_id, index, latent, token)
                return u * 0 if isinstance(latent, int) and latent == GATE else u

        found = annotate(Policy(engine, args), document, Zero(1, 1, 0))
        assert len(found.placed) == len(document.boundaries)
    else:
        found = annotate(Policy(engine, args), document, NOISE)
        assert found.placed
    text = tokenizer.decode(found.input_ids[:-1])
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(SOURCE))
    assert text.count("#") >= len(found.placed)
    assert all(z.token_ids for z in found.placed.values())


@pytest.mark.parametrize("way", ["policy", "resample"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_annotation_of_documents_together_is_that_of_each(setting, tmp_path, way, horizon):
    """With horizon 2 documents ask for latents several times, and not equally often; one has no boundary."""
    _, engine, document = setting
    args = RA3Config(output_dir=str(tmp_path), annotation=way, horizon=horizon, prior_alpha=0.2, max_latent_length=5)
    bare = replace(document, actions=tuple(replace(action, boundary=None) for action in document.actions))
    documents = [bare, *(replace(document, doc_id=i) for i in range(4))]

    class Open(NoiseKey):
        """The gate is forced open, u = 0, in every other document."""

        def uniform(self, doc_id, index, latent, token):
            u = super().uniform(doc_id, index, latent, token)
            return u * (doc_id % 2) if isinstance(latent, int) and latent == GATE else u

    noise = Open(1, 1, 0)
    together = annotate_all(Policy(engine, args), documents, noise)
    for found, one in zip(together, documents, strict=True):
        alone = annotate(Policy(engine, args), one, noise)
        assert found.input_ids == alone.input_ids and found.gains == pytest.approx(alone.gains, abs=1e-4)
    assert len({example.input_ids for example in together}) > 2 and not together[0].placed
    assert annotate_all(Policy(engine, args), [], noise) == []


@pytest.mark.parametrize("window", [1, 8])
def test_resampling_left_to_right_is_that_of_one_boundary_at_a_time(setting, tmp_path, window, monkeypatch):
    """Slow path: the whole text annotated so far is run anew for each boundary. How wide windows are, and what is
    remembered from one to the next, changes nothing."""
    monkeypatch.setattr(annotation, "WINDOW", window)
    _, engine, document = setting
    settings = {"prior_alpha": 1e-3, "penalty": 0.0, "max_latent_length": 5, "num_latents": 3}
    policy = Policy(engine, RA3Config(output_dir=str(tmp_path), horizon=2, **settings))
    placed: dict[int, Latent] = {}
    gains: dict[int, float] = {}
    for boundary in document.boundaries:
        context = splice(document, placed).document
        (choice,) = _choose_by_resampling(policy, [context], [[boundary]], NOISE)
        placed |= choice.placed
        gains |= choice.gains
    found = annotate(policy, document, NOISE)
    assert {s: z.token_ids for s, z in found.placed.items()} == {s: z.token_ids for s, z in placed.items()}
    assert found.gains == pytest.approx(gains, abs=2e-3)
    assert 1 <= len(placed) < len(document.boundaries)


def test_annotation_runs_its_text_once_and_documents_together(setting, tmp_path, monkeypatch):
    """No latent is placed: a text goes through the model once, in as many forwards for three documents as for one."""
    monkeypatch.setattr(annotation, "WINDOW", 3)
    _, engine, document = setting
    args = RA3Config(output_dir=str(tmp_path), horizon=2, penalty=1e6, max_latent_length=5, num_latents=2)
    policy, tokens = Policy(engine, args), list[list[int]]()
    several = [replace(document, doc_id=i) for i in range(3)]
    for documents in (several[:1], several):
        tokens.append([])
        with counted_trunks(engine, tokens[-1]):
            annotate_all(policy, documents, NOISE)
    assert len(tokens[0]) == len(tokens[1]) > 1  # windows
    length, windows = len(document.input_ids), len(tokens[0])
    # Each window but the first runs one token again, since its first line is predicted from that.
    assert sum(tokens[0]) == length + windows - 1 and sum(tokens[1]) == 3 * sum(tokens[0])


@contextmanager
def counted_trunks(engine, tokens: list[int]):
    """Lists how many tokens of documents each trunk runs."""
    forward = engine._forward

    def counted(state, plan, *rest):
        if plan.tokens is None:
            tokens.append(sum(plan.lengths))
        return forward(state, plan, *rest)

    engine._forward = counted
    try:
        yield
    finally:
        del engine._forward


def test_policy_annotation_follows_the_gate_and_sees_earlier_latents(setting, tmp_path):
    """Slow path: walk the boundaries one by one, each gate read from a forward of the text annotated so far."""
    _, engine, document = setting
    args = RA3Config(output_dir=str(tmp_path), annotation="policy", horizon=2, max_latent_length=5)
    placed: dict[int, Latent] = {}
    for boundary in document.boundaries:
        context = splice(document, placed).document
        p = float(engine.trunk(context).gate_logps_A[boundary].exp())
        if NOISE.uniform(0, document.actions[boundary].index, GATE, 0) < p:
            placed[boundary] = engine.rollout(context, [boundary], 1, 2, NOISE, score=False).latents[0][0]
    found = annotate(Policy(engine, args), document, NOISE)
    assert {s: z.token_ids for s, z in found.placed.items()} == {s: z.token_ids for s, z in placed.items()}


def test_resampling_picks_the_posterior_of_those_that_pay(setting, tmp_path):
    """With a prior of nearly 1 for thinking every boundary draws a latent, and those that bring more than the penalty
    are placed; with a prior of nearly 0 none is. What is placed brings what the engine says."""
    _, engine, document = setting
    settings = {"output_dir": str(tmp_path), "horizon": 1, "max_latent_length": 5, "num_latents": 2}
    group = engine.rollout(document, document.boundaries, 2, 1, NOISE)
    gains = compute_returns(group, 1, 1.0).gain_TG
    for penalty in (0.0, float(gains.max()) - 0.01):
        placed = annotate(Policy(engine, RA3Config(**settings, prior_alpha=1e-12, penalty=penalty)), document, NOISE)
        assert placed.worth.keys() == placed.placed.keys() and all(w > penalty for w in placed.worth.values())
        for t, boundary in enumerate(group.boundaries):
            if bool((gains[t] > penalty).all()):
                assert boundary in placed.placed
            if boundary in placed.placed:
                g = group.latents[t].index(placed.placed[boundary])
                assert placed.worth[boundary] == pytest.approx(float(gains[t, g]), abs=1e-4)
            elif bool((gains[t] <= penalty).all()):
                assert boundary not in placed.worth
        assert bool((gains > penalty).any()) and len(placed.placed) < len(document.boundaries)
    never = RA3Config(**settings, prior_alpha=1 - 1e-15, penalty=0.0)
    assert not annotate(Policy(engine, never), document, NOISE).placed


def test_the_prior_of_annotation_is_how_often_the_e_step_thinks(setting, tmp_path):
    _, engine, document = setting
    policy = Policy(engine, RA3Config(output_dir=str(tmp_path), exploration=0.1))
    group = engine.trunk(document)
    wanted = 0.9 * group.gate_logps_A[list(document.boundaries)].exp() + 0.1
    torch.testing.assert_close(_log_prior(policy, group, document.boundaries).exp(), wanted)


def test_trunk_gates_are_probabilities(setting):
    _, engine, document = setting
    gates = engine.trunk(document).gate_logps_A[list(document.boundaries)]
    assert torch.all(gates < 0)


def test_cross_entropy_with_latents_banned(setting):
    """Each boundary's line has the mass of thinking taken out: `ce` less the sum of -log(1 - P(think)), a token."""
    _, engine, document = setting
    args = RA3Config(horizon=1, num_latents=2, eval_num_latents=2, max_latent_length=5, use_cpu=True)
    with torch.no_grad():  # logits of 0 for the think tokens, or P(think) is lost in rounding
        for boundary in document.boundaries:
            engine.backbone.causal_lm.lm_head.weight[list(document.actions[boundary].boundary.think)] = 0.0
    found = finish_metrics(evaluate_documents(Policy(engine, args), [document]))
    gates = engine.trunk(document).gate_logps_A[list(document.boundaries)].double().exp()
    gained = float(-torch.log1p(-gates).sum())
    assert gained > 1e-3
    assert found["ce"] - found["ce_never"] == pytest.approx(gained / found["code_tokens"], rel=0.02)


@pytest.mark.parametrize("horizon", [1, 2])
def test_what_is_not_proposed_would_not_have_been_placed(setting, tmp_path, monkeypatch, horizon):
    """Boundaries where no latent could be drawn are left out, and the annotation is that of trying them all."""
    _, engine, document = setting
    placed = 0
    for step in range(4):
        args = RA3Config(output_dir=str(tmp_path), horizon=horizon, prior_alpha=0.9, max_latent_length=5, penalty=0.0)
        policy, noise = Policy(engine, args), NoiseKey(seed=1, phase=1, step=step)
        quick = annotate(policy, document, noise)
        with monkeypatch.context() as patch:
            patch.setattr(annotation, "_undecided", lambda trunk, boundaries, *rest: list(boundaries))
            whole = annotate(policy, document, noise)
        assert {b: z.token_ids for b, z in quick.placed.items()} == {b: z.token_ids for b, z in whole.placed.items()}
        placed += len(quick.placed)
    assert placed


def test_where_no_latent_could_be_drawn_by_hand():
    """Lines at -3 nats and a prior of 0.05: a latent that makes them certain leaves <act> 0.95 / (0.95 + 0.05 e^3) =
    0.486: a draw of 0.4 is <act> for certain, one of 0.6 is not. A line at -0.1 can't gain the penalty of 0.2."""
    boundary = Boundary((1,), (2,))
    document = Document(0, 0, (0, 1, 2, 3), tuple(Action(i, i + 1, i + 2, boundary) for i in range(3)), 1)
    none = torch.zeros(0, 0, 0)
    trunk = RolloutGroup(document, (), (), torch.tensor([-3.0, -3.0, -0.1]), torch.full((3,), -torch.inf), none, none)
    args = RA3Config(use_cpu=True, horizon=1, penalty=0.2)
    prior, u = torch.full((3,), 0.05).log(), torch.tensor([0.4, 0.6, 0.999])
    assert annotation._undecided(trunk, (0, 1, 2), prior, u, args) == [1]
