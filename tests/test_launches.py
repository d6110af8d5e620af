"""What the engine asks of an accelerator: the counter itself, and ceilings on a small configuration."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.launches import NOISE, Bench, add_arguments, count_rollout, count_update
from benchmarks.launches_device import DEVICE, DeviceTensor, Watch, to_device
from ra3_trl.segmentation import splice


SMALL = [
    "--layers", "2", "--documents", "2", "--tokens", "128", "--num_latents", "2", "--latent_tokens", "4",
    "--vocab_size", "512", "--annotated", "2",
]  # fmt: skip


@pytest.fixture
def x() -> DeviceTensor:
    return DeviceTensor(torch.tensor([3.0, -1.0, 2.0]))


def waits(watch: Watch) -> list[str]:
    return [why for counts in watch.by_phase.values() for why, _ in counts.waits]


@pytest.mark.parametrize(
    "ask, why",
    [
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "to host"),
        (lambda x: x.cpu(), "to host"),
        (lambda x: torch.as_tensor([1, 2], device=DEVICE), "to device"),
        (lambda x: torch.arange(3).to(DEVICE), "to device"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: x[[0, 2]], "host index"),
        (lambda x: x[torch.tensor([1])], "host index"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: torch.unique_consecutive(x), "unique_consecutive"),
        (lambda x: x.repeat_interleave(x.long().clamp(min=0)), "repeat_interleave"),
    ],
)
def test_every_wait_is_counted(x, ask, why):
    with Watch(0).watching() as watch:
        ask(x)
    assert waits(watch) == [why]


def test_what_does_not_wait_is_not_counted(x):
    with Watch(0).watching() as watch:
        y = torch.arange(3, device=DEVICE) + x.cumsum(0)
        y[1:] = 0.0
        x.index_select(0, torch.argsort(x)).repeat_interleave(2)
        y.to("cpu", non_blocking=True)
        torch.arange(3).tolist()
    assert waits(watch) == [] and not watch.mixes


def test_launches_are_operations_that_are_no_views(x):
    """By hand: a matrix product, an addition, a copy of the transposed view."""
    with Watch(0).watching() as watch:
        m = DeviceTensor(torch.ones(3, 3))
        (m @ m + x).view(9)[2:].reshape(1, 7)
        m.T.contiguous()
    assert watch.counts.launches == 3


def test_a_planted_mix_of_host_and_device_is_caught(x):
    with Watch(0).watching() as watch:
        x + torch.ones(())  # a number of the host is no mix
        x * torch.ones(3)
    assert dict(watch.mixes) == {"mul": 1}


def test_the_pretended_device_computes_what_the_cpu_does():
    torch.manual_seed(0)
    host = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    rows = torch.randn(2, 5, 8)
    host(rows).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in host.named_parameters()}
    host.zero_grad(set_to_none=True)
    to_device(host)
    with Watch(0).watching() as watch:
        host(rows.to(DEVICE)).square().sum().backward()
    assert not watch.mixes and watch.counts.launches > 20
    for name, parameter in host.named_parameters():
        torch.testing.assert_close(parameter.grad.held, wanted[name])


@pytest.fixture(scope="module")
def found() -> dict:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["launches", "--json", *SMALL])
    return json.loads(out.getvalue())


def test_every_figure_is_there(found):
    assert found["mixes"] == 0
    for name in ("syncs_per_rollout", "syncs_per_decode_step", "launches_per_decode_forward", "launches_per_piece",
                 "launches_per_decode_token", "decode_forwards_per_update", "alike", "cpu_ratio", "mask_mb",
                 "annotation_trunk_ratio", "annotation_speedup", "decode_shapes", "graph_breaks",
                 "update_peak_mb"):  # fmt: skip
        assert found[name] >= 0, name
    moved = found["bytes_per_logit"]
    assert set(moved) == {"draw", "no_grad", "grad"}
    # Written and read once by a product, a normaliser and what picks, in four bytes; with gradients made twice.
    assert moved["draw"] <= 16 and moved["no_grad"] <= 12 and moved["grad"] <= 40
    # Embeddings that are the head: at the end there are both gradients and (the counter keeps PyTorch from adding in
    # place) their sum, 49,152 x 576 x 4 bytes = 113 MB each, with few layers whatever the log-probs are made by.
    assert 3 * 113 < found["update_peak_mb"] < found["update_peak_by_autograd_mb"]
    phases = ("trunk", "open", "decode", "draw", "score", "reference", "update", "annotation", "evaluation", "M-step")
    assert all(found["phases"][phase]["launches"] > 0 for phase in phases)


def bench(*words: str) -> Bench:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Bench(parser.parse_args([*SMALL, *words]))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("truncation", [[], ["--top_p", "0.6"]], ids=["all", "top_p"])
def test_draws_know_a_deterministic_way(truncation, deterministic):
    """As on CUDA the pretended device refuses floats' cumulative sums then; the latents are those of the CPU."""
    with Watch(0).watching(), pytest.raises(RuntimeError, match="cumsum_cuda_kernel"):
        DeviceTensor(torch.ones(3)).cumsum(0)
    small = bench(*truncation, "--documents", "1")
    where = [small.documents[0].boundaries]
    with small.watching("other"):
        (one,) = small.engine(small.device).rollouts(small.documents, where, 2, 2, NOISE, score=False)
    (other,) = small.engine(small.host).rollouts(small.documents, where, 2, 2, NOISE, score=False)
    for z, y in zip(sum(one.latents, ()), sum(other.latents, ()), strict=True):
        assert (z.token_ids, z.stopped) == (y.token_ids, y.stopped)


