"""Which boundaries an E-step tries, and whether latents say more than another document's would."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ra3_trl import RA3Config
from ra3_trl.policy import choose_to_try, gains_over_other, most_thinking
from ra3_trl.policy.decisions import choose_by_gate, inclusion_probs
from ra3_trl.records import Action, Boundary, Document, Latent, RolloutGroup
from ra3_trl.rollout import NoiseKey


BOUNDARY = Boundary((1,), (2,))


def lines(count: int, doc_id: int = 0) -> Document:
    actions = tuple(Action(i, i + 1, i + 2, BOUNDARY) for i in range(count))
    return Document(doc_id, 0, tuple(range(count + 1)), actions, 1)


def trunk(document: Document, think: list[float]) -> RolloutGroup:
    none = torch.zeros(0, 0, 0)
    gates = torch.tensor(think).log()
    return RolloutGroup(document, (), (), torch.zeros(len(think)), gates, none, none)


def test_inclusion_probabilities_by_hand():
    """Sizes 6, 1, 1, 1, 1 and 2 to draw: 1.2 for the first is too much, so it is certain and the others share 1."""
    assert inclusion_probs(np.array([6.0, 1, 1, 1, 1]), 2).tolist() == [1.0, 0.25, 0.25, 0.25, 0.25]
    assert inclusion_probs(np.array([2.0, 1, 1]), 1).tolist() == [0.5, 0.25, 0.25]
    assert inclusion_probs(np.zeros(4), 2).tolist() == [0.5] * 4
    assert inclusion_probs(np.array([1.0, 0.0]), 2).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_boundary_is_tried_as_often_as_its_probability(count):
    """4,000 draws: the standard error of a share is at most sqrt(0.25 / 4000) = 0.008."""
    think, document = torch.tensor([0.56, 0.02, 0.05, 0.2, 0.02]), lines(5)
    probs = inclusion_probs(think.double().numpy(), count)
    seen, totals = np.zeros(5), []
    for step in range(4000):
        tried, weight_T = choose_by_gate(document, think, count, NoiseKey(0, 0, step))
        assert len(set(tried)) == count and list(tried) == sorted(tried)
        seen[list(tried)] += 1
        totals.append(float((weight_T * think[list(tried)]).sum()))
    assert seen / 4000 == pytest.approx(probs, abs=0.03)
    assert sum(totals) / 4000 == pytest.approx(float(think.sum()), abs=0.02)


def test_an_e_step_tries_where_it_thinks():
    """P(think) 0.6 at one boundary of eight and 0 at the others, e = 0.1: sizes 0.64 and seven times 0.1, of which two
    are drawn; 0.64 / 1.34 * 2 = 0.955 for the first, whose weight is 1 / 0.955 = 1.047."""
    args, group = RA3Config(use_cpu=True, exploration=0.1), trunk(lines(8), [0.0, 0.6, *[0.0] * 6])
    found = [choose_to_try(None, group, args, NoiseKey(0, 0, step)) for step in range(300)]
    first = [dict(zip(tried, weight_T.tolist(), strict=True)).get(1) for tried, weight_T in found]
    assert sum(weight is not None for weight in first) / 300 == pytest.approx(0.955, abs=0.04)
    assert all(weight == pytest.approx(1.34 / 1.28) for weight in first if weight is not None)
    assert {boundary for tried, _ in found for boundary in tried} == set(range(8))


def test_at_random_all_are_alike():
    args, group = RA3Config(use_cpu=True, boundary_selection="random", max_boundaries=2), trunk(lines(8), [0.9] * 8)
    tried, weight_T = choose_to_try(None, group, args, NoiseKey(0, 0, 0))
    assert len(tried) == 2 and weight_T.tolist() == [4.0, 4.0]
    everything = choose_to_try(None, group, RA3Config(use_cpu=True, boundary_selection="random"), NoiseKey(0, 0, 0))
    assert everything[0] == tuple(range(8)) and everything[1].tolist() == [1.0] * 8


def test_a_document_without_boundaries_has_none_to_try():
    document = Document(0, 0, (0, 1, 2), (Action(0, 1, 3),), 1)
    tried, weight_T = choose_to_try(None, trunk(document, [0.0]), RA3Config(use_cpu=True), NoiseKey(0, 0, 0))
    assert tried == () and weight_T.tolist() == []


# ---- blandness ----


class Says:
    """An engine whose lines are likelier by `worth(document, latent)` nats."""

    def __init__(self, worth):
        self.worth = worth

    def score(self, document, boundaries, latents, horizon):
        lines_TGH = torch.tensor([[[self.worth(document, z)] for z in row] for row in latents])
        none = torch.full_like(lines_TGH, -math.inf)
        gates = torch.full((len(document.actions),), 0.1).log()
        gates[2] = math.log(0.9)  # where it thinks most
        empty = torch.zeros(len(document.actions))
        return RolloutGroup(document, tuple(boundaries), tuple(map(tuple, latents)), empty, gates, lines_TGH, none)

    def scores(self, documents, boundaries, latents, horizon):
        return [self.score(*each, horizon) for each in zip(documents, boundaries, latents, strict=True)]


def group_of(engine: Says, doc_id: int, said: list[int]) -> RolloutGroup:
    latents = [[Latent((7,), True)] * len(said), [Latent((token,), True) for token in said]]
    return engine.score(lines(4, doc_id), [0, 2], latents, 1)


def test_a_latent_that_knows_its_document_brings_more_than_anothers():
    """A latent is worth 2 nats where its token is the document's number, else -1: own ones 2 and (2 - 1) / 2, the
    other document's -1 each."""
    engine = Says(lambda document, z: 2.0 if z.token_ids[0] == document.doc_id else -1.0)
    groups = [group_of(engine, 10, [10, 10]), group_of(engine, 11, [11, 12])]
    assert [most_thinking(group) for group in groups] == [1, 1]
    assert gains_over_other(engine, groups, 1.0) == pytest.approx([3.0, 1.5])


def test_a_bland_latent_brings_nothing_over_anothers():
    """The least harmful phrase everywhere: its gain rises and says nothing. With one document there is no other, nor
    is another chunk of the same text one."""
    engine = Says(lambda document, z: -0.5 if z.token_ids == (9,) else -3.0)
    groups = [group_of(engine, 10, [9, 9]), group_of(engine, 11, [9, 9])]
    assert gains_over_other(engine, groups, 1.0) == [0.0, 0.0]
    assert gains_over_other(engine, groups[:1], 1.0) == []
    assert gains_over_other(engine, [groups[0], groups[0]], 1.0) == []
