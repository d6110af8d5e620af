"""Latents proposed in hindsight: prompts, exact weights, bounds, gradients."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from datasets import Dataset
from slow_path import plain_forward

from ra3_trl import Policy, RA3Config, RA3MidTrainer
from ra3_trl.cli.annotate import main
from ra3_trl.config_file import read_experimental
from ra3_trl.em import EStep, Gradients, MetricSums, rollout_sums
from ra3_trl.em.monitor import is_foreign, latent_alarms
from ra3_trl.experimental.hindsight import (
    HindsightConfig,
    HindsightTrainer,
    Proposal,
    Proposals,
    attach,
    make_proposals,
)
from ra3_trl.experimental.hindsight.prompts import chat_template, fim_template, parse_template
from ra3_trl.experimental.hindsight.proposals import drawn_logps, prior_logps, share_out
from ra3_trl.losses import advantages, code_bounds, compute_returns, log1mexp, renormalise
from ra3_trl.models import FrozenWeights
from ra3_trl.policy import annotate
from ra3_trl.records import Document, Latent
from ra3_trl.report import latent_rows
from ra3_trl.rollout import Backbone, BranchEngine, ExpandEngine, NoiseKey, SamplingParams
from ra3_trl.segmentation import build_token_table, token_bytes


NOISE = NoiseKey(seed=1, phase=0, step=0)
CODE = "def area(r):\n    pi = 3\n    return pi * r * r\n\n\nprint(area(2))\n"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"


@pytest.fixture(scope="module", params=["newline_indent", "sentencepiece"])
def fim_tokenizer(request, tokenizers):
    """With tokens for filling in the middle, one with a BOS and one without."""
    tokenizer = copy.deepcopy(tokenizers[request.param])
    tokenizer.add_special_tokens({"additional_special_tokens": [*FIM, "<|user|>", "<|bot|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_of(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["newline_indent"])
    tokenizer.add_special_tokens({"additional_special_tokens": [*FIM, "<|user|>", "<|bot|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def world(fim_tokenizer, tiny_model, segmenter):
    """`world(...)`: an engine on a tiny model, and the document."""

    def make(engine=BranchEngine, few: int = 0, **params):
        model = tiny_model("llama", fim_tokenizer)
        table = build_token_table(fim_tokenizer, len(fim_tokenizer))
        if few:  # no more than so many tokens may stand in a latent, so that all latents can be listed
            allowed = ((table.next_state_SV[0] >= 0) & ~table.blank_V).nonzero()[:, 0]
            allowed = allowed[~torch.isin(allowed, table.stop_ids)][:few]
            next_state = torch.full_like(table.next_state_SV, -1)
            next_state[0, allowed] = 0
            next_state[0, table.stop_ids] = 0
            table = replace(table, next_state_SV=next_state)
        params = SamplingParams(**{"max_length": 3} | params)
        (document,) = segmenter(fim_tokenizer)(0, CODE)
        return engine(Backbone(model), table, params), document

    return make


def fim(tokenizer, *shares: float) -> Proposals:
    """Causal and fill-in-the-middle, or the latter alone."""
    causal = [Proposal("causal", shares[0])] if len(shares) > 1 else []
    return Proposals((*causal, Proposal("fim", shares[-1], fim_template(tokenizer), lines=2)))


def priced(proposals: Proposals, kl_coef: float) -> Proposals:
    """The same with another weight of their log-ratio."""
    return Proposals(proposals.members, kl_coef)


def roll_out(engine, document: Document, args: RA3Config, proposals: Proposals, **weights):
    """The rollouts of one document, one for each proposal."""
    return EStep(Policy(engine, args, proposer=proposals), args, **weights).roll_out([document], NOISE)


def backward(engine, rollout, args: RA3Config, num_boundaries: int) -> dict[str, float]:
    """Gradients of a rollout's loss; the loss's parts."""
    gradients = Gradients(lambda loss: loss.backward())
    return EStep(Policy(engine, args), args).backward([rollout], num_boundaries, False, gradients)[1]


def fim_prompt(tokenizer, document: Document, boundary: int, lines: int) -> list[int]:
    """The prompt written out: BOS if there is one, prefix, think prefix, suffix, middle."""
    prefix, suffix, middle = tokenizer.convert_tokens_to_ids(list(FIM))
    ids, action = list(document.input_ids), document.actions[boundary]
    end = document.actions[min(boundary + lines, len(document.actions)) - 1].end
    bos = [ids.pop(0)] if ids[0] == tokenizer.bos_token_id else []
    start, end = action.start - len(bos), end - len(bos)
    known = [*action.boundary.close, *ids[start:end]]
    return [*bos, prefix, *ids[:start], *action.boundary.think, suffix, *known, middle]


def logp_by_hand(engine, prompt: list[int], latent: Latent) -> float:
    """Log-prob of a latent behind a prompt: plain forward, softmax over what may be drawn, the stop as one symbol."""
    table, params = engine.table, engine.params
    logits = plain_forward(engine.backbone.model, [*prompt, *latent.token_ids]).double() / params.temperature
    total, state = 0.0, 0
    for step, token in enumerate([*latent.token_ids, table.stop_id][: len(latent.logps)]):
        row = logits[len(prompt) - 1 + step].clone()
        stop = torch.logsumexp(row[table.stop_ids], -1)
        row[~engine.distribution.allowed(state, step)] = -torch.inf
        if engine.distribution.allowed(state, step)[table.stop_id]:
            row[table.stop_id] = stop
        if params.top_k:
            row[row < row.topk(params.top_k).values[-1]] = -torch.inf
        total += float(row.log_softmax(-1)[token])
        state = int(table.next_state_SV[state, token])
    return total


@pytest.mark.parametrize("engine", [BranchEngine, ExpandEngine])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 20}])
def test_log_q_is_what_was_drawn_from(world, fim_tokenizer, engine, params):
    engine, document = world(engine, **params)
    boundaries = document.boundaries
    (group,) = fim(fim_tokenizer, 1.0).propose(engine, [document], [boundaries], 2, 2, NOISE)
    own = drawn_logps(group.latents)
    found = fim(fim_tokenizer, 1.0).members[0].logps(engine, document, boundaries, group.latents)
    torch.testing.assert_close(found, own, atol=1e-3, rtol=0)
    whole = engine.__class__(engine.backbone, engine.table, replace(engine.params, top_k=0))
    for t, boundary in enumerate(boundaries):
        prompt = fim_prompt(fim_tokenizer, document, boundary, 2)
        start = [*document.input_ids[: document.actions[boundary].start], *document.actions[boundary].boundary.think]
        for g, latent in enumerate(group.latents[t]):
            assert float(own[t, g]) == pytest.approx(logp_by_hand(engine, prompt, latent), abs=1e-3)
            prior = logp_by_hand(whole, start, latent)  # not truncated
            assert float(group.log_ratio_TG[t, g]) == pytest.approx(prior - float(own[t, g]), abs=2e-3)


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_mixture_is_weighted_by_the_balance_heuristic(world, fim_tokenizer, top_k):
    """Truncated, a latent of one proposal is often impossible under another; the prior is never truncated."""
    engine, document = world(top_k=top_k)
    proposals = fim(fim_tokenizer, 1.0, 3.0)
    (group,) = proposals.propose(engine, [document], [document.boundaries], 4, 1, NOISE)
    assert share_out(4, proposals.shares) == (1, 3)
    causal, known = (m.logps(engine, document, document.boundaries, group.latents) for m in proposals.members)
    assert (causal.isinf() | known.isinf()).any() == bool(top_k)
    prior = prior_logps(engine, document, document.boundaries, group.latents)
    assert group.log_ratio_TG.isfinite().all()
    mixed = torch.logaddexp(causal + math.log(1 / 4), known + math.log(3 / 4))
    torch.testing.assert_close(group.log_ratio_TG, prior - mixed, atol=1e-3, rtol=0)
    # The first of the latents is the policy's own: as a rollout of one would draw it.
    alone = engine.rollout(document, document.boundaries, 1, 1, NOISE)
    assert [row[0].token_ids for row in group.latents] == [row[0].token_ids for row in alone.latents]


def test_what_was_drawn_was_possible(world, fim_tokenizer, monkeypatch):
    """A nucleus found anew may leave out a token at its edge; here it leaves out all. What was drawn counts as
    drawn, so that q is then the own proposal's share of its probability: 1/4 and 3/4."""
    engine, document = world(top_k=5)

    def found_anew(self, engine, document, boundaries, latents):
        return torch.full((len(latents), 4), -torch.inf)

    monkeypatch.setattr(Proposal, "logps", found_anew)
    monkeypatch.setattr("ra3_trl.experimental.hindsight.proposals.prior_logps", lambda *_: torch.zeros(()))
    (group,) = fim(fim_tokenizer, 1.0, 3.0).propose(engine, [document], [document.boundaries], 4, 1, NOISE)
    own = drawn_logps(group.latents) + torch.tensor([1 / 4, 3 / 4, 3 / 4, 3 / 4]).log()
    torch.testing.assert_close(group.log_ratio_TG, -own)