@pytest.mark.parametrize("truncation", [[], ["--top_p", "0.6"], ["--top_k", "5"]], ids=["all", "top_p", "top_k"])
def test_a_rollout_does_not_wait(truncation):
    """Documents and their side runs take one copy there and one back; think prefixes, noise and the rows of sampling a
    copy each, what was drawn one back (truncation sets one more); scores one there and one back."""
    small, groups = bench(*truncation), []
    found = count_rollout(small, groups)
    assert found["syncs_per_rollout"] == 8 + bool(truncation) and found["syncs_per_decode_step"] == 0
    assert found["mixes"] == 0
    # 3 tokens of a latent of 4 are run, whatever the number of documents, in one shape.
    assert found["decode_forwards_per_update"] == 3 and found["decode_shapes"] == 1
    # On the pretended device, where a branch that has stopped stays in its row, the latents are those of the CPU.
    host = small.engine(small.host)
    where = [document.boundaries for document in small.documents]
    wanted = host.rollouts(small.documents, where, 2, 2, NOISE)
    for one, other in zip(groups, wanted, strict=True):
        for z, y in zip(sum(one.latents, ()), sum(other.latents, ()), strict=True):
            assert (z.token_ids, z.stopped) == (y.token_ids, y.stopped)
            assert z.logps == pytest.approx(y.logps, abs=1e-4)
            assert (z.kept is None) == (y.kept is None) == (not truncation)
            assert all(torch.equal(a, b) for a, b in zip(z.kept or (), y.kept or (), strict=True))
        torch.testing.assert_close(one.latent_line_logps_TGH, other.latent_line_logps_TGH, atol=1e-3, rtol=0)


def test_launches_are_as_many_for_many_branches_as_for_few(found):
    """By the difference of three layers to two: of a decoding step at most 1,200 for 24 layers, 50 a layer; of a
    packed forward and backward pass at most 3,500, so 130 a layer, with room for what comes behind the layers."""
    alone, many = bench("--documents", "1"), bench("--documents", "2", "--num_latents", "5")
    deeper, groups = bench("--layers", "3"), []
    alone, together, three = (
        count_rollout(one, kept)["launches_per_decode_forward"]
        for one, kept in ((alone, []), (many, []), (deeper, groups))
    )
    assert alone == together
    assert 30 < three - alone <= 50
    packed = count_update(deeper, groups)
    assert 90 < packed["launches_per_piece"] - found["launches_per_piece"] <= 130
    # The row of documents and branches, who stands where in it (10 numbers of 8 bytes a token, in a bucket), and less
    # than a number of 4 bytes for each pair of blocks: no mask of tokens by tokens.
    assert packed["mask_mb"] <= 0.1


def test_rounds_of_annotation_launch_as_much_for_several_documents():
    """Two windows, the second of texts in which a latent of the first was placed, so that what was run goes on from
    what was scored: the same operations for one document and for three, and the same numbers as on the CPU."""
    small = bench("--documents", "1")
    counts = []
    for number in (1, 3):
        documents = [replace(small.documents[0], doc_id=i) for i in range(number)]
        found = []
        for model in (small.device, small.host):
            engine = small.engine(model)
            with small.watching("other") as watch, engine.remembering():
                first = engine.rollouts(documents, [d.boundaries[:2] for d in documents], 2, 2, NOISE)
                texts = [splice(d, {g.boundaries[1]: g.latents[1][0]}).document
                         for d, g in zip(documents, first, strict=True)]  # fmt: skip
                found.append(engine.rollouts(texts, [d.boundaries[2:4] for d in texts], 2, 2, NOISE))
                if model is small.device:
                    counts.append(sum(of_phase.launches for of_phase in watch.by_phase.values()))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one.line_logps_A, other.line_logps_A, atol=1e-3, rtol=0)
            torch.testing.assert_close(one.latent_line_logps_TGH, other.latent_line_logps_TGH, atol=1e-3, rtol=0)
    assert counts[0] == counts[1] > 100


def test_together_as_one_by_one(found):
    assert found["alike"] >= 0.97 and found["annotation_alike"] == 1.0


def test_a_decoding_step_compiles_whole(found):
    assert found["graph_breaks"] == 0