def test_proposals_do_not_share_their_noise(world, fim_tokenizer):
    """Twice the same proposal: with one noise for both, the second half would repeat the first."""
    engine, document = world()
    twice = Proposals(fim(fim_tokenizer, 1.0).members * 2)
    (group,) = twice.propose(engine, [document], [document.boundaries], 4, 1, NOISE)
    assert all([z.token_ids for z in row[:2]] != [z.token_ids for z in row[2:]] for row in group.latents)
    args = HindsightConfig("x", proposal="fim", num_latents=4, horizon=1, use_cpu=True)
    first, second = roll_out(engine, document, args, twice)
    for row, other in zip(first.group.latents, second.group.latents, strict=True):
        assert [z.token_ids for z in row] != [z.token_ids for z in other]


def test_the_policys_own_latents_are_a_plain_rollout(world):
    engine, document = world()
    (group,) = Proposals().propose(engine, [document], [document.boundaries], 2, 2, NOISE)
    plain = engine.rollout(document, document.boundaries, 2, 2, NOISE)
    assert group.latents == plain.latents and group.log_ratio_TG is None
    assert torch.equal(group.latent_line_logps_TGH, plain.latent_line_logps_TGH)


def every_latent(engine) -> list[Latent]:
    """All latents of a table with few tokens and `max_length` 2: one token and a stop, or two."""
    table = engine.table
    tokens = [i for i in (table.next_state_SV[0] >= 0).nonzero()[:, 0].tolist() if i not in table.stop_ids.tolist()]
    one = [Latent((a,), True, (0.0, 0.0)) for a in tokens]
    return one + [Latent((a, b), False, (0.0, 0.0)) for a, b in product(tokens, tokens)]


def test_bounds_against_all_latents(world, fim_tokenizer):
    """4 tokens: 4 latents of one token, 16 of two. In expectation over what is drawn, the pooled estimate of the
    lines' probability is that probability, whatever the proposals; its log and the ELBO are below the log of it."""
    engine, document = world(few=4, max_length=2)
    boundary = document.boundaries[1]
    actions = tuple(a if i == boundary else replace(a, boundary=None) for i, a in enumerate(document.actions))
    document = replace(document, actions=actions)
    latents = every_latent(engine)
    proposals = fim(fim_tokenizer, 1.0, 1.0)
    scored = engine.score(document, (boundary,), [latents], 1)
    gates = scored.gate_logps_A.clone()
    gates[boundary] = math.log(0.5)  # of a random model it is nearly 0, and all bounds the same
    scored = replace(scored, gate_logps_A=gates)
    logp = prior_logps(engine, document, (boundary,), [latents])[0].double()
    logq = proposals.members[1].logps(engine, document, (boundary,), [latents])[0].double()
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float(logq.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float((logp - logq).abs().max()) > 0.5  # hindsight is another distribution

    line = renormalise(scored.latent_line_logps_TGH, scored.latent_gate_logps_TGH)[0, :, 0].double()
    act = renormalise(scored.line_logps_A, scored.gate_logps_A)[boundary].double()
    log_think = scored.gate_logps_A[boundary].double()
    thinking = torch.logsumexp(logp + line, 0)
    exact = float(torch.logaddexp(log1mexp(log_think) + act, log_think + thinking))
    rest = float(scored.line_logps_A.double().sum() - scored.line_logps_A[boundary].double())

    mixed = torch.logaddexp(logp, logq) - math.log(2)
    probability = expected_log = expected_elbo = 0.0
    for i, j in product(range(len(latents)), repeat=2):  # one latent of each proposal
        pair = [i, j]
        group = replace(
            scored,
            latents=((latents[i], latents[j]),),
            latent_line_logps_TGH=scored.latent_line_logps_TGH[:, pair],
            latent_gate_logps_TGH=scored.latent_gate_logps_TGH[:, pair],
            log_ratio_TG=(logp - mixed)[pair][None],
        )
        weight = float((logp[i] + logq[j]).exp())
        bounds = code_bounds(group)
        probability += weight * math.exp(bounds.multi_sample - rest)
        expected_log += weight * (bounds.multi_sample - rest)
        expected_elbo += weight * (bounds.elbo - rest)
    assert math.log(probability) == pytest.approx(exact, abs=1e-4)
    assert expected_elbo < expected_log < exact


def test_hindsight_tightens_the_bound_where_the_prior_seldom_finds_it(world, fim_tokenizer):
    """q drawn from the posterior itself makes every weight the line's probability: the bound is then exact."""
    engine, document = world(few=4, max_length=2)
    boundary = document.boundaries[1]
    latents = every_latent(engine)
    scored = engine.score(document, (boundary,), [latents], 1)
    logp = prior_logps(engine, document, (boundary,), [latents])[0]
    line = compute_returns(scored, 1, 1.0).latent_TG[0]
    posterior = (logp + line).log_softmax(0)
    group = replace(scored, log_ratio_TG=(logp - posterior)[None])
    found = compute_returns(group, 1, 1.0).latent_TG[0]
    torch.testing.assert_close(found, torch.logsumexp(logp + line, 0).expand(len(latents)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "text", ["{suffix}<|fim_suffix|>{prefix}{think}", "<|fim_middle|>{prefix}<|fim_suffix|>{suffix}<|fim_prefix|>#"]
)
def test_templates_of_ones_own(world, fim_tokenizer, text):
    """Where the next lines come first each boundary has a prompt of its own."""
    engine, document = world()
    template = parse_template(text, fim_tokenizer)
    assert template.shares_prefix == text.startswith("<")
    boundaries = document.boundaries
    assert len(template.views(document, boundaries, 2)) == (1 if template.shares_prefix else len(boundaries))
    (group,) = Proposals([Proposal("template", 1.0, template, 2)]).propose(
        engine, [document], [boundaries], 2, 1, NOISE
    )
    for t, boundary in enumerate(boundaries):
        ids, action = document.input_ids, document.actions[boundary]
        bos = [ids[0]] if ids[0] == fim_tokenizer.bos_token_id else []
        code, end = ids[len(bos) : action.start], document.actions[min(boundary + 2, len(document.actions)) - 1].end
        known = [*action.boundary.close, *ids[action.start : end]]
        prefix, suffix, middle = fim_tokenizer.convert_tokens_to_ids(list(FIM))
        if template.shares_prefix:
            after = template.pieces[-1][1:]  # behind a special token, as this tokenizer has it
            assert fim_tokenizer.decode(after).strip() == "#"
            prompt = [*bos, middle, *code, suffix, *known, prefix, *after]
        else:
            prompt = [*bos, *known, suffix, *code, *action.boundary.think]
        for latent in group.latents[t]:
            assert sum(latent.logps) == pytest.approx(logp_by_hand(engine, prompt, latent), abs=1e-3)


def test_a_function_writes_the_prompt(world, fim_tokenizer):
    engine, document = world()
    seen = []

    def prompt(prefix: str, suffix: str) -> str:
        seen.append((prefix, suffix))
        return f"comment on{suffix}\n#"

    args = HindsightConfig(
        "x", proposal="function", e_steps=0, annotation="resample", prior_alpha=0.5, use_cpu=True, max_length=64
    )
    proposals = make_proposals(args, fim_tokenizer, 2048, prompt)
    (group,) = proposals.propose(engine, [document], [document.boundaries], 2, 1, NOISE)
    assert seen[0][0].startswith("def area(r):") and "pi" not in seen[0][0]
    assert "pi = 3" in seen[0][1] and "return pi * r * r" in seen[0][1]
    bos = [fim_tokenizer.bos_token_id] if document.input_ids[0] == fim_tokenizer.bos_token_id else []
    ids = bos + fim_tokenizer(prompt(*seen[0]), add_special_tokens=False)["input_ids"]
    for latent in group.latents[0]:
        assert sum(latent.logps) == pytest.approx(logp_by_hand(engine, ids, latent), abs=1e-3)
    with pytest.raises(ValueError, match="`proposal_func` returned ''"):
        empty = make_proposals(args, fim_tokenizer, 2048, lambda a, b: "")
        empty.propose(engine, [document], [document.boundaries], 2, 1, NOISE)
    first = document.actions[document.boundaries[0]]
    room = 100 - args.max_latent_length - (first.end - first.start) - len(first.boundary.close)
    with pytest.raises(ValueError, match=f"prompt of .* tokens, but the model's context leaves room for {room};"):
        long = make_proposals(args, fim_tokenizer, 100, lambda a, b: "a b c d e f g h " * 40)
        long.propose(engine, [document], [document.boundaries], 2, 1, NOISE)


def replace_args(args: RA3Config, **changes) -> RA3Config:
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_annotation_draws_by_the_whole_weight(world, fim_tokenizer):
    """Effective sizes against weights that are worked out from the group."""
    engine, document = world()
    proposals = fim(fim_tokenizer, 1.0, 1.0)
    args = HindsightConfig(
        "x", horizon=1, num_latents=4, annotation="resample", prior_alpha=0.5, proposal="causal+fim", use_cpu=True
    )
    (group,) = proposals.propose(engine, [document], [document.boundaries], 4, 1, NOISE)
    returns = compute_returns(group, 1, 0.9)
    # <act>: log 1/2 + its line; a latent: log(1/2 / 4) + its line + log-ratio, which the returns hold already.
    logits = torch.cat([returns.act_T[:, None] + math.log(0.5), returns.latent_TG + math.log(0.5 / 4)], 1)
    weights = logits.double().softmax(-1)
    found = annotate(Policy(engine, args, proposer=proposals), document, NOISE)
    annealed = annotate(Policy(engine, args, proposer=priced(proposals, 0.0)), document, NOISE)
    bare = compute_returns(replace(group, log_ratio_TG=None), 1, 0.9)
    free = torch.cat([bare.act_T[:, None] + math.log(0.5), bare.latent_TG + math.log(0.5 / 4)], 1).double().softmax(-1)
    for boundary, size in annealed.sizes.items():
        assert size == pytest.approx(1 / float(free[group.boundaries.index(boundary)].square().sum()), rel=1e-3)
    for boundary, size in found.sizes.items():
        t = group.boundaries.index(boundary)
        assert size == pytest.approx(1 / float(weights[t].square().sum()), rel=1e-3)
    assert min(found.sizes.values()) >= 1 and max(found.sizes.values()) <= 5


@pytest.mark.parametrize("fim_tokenizer", ["newline_indent"], indirect=True)  # weights know no tokenizer
def test_annotation_draws_each_candidate_as_often_as_it_weighs(world, fim_tokenizer):
    """<act> and four latents, 40 draws at each boundary; counts within four standard deviations of sums of weights."""
    engine, document = world()
    proposals = fim(fim_tokenizer, 1.0, 1.0)
    args = HindsightConfig(
        "x", horizon=1, num_latents=4, annotation="resample", prior_alpha=0.5, proposal="causal+fim", use_cpu=True
    )
    wanted, spread, found = (torch.zeros(5, dtype=torch.float64) for _ in range(3))
    for step in range(40):
        noise = replace(NOISE, step=step)
        (group,) = proposals.propose(engine, [document], [document.boundaries], 4, 1, noise)
        returns = compute_returns(group, 1, 0.9)
        logits = torch.cat([returns.act_T[:, None] + math.log(0.5), returns.latent_TG + math.log(0.5 / 4)], 1)
        weights = logits.double().softmax(-1)
        placed = annotate(Policy(engine, args, proposer=proposals), document, noise).placed
        for t, (boundary, row) in enumerate(zip(group.boundaries, group.latents, strict=True)):
            if len({z.token_ids for z in row}) == 4:  # else it can't be told which one was placed
                wanted += weights[t]
                spread += weights[t] * (1 - weights[t])
                found[1 + row.index(placed[boundary]) if boundary in placed else 0] += 1
    assert wanted.min() > 1  # each is drawn at times
    assert ((found - wanted).abs() < 4 * spread.sqrt()).all(), (found, wanted)


def test_a_row_that_is_full_takes_no_more_latents(world, fim_tokenizer, segmenter):
    """A document of n tokens, latents of at most 3 and their markup: each placed adds up to 11."""
    engine, _ = world()
    (document,) = segmenter(fim_tokenizer)(0, CODE * 3)
    args = HindsightConfig(
        "x", horizon=2, num_latents=4, annotation="resample", prior_alpha=1e-9, max_latent_length=3,
        proposal="causal+fim", use_cpu=True,
    )  # fmt: skip
    proposals, n = fim(fim_tokenizer, 1.0, 1.0), len(document.input_ids)
    placed = {}
    for room in (11, 22, 1000):
        changed = replace_args(args, max_length=n + room)
        example = annotate(Policy(engine, changed, proposer=proposals), document, NOISE)
        assert len(example.input_ids) <= n + room
        placed[room] = list(example.placed)
    assert len(placed[11]) == 1 and placed[22] == placed[1000][: len(placed[22])]
    assert 1 < len(placed[22]) < len(placed[1000])


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_gradients_of_a_proposal_against_plain_forwards(tokenizer_of, tiny_model, segmenter, weight):
    """The loss is minus the mean over latents of advantage times log q, the advantage that of the whole ELBO."""
    tokenizer, model = tokenizer_of, tiny_model("llama", tokenizer_of)
    engine = BranchEngine(Backbone(model), build_token_table(tokenizer, len(tokenizer)), SamplingParams(2))
    (document,) = segmenter(tokenizer)(0, CODE)
    args = HindsightConfig(
        "x", proposal="fim", num_latents=2, horizon=1, kl_coef=0, penalty=0.3, gate_hold="never",
        proposal_kl_coef=weight, use_cpu=True, boundary_selection="random",
    )  # fmt: skip
    (rollout,) = roll_out(engine, document, args, priced(fim(tokenizer, 1.0), weight))
    group, boundaries = rollout.group, rollout.group.boundaries
    returns = rollout.returns
    prior = prior_logps(engine, document, boundaries, group.latents)
    torch.testing.assert_close(group.log_ratio_TG, prior - drawn_logps(group.latents))
    bare = compute_returns(replace(group, log_ratio_TG=None), 1, 0.9)
    torch.testing.assert_close(returns.latent_TG, bare.latent_TG + weight * group.log_ratio_TG)
    model.zero_grad()
    backward(engine, rollout, args, len(boundaries))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    advantage = advantages(returns.gain_TG, torch.ones(len(boundaries)), 0.3, "elbo")
    for t, boundary in enumerate(boundaries):
        prompt = fim_prompt(tokenizer, document, boundary, 2)
        for g, latent in enumerate(group.latents[t]):
            ids = torch.tensor([[*prompt, *latent.token_ids]])
            logits = model(input_ids=ids).logits[0]
            state, total = 0, 0.0
            for step, token in enumerate([*latent.token_ids, engine.table.stop_id][: len(latent.logps)]):
                row = logits[len(prompt) - 1 + step]
                stop = torch.logsumexp(row[engine.table.stop_ids], -1)
                allowed = engine.distribution.allowed(state, step)
                is_stop = torch.arange(len(row)) == engine.table.stop_id
                row = torch.where(is_stop, stop, row).masked_fill(~allowed, -torch.inf)
                total = total + row.log_softmax(-1)[token]
                state = int(engine.table.next_state_SV[state, token])
            (-advantage[t, g] * total / 2 / len(boundaries)).backward()
    assert found
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=2e-3)


def test_the_reference_of_a_proposal_is_its_own_at_the_start(tokenizer_of, tiny_model, segmenter):
    """KL is measured between distributions behind the same prompt: at the start weights it is 0 for every token."""
    tokenizer, model = tokenizer_of, tiny_model("llama", tokenizer_of)
    engine = BranchEngine(Backbone(model), build_token_table(tokenizer, len(tokenizer)), SamplingParams(2))
    (document,) = segmenter(tokenizer)(0, CODE)
    args = HindsightConfig("x", proposal="fim", num_latents=2, horizon=1, kl_coef=0.1, use_cpu=True)
    (rollout,) = roll_out(engine, document, args, fim(tokenizer, 1.0), start=FrozenWeights(model))
    own = torch.cat([torch.tensor(z.logps) for row in rollout.group.latents for z in row])
    torch.testing.assert_close(
        torch.cat([c.reference.token_n for c in rollout.chunks]).sort().values, own.sort().values, atol=1e-4, rtol=0
    )
    assert backward(engine, rollout, args, 1)["kl"] == pytest.approx(0, abs=1e-6)


def test_a_frozen_rewards_prior_is_frozen_too(tokenizer_of, tiny_model, segmenter):
    tokenizer, model = tokenizer_of, tiny_model("llama", tokenizer_of)
    engine = BranchEngine(Backbone(model), build_token_table(tokenizer, len(tokenizer)), SamplingParams(2))
    (document,) = segmenter(tokenizer)(0, CODE)
    args = HindsightConfig("x", proposal="fim", num_latents=2, horizon=1, reward_model="frozen", use_cpu=True)
    frozen = FrozenWeights(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    (rollout,) = roll_out(engine, document, args, fim(tokenizer, 1.0), reward=frozen)
    group = rollout.group
    live = prior_logps(engine, document, group.boundaries, group.latents)
    with frozen.applied():
        prior = prior_logps(engine, document, group.boundaries, group.latents)
    assert (prior - live).abs().min() > 1e-3
    torch.testing.assert_close(group.log_ratio_TG, prior - drawn_logps(group.latents))


CORPUS = [CODE, "x = 1\ny = x + 1\nprint(y)\n", "for i in range(3):\n    print(i)\n", "import os\nprint(os.sep)\n"]


@pytest.fixture
def hindsight_trainer(tmp_path, tokenizer_of, tiny_model):
    def make(proposal_func=None, folder="run", **settings):
        defaults = {
            "output_dir": str(tmp_path / folder), "max_length": 256, "e_steps": 2, "m_steps": 2, "num_latents": 4,
            "max_latent_length": 4, "learning_rate": 1e-3, "e_learning_rate": 1e-3, "per_device_train_batch_size": 2,
            "save_strategy": "no", "report_to": "none", "log_latents_steps": 0, "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        data = Dataset.from_dict({"text": CORPUS})
        return HindsightTrainer(
            tiny_model("llama", tokenizer_of), HindsightConfig(**defaults | settings), data, data, tokenizer_of,
            proposal_func=proposal_func,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("proposal", "reward_model"), [("fim", "live"), ("causal:1+chat:3", "live"), ("causal+template", "frozen")]
)
def test_training_with_hindsight(hindsight_trainer, proposal, reward_model):
    template = "<|user|>{prefix}<|bot|>{suffix}{think}" if "template" in proposal else None
    trainer = hindsight_trainer(proposal=proposal, proposal_template=template, reward_model=reward_model)
    alarms = []
    trainer.loop.watch.alarm = lambda averages, state, step: alarms.append(averages)
    before = trainer.evaluate()
    assert {"eval_elbo_hindsight", "eval_bound_hindsight", "eval_gain_hindsight"} <= set(before)
    assert (
        before["eval_bound_hindsight"] <= before["eval_elbo_hindsight"]
    )  # negated: the multi-sample bound is tighter
    trainer.train()
    log = {name for entry in trainer.state.log_history for name in entry}
    assert {"estep/hindsight/gain", "estep/hindsight/log_ratio", "estep/hindsight/copy_rate"} <= log
    assert ("estep/gain" in log) == ("causal" in proposal)
    assert {"estep/code_loss", "mstep/effective_size", "mstep/annotated_rate"} <= log
    assert len(alarms) == 2 and all("hindsight/copy_rate" in named for named in alarms)  # one an E-update
    assert all(math.isfinite(e["estep/loss"]) for e in trainer.state.log_history if "estep/loss" in e)
    ratios = [entry["estep/hindsight/log_ratio"] for entry in trainer.state.log_history if "estep/code_loss" in entry]
    assert all(math.isfinite(ratio) for ratio in ratios)


def test_two_passes_of_two_rollouts_are_one_of_four(hindsight_trainer):
    """Rollouts of several proposals land in the batches that their documents were in."""
    runs = {}
    for accumulation, batch in ((1, 4), (2, 2)):
        trainer = hindsight_trainer(
            proposal="causal+fim", e_steps=1, m_steps=1, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch, folder=f"run{batch}",
        )  # fmt: skip
        trainer.train()
        runs[batch] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for name, value in runs[4].items():
        torch.testing.assert_close(value, runs[2][name], atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_the_same(hindsight_trainer):
    whole = hindsight_trainer(proposal="causal+fim", e_steps=2, m_steps=2, save_strategy="steps", save_steps=1)
    whole.train()
    wanted = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    again = hindsight_trainer(proposal="causal+fim", e_steps=2, m_steps=2, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-1")
    for name, value in again.model.named_parameters():
        assert torch.equal(value, wanted[name]), name


def test_a_function_annotates_without_an_e_phase(hindsight_trainer):
    trainer = hindsight_trainer(
        lambda prefix, suffix: f"# {suffix}\n#", proposal="causal+function", e_steps=0, annotation="resample",
        prior_alpha=0.5,
    )  # fmt: skip
    trainer.train()
    assert any("mstep/effective_size" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal": "fin"}, "`proposal` is 'fin'; use one of 'causal', 'fim'"),
        ({"proposal": "causal+causal"}, "each once"),
        ({"proposal": "causal:x+fim"}, "shares above 0"),
        ({"proposal": "causal:0+fim"}, "shares above 0"),
        ({"proposal": "template"}, "give one, or neither"),
        ({"proposal_template": "{prefix}{suffix}"}, "give one, or neither"),
        ({"proposal": "fim", "proposal_lines": 0}, "`proposal_lines` is 0; it must be at least 1"),
        ({"proposal": "fim", "annotation": "policy"}, "set `annotation='resample'`"),
        ({"proposal": "fim", "line_reduction": "mean"}, "set `line_reduction='sum'`"),
        ({"proposal": "causal+fim", "num_latents": 3}, "2 or more of each of the 2 parts"),
        (
            {"proposal": "causal+fim", "num_latents": 1, "e_steps": 0, "annotation": "resample"},
            "`num_latents` is 1, but `proposal`",
        ),
        ({"proposal": "causal+fim", "eval_num_latents": 1}, "`eval_num_latents` is 1, but `proposal`"),
        ({"proposal": "fim", "gate": "head"}, "give 'causal' a share"),
        ({"proposal": "fim", "gate_hold": "always"}, "`gate_hold` is 'always', but without"),
        ({"proposal": "fim", "line_reduction": "mean", "e_steps": 0}, "set `line_reduction='sum'`"),
        ({"proposal_kl_coef": 0.2}, "leave it at 1 or set `proposal`"),
        ({"proposal": "fim", "proposal_kl_coef": math.inf}, "`proposal_kl_coef` is inf; it must be .* at most 1"),
        ({"proposal": "fim", "proposal_kl_coef": -0.1}, "`proposal_kl_coef` is -0.1; it must be at least 0"),
        ({"metric_for_best_model": "elbo_hindsight"}, "`metric_for_best_model` is 'elbo_hindsight', .* use 'elbo'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        HindsightConfig("x", use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prefix} and", "has {suffix} 0 times; it must be there once"),
        ("{suffix} and", "has {prefix} 0 times"),
        ("{prefix}{suffix}{think}{think}", "has {think} 2 times; it must be there at most once"),
        ("{prefix}{sufix}", "has '{sufix}'; its placeholders are {prefix}, {think} and {suffix}"),
        ("{prefix}{suffix}{", "has '{'"),
        ("{suffix}\n{prefix}", "ends with {prefix}"),
        ("{prefix}<|fim_hole|>{suffix}#", "has '<|fim_hole|>', which the tokenizer splits into"),
    ],
)
def test_templates_that_cannot_work(tokenizer_of, text, message):
    with pytest.raises(ValueError) as caught:
        parse_template(text, tokenizer_of)
    assert message in str(caught.value)


def test_braces_are_doubled(tokenizer_of):
    template = parse_template("{{a}} {prefix}{{{suffix}}}{think}", tokenizer_of)
    words = [piece if isinstance(piece, str) else tokenizer_of.decode(piece) for piece in template.pieces]
    assert words == ["{a} ", "prefix", "{", "suffix", "}", "think"]


def test_text_in_a_template_has_no_dummy_space(tokenizers):
    """SentencePiece puts one before a text of its own, not before what stands inside another; `<PRE>` is no token, but
    with its dummy space it is."""
    tokenizer = copy.deepcopy(tokenizers["sentencepiece"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"]})
    template = parse_template("{prefix}\n# next:\n{suffix}x{think}", tokenizer)
    data = token_bytes(tokenizer)
    texts = [b"".join(data[i] for i in piece) for piece in template.pieces if not isinstance(piece, str)]
    assert texts == [b"\n# next:\n", b"x"]
    theirs = parse_template("\u2581<PRE>{prefix}{think}\u2581<SUF>{suffix}\u2581<MID>", tokenizer)
    assert theirs.pieces == fim_template(tokenizer).pieces


def test_tokenizers_that_have_no_such_prompt(tokenizers, tokenizer_of):
    plain = tokenizers["newline_indent"]
    with pytest.raises(ValueError, match="has no tokens for filling in the middle"):
        fim_template(plain)
    with pytest.raises(ValueError, match="has no chat template"):
        chat_template(plain)
    half = copy.deepcopy(plain)
    half.add_special_tokens({"additional_special_tokens": ["<fim_prefix>", "<fim_suffix>"]})
    with pytest.raises(ValueError, match=r"lacks \['<fim_middle>'\] as tokens of their own"):
        fim_template(half)


@pytest.mark.parametrize(
    "markers",
    [
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
        ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ],
)
def test_other_families_tokens_are_found(tokenizers, markers):
    tokenizer = copy.deepcopy(tokenizers["newline_alone"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(markers)})
    prefix, suffix, middle = ((i,) for i in tokenizer.convert_tokens_to_ids(list(markers)))
    assert fim_template(tokenizer).pieces == (prefix, "prefix", "think", suffix, "suffix", middle)


def test_chats_prompt_reads_as_it_should(tokenizer_of, segmenter):
    (document,) = segmenter(tokenizer_of)(0, CODE)
    boundary = document.boundaries[0]
    ((view, places),) = chat_template(tokenizer_of).views(document, (boundary,), 1)
    action = view.actions[places[0]]
    text = tokenizer_of.decode([*view.input_ids[: action.start], *action.boundary.think])
    assert text.startswith("<|user|>Here is the beginning of a program:\n\ndef area(r):")
    assert "It goes on with these lines:\n\n\n    pi = 3\n" in text and text.rstrip(" #").endswith("<|bot|>")
    assert text.endswith("#") and "return" not in text


def test_trainers_refuse_before_any_sampling(hindsight_trainer):
    with pytest.raises(ValueError, match="lower `max_length` by 11"):
        # 2048 + 3 tokens of the prompt, and 2048 - 8 of latents: the context is 2048
        hindsight_trainer(proposal="fim", max_length=2048, max_latent_length=8)
    with pytest.raises(ValueError, match="lower `max_length` by 11"):  # evaluation samples from it all the same
        hindsight_trainer(proposal="fim", max_length=2048, max_latent_length=8, e_steps=0)
    with pytest.raises(ValueError, match="an E-phase can't train it.*nothing but fixed text stand before {prefix}"):
        hindsight_trainer(proposal="template", proposal_template="{suffix}<|user|>{prefix}{think}")
    with pytest.raises(ValueError, match="an E-phase can't train it.*`annotation='resample'`.$"):
        hindsight_trainer(lambda prefix, suffix: "#", proposal="function")
    with pytest.raises(ValueError, match="give the function to the trainer"):
        hindsight_trainer(lambda prefix, suffix: "#")
    with pytest.raises(ValueError, match="give the function to the trainer"):
        hindsight_trainer(proposal="function")
    annotates = {"e_steps": 0, "annotation": "resample", "prior_alpha": 0.5}
    with pytest.raises(ValueError, match="`proposal_func` is 'x'; give a function of two texts"):
        hindsight_trainer("x", proposal="function", **annotates)
    with pytest.raises(ValueError, match="`proposal_func` does not take what it is given .*too many positional"):
        hindsight_trainer(lambda prefix: "#", proposal="function", **annotates)
    with pytest.raises(ValueError, match="`proposal` is 'fim', but no latent is drawn in this training: `e_steps`"):
        hindsight_trainer(proposal="fim", e_steps=0)


def test_another_function_does_not_resume(hindsight_trainer, tmp_path):
    """It is known by its name."""

    def first(prefix, suffix):
        return prefix + suffix + "#"

    def second(prefix, suffix):
        return prefix + "#"

    settings = {
        "proposal": "function", "e_steps": 0, "annotation": "resample", "prior_alpha": 0.5, "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip
    hindsight_trainer(first, **settings).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match="`proposal_func` is '.*second', but .*-1 was written with '.*first'"):
        hindsight_trainer(second, **settings).train(resume_from_checkpoint=checkpoint)
    hindsight_trainer(first, **settings).train(resume_from_checkpoint=checkpoint)


def test_a_text_has_one_bos(tokenizers, segmenter):
    """Chat templates of many families begin with it, and so may a document."""
    tokenizer = copy.deepcopy(tokenizers["sentencepiece"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    (document,) = segmenter(tokenizer)(0, CODE)
    bos, user = tokenizer.convert_tokens_to_ids([tokenizer.bos_token, "<|user|>"])
    bare = replace(
        document, input_ids=document.input_ids[1:],
        actions=tuple(replace(a, start=a.start - 1, end=a.end - 1) for a in document.actions),
    )  # fmt: skip
    for one in (document, bare):
        ((view, _),) = chat_template(tokenizer).views(one, one.boundaries, 1)
        assert view.input_ids[:2] == (bos, user) and view.input_ids.count(bos) == 1


def test_chat_templates_of_others(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["newline_indent"])
    tokenizer.chat_template = CHAT  # its markers are plain text there
    assert chat_template(tokenizer).shares_prefix
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match="refuses a user's instruction: no users here"):
        chat_template(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="does not leave the instruction as it is"):
        chat_template(tokenizer)


def test_bounds_in_hindsight_are_lower_where_better():
    args = HindsightConfig("x", use_cpu=True, metric_for_best_model="eval_bound_hindsight", proposal="fim")
    assert args.greater_is_better is False


def test_a_document_without_boundaries_is_counted_where_it_belongs(tokenizer_of, tiny_model, segmenter):
    engine = BranchEngine(
        Backbone(tiny_model("llama", tokenizer_of)),
        build_token_table(tokenizer_of, len(tokenizer_of)),
        SamplingParams(2),
    )
    (document,) = segmenter(tokenizer_of)(0, "x = 1\n")
    args = HindsightConfig("x", proposal="causal+fim", use_cpu=True)
    rollouts = roll_out(engine, document, args, fim(tokenizer_of, 1.0, 1.0))
    sums = rollout_sums(rollouts, tokenizer_of.decode)
    assert not document.boundaries and sums["elbo"] == sums["hindsight/elbo"]


def test_annotating_with_a_checkpoints_proposals(tmp_path, tokenizer_of, tiny_model):
    """What was trained with is used again, and can be left."""
    tiny_model("llama", tokenizer_of).save_pretrained(tmp_path / "model")
    tokenizer_of.save_pretrained(tmp_path / "model")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("def f(x):\n    y = x\n    y += 1\n    return y\n" * 2)
    last_first = {"proposal": "template", "proposal_template": "{suffix}<|bot|>{prefix}{think}"}

    def annotated(settings: dict, *words: str) -> int:
        config = HindsightConfig(
            "x", use_cpu=True, e_steps=0, annotation="resample", prior_alpha=0.1, max_length=64, **settings
        )
        config.save_pretrained(str(tmp_path / "model"))
        output = str(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        return main(
            [str(tmp_path / "model"), "--code_dir", str(tmp_path / "code"), "--output", output, "--num_latents", "2",
             "--max_latent_length", "3", *words]
        )  # fmt: skip

    assert annotated(last_first) == annotated(last_first, "--proposal", "causal") == 0
    assert annotated({"proposal": "fim"}, "--annotation", "policy") == 0
    with pytest.raises(ValueError, match="its function is not at hand; give another `--proposal`"):
        annotated({"proposal": "function"})
    assert annotated({"proposal": "function"}, "--proposal", "fim") == 0


def test_proposals_of_a_policy_at_hand(tmp_path, tokenizer_of, tiny_model):
    """What the checkpoint was trained with, changed; proposal, template and price go together."""
    tiny_model("llama", tokenizer_of).save_pretrained(tmp_path)
    tokenizer_of.save_pretrained(tmp_path)
    template = {"proposal": "template", "proposal_template": "{prefix}{think}{suffix}", "proposal_kl_coef": 0.2}
    args = HindsightConfig("x", use_cpu=True, max_length=64, horizon=1, proposal_lines=2, **template)
    args.save_pretrained(str(tmp_path))
    trained = read_experimental(str(tmp_path))
    assert trained == {**template, "proposal_lines": 2}
    again = HindsightConfig.from_pretrained(str(tmp_path), use_cpu=True, proposal_lines=3)
    assert (again.proposal_template, again.proposal_lines, again.horizon) == (template["proposal_template"], 3, 1)

    def proposer(policy, *fields, **changes):
        found = attach(policy, *fields, **changes).proposer
        return [member.name for member in found.members], found.lines, found.kl_coef

    policy = Policy.open(str(tmp_path), use_cpu=True)
    assert proposer(policy, trained) == (["template"], 2, 0.2)
    assert proposer(policy, trained, proposal="causal+fim", proposal_lines=None) == (["causal", "fim"], 2, 0.2)
    assert proposer(policy, trained, proposal="causal") == (["causal"], 1, 1.0)
    assert proposer(policy) == (["causal"], 1, 1.0) and policy.proposer.causal
    assert proposer(policy, proposal="function", function=lambda prefix, suffix: "#") == (["function"], 4, 1.0)
    by_itself = Policy.open(str(tmp_path), use_cpu=True, annotation="policy")
    assert proposer(by_itself, trained) == (["causal"], 1, 1.0)
    with pytest.raises(ValueError, match="but `annotation` is 'policy'"):
        attach(by_itself, trained, proposal="fim")
    with pytest.raises(ValueError, match="`proposal_kl_coef` is 0.5, but all latents are the policy's own"):
        attach(policy, trained, proposal="causal", proposal_kl_coef=0.5)
    with pytest.raises(ValueError, match="its function is not at hand; give another `--proposal`"):
        attach(policy, {"proposal": "causal+function"})
    with pytest.raises(ValueError, match="no command takes one"):
        attach(policy, proposal="function")
    document = policy.segment(CODE)[0]
    (group,) = attach(policy, trained).propose([document], [document.boundaries], 2, NOISE)
    assert group.log_ratio_TG.isfinite().all()


def test_its_trainer_takes_its_own_settings(tmp_path, tokenizer_of, tiny_model):
    args = RA3Config(str(tmp_path), use_cpu=True, report_to="none", max_length=64)
    with pytest.raises(ValueError, match="`args` is of type RA3Config; give a `HindsightConfig`"):
        HindsightTrainer(tiny_model("llama", tokenizer_of), args, processing_class=tokenizer_of)
    secret = "not-a-real-token"
    assert secret not in repr(HindsightConfig("x", use_cpu=True, hub_token=secret))
    with pytest.raises(ValueError, match="fields that no `RA3Config` has"):
        HindsightConfig.from_settings({"proposals": "fim"})


def test_latents_that_copy_any_line_they_knew_are_counted(tokenizer_of, tiny_model, segmenter):
    """A latent that says the second of two known lines, `return pi * r * r`; of its six words one, `pi`, is in the
    first, `pi = 3`. One latent alone is not the same as another."""
    engine = BranchEngine(
        Backbone(tiny_model("llama", tokenizer_of)),
        build_token_table(tokenizer_of, len(tokenizer_of)),
        SamplingParams(2),
    )
    (document,) = segmenter(tokenizer_of)(0, CODE)
    args = HindsightConfig(
        "x", proposal="causal+fim", num_latents=4, horizon=1, max_boundaries=1, boundary_selection="random",
        use_cpu=True,
    )  # fmt: skip
    causal, known = roll_out(engine, document, args, fim(tokenizer_of, 1.0, 1.0))
    boundary = known.group.boundaries[0]
    line = document.actions[boundary + 1]
    said = replace(known.group.latents[0][0], token_ids=document.input_ids[line.start : line.end])
    rollouts = [replace(r, group=replace(r.group, latents=((said,),))) for r in (causal, known)]
    assert [row["origin"] for row in latent_rows(1, rollouts, tokenizer_of)] == ["policy", "hindsight"]
    for lines, rate in ((1, 1 / 6), (2, 1.0)):
        sums = MetricSums()
        sums.add_sums(rollout_sums(rollouts, tokenizer_of.decode, lines))
        rates = sums.averages()
        assert rates["hindsight/copy_rate"] == rate and rates["copy_rate"] < 1
        assert "same_rate" not in rates and "hindsight/same_rate" not in rates


def test_the_plain_trainer_does_not_pass_over_proposals(tokenizer_of, tiny_model):
    args = HindsightConfig("x", proposal="fim", use_cpu=True)
    with pytest.raises(ValueError, match="`args` is a HindsightConfig, .* make a `HindsightTrainer`"):
        RA3MidTrainer(tiny_model("llama", tokenizer_of), args, processing_class=tokenizer_of)


def test_shares():
    assert share_out(4, (1, 3)) == (1, 3) and share_out(4, (1, 3), least=2) == (2, 2)
    assert share_out(5, (1, 1)) in ((2, 3), (3, 2))
    assert share_out(4, (1, 100)) == (1, 3)  # at least one of each
    assert share_out(3, (100, 1, 1)) == (1, 1, 1)
    with pytest.raises(ValueError, match="raise `num_latents`"):
        share_out(1, (1, 1))
    for total in range(3, 20):
        assert sum(share_out(total, (0.2, 0.5, 0.3))) == total


def test_what_is_watched():
    assert is_foreign("返回 结果", "return x") and not is_foreign("return", "return x")
    assert not is_foreign("返回", "print('返回')")  # the code itself is written so
    assert not is_foreign("123", "x = 1")
    (alarm,) = latent_alarms({"copy_rate": 0.1, "hindsight/copy_rate": 0.9})
    assert alarm.startswith("proposed in hindsight, latents mostly repeat")
    (alarm,) = latent_alarms({"foreign_rate": 0.6})
    assert "another alphabet" in alarm
