"""Branch engine against expand engine, and against plain forwards of as many tokens.

Both engines get the same boundaries, the same keyed noise and score the same latents. The expand engine is timed on a
stratified sample of the boundaries and scaled up by the number of branches, which favours it slightly (its cost grows
faster than linearly with the prefix).
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ra3_trl.records import Document, RolloutGroup
from ra3_trl.rollout import Backbone, BranchEngine, ExpandEngine, NoiseKey, SamplingParams
from ra3_trl.segmentation import PYTHON, Segmenter, build_token_table, standard_library

from .common import CLOCKS, default_model, say


_EXPAND_TOKENS = 12_000  # most tokens the expand engine is timed on for one document, more or less
_PLAIN_TOKENS = 2_048  # tokens the plain forward is timed on; `_UPDATE_TOKENS` likewise with backward
_UPDATE_TOKENS = 1_024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: the demo's SmolLM2-135M, converted once)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048], help="document tokens")
    parser.add_argument(
        "--module", default="shutil.py", help="file of the standard library that is cut into documents"
    )
    parser.add_argument("--num_latents", type=int, default=8, help="latents per boundary (G)")
    parser.add_argument("--latent_tokens", type=int, default=12, help="longest latent (K)")
    parser.add_argument("--horizon", type=int, default=1, help="lines scored under a latent (H)")
    parser.add_argument("--max_branch_tokens", type=int, default=8192, help="bound of the rollout")
    parser.add_argument(
        "--update_branch_tokens", type=int, default=2048, help="bound of the packed forward + backward"
    )
    parser.add_argument("--update_length", type=int, default=256, help="document tokens of the update")
    parser.add_argument("--repeats", type=int, default=1, help="interleaved rounds; the best of each side counts")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="`cpu` with `--threads 1` on a shared machine")
    parser.add_argument("--seed", type=int, default=0, help="seed of the keyed noise")


@dataclass
class Bench:
    """What all measurements share."""

    args: argparse.Namespace
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    branch: BranchEngine
    expand: ExpandEngine

    def best_of(self, repeats: int, *functions: Callable[[], object]) -> tuple[list[float], list]:
        """Shortest time of each function, run in turns, and the last results."""
        clock = CLOCKS[self.args.clock]
        times = [float("inf")] * len(functions)
        results: list = [None] * len(functions)
        for _ in range(repeats):
            for i, function in enumerate(functions):
                begin = clock()
                results[i] = function()
                times[i] = min(times[i], clock() - begin)
        return times, results

    @property
    def noise(self) -> NoiseKey:
        return NoiseKey(self.args.seed, 0, 0)

    def rollout(self, engine, document: Document, score: bool = True) -> RolloutGroup:
        return engine.rollout(
            document, document.boundaries, self.args.num_latents, self.args.horizon, self.noise, score=score
        )


def run(args: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    backbone = Backbone(model)
    table = build_token_table(tokenizer, backbone.vocab_size)
    params = SamplingParams(args.latent_tokens)
    engines = [engine(backbone, table, params, args.max_branch_tokens) for engine in (BranchEngine, ExpandEngine)]
    bench = Bench(args, model, tokenizer, *engines)
    say(f"loaded {folder}, {torch.get_num_threads()} threads")
    documents = {length: pick_document(tokenizer, args.module, length) for length in args.lengths}
    columns = {str(length): measure_rollout(bench, document) for length, document in documents.items()}
    result = {key: {n: row[key] for n, row in columns.items()} for key in next(iter(columns.values()))}
    result["max_logprob_diff"] = max(result["max_logprob_diff"].values())
    result |= measure_memory(bench, documents[min(documents)])
    result |= measure_update(bench, pick_document(tokenizer, args.module, args.update_length))
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "clock": args.clock, "seed": args.seed}
    return result | {"benchmark_seconds": round(time.perf_counter() - begin, 1)}


def pick_document(tokenizer: PreTrainedTokenizerBase, module: str, length: int) -> Document:
    """Of the chunks of `module` that are nearly `length` tokens long, the one with the median number of boundaries."""
    text = (standard_library() / module).read_text("utf-8")
    chunks = Segmenter(tokenizer, PYTHON, length)(0, text)
    full = [chunk for chunk in chunks if len(chunk.input_ids) > 0.9 * length and chunk.boundaries]
    if not full:
        raise ValueError(f"`--module` {module!r} has no chunk of about {length} tokens; pass a longer file.")
    middle = statistics.median_low(len(chunk.boundaries) for chunk in full)
    return next(chunk for chunk in full if len(chunk.boundaries) == middle)


def sample_boundaries(document: Document, args: argparse.Namespace) -> Document:
    """`document` with evenly spaced boundaries only, so that the expand engine's work fits the budget."""
    boundaries = document.boundaries
    per_boundary = (2 * args.num_latents + 1) * len(document.input_ids) / 2
    count = max(2, min(len(boundaries), int(_EXPAND_TOKENS / per_boundary)))
    chosen = {boundaries[int((i + 0.5) * len(boundaries) / count)] for i in range(count)}
    actions = (a if i in chosen else replace(a, boundary=None) for i, a in enumerate(document.actions))
    return replace(document, actions=tuple(actions))


@contextmanager
def counted_tokens(bench: Bench) -> Iterator[list[int]]:
    """Number of tokens of each forward inside."""
    counts: list[int] = []
    handle = bench.branch.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield counts
    finally:
        handle.remove()


def measure_rollout(bench: Bench, document: Document) -> dict:
    args, length = bench.args, len(document.input_ids)
    sampled = sample_boundaries(document, args)
    chosen = [document.boundaries.index(boundary) for boundary in sampled.boundaries]
    plain = torch.tensor(document.input_ids).repeat(max(1, _PLAIN_TOKENS // length), 1)

    @torch.no_grad()
    def plain_forward() -> None:
        for row in plain:
            bench.model(input_ids=row[None], use_cache=False)

    with counted_tokens(bench) as counts:
        times, (_, group) = bench.best_of(args.repeats, plain_forward, lambda: bench.rollout(bench.branch, document))
    tokens = sum(counts) // args.repeats - plain.numel()
    say(f"{length} tokens, {len(document.boundaries)} boundaries: branch {times[1]:.1f} s for {tokens} tokens")
    floor = times[0] * tokens / plain.numel()
    latents = [group.latents[i] for i in chosen]
    (generate, score), (drawn, scored) = bench.best_of(
        1,
        lambda: bench.rollout(bench.expand, sampled, score=False),
        lambda: bench.expand.score(sampled, sampled.boundaries, latents, args.horizon),
    )
    # Both calls run the document's own rows; once is enough.
    trunk = bench.best_of(1, lambda: bench.expand.trunk(sampled))[0][0]
    share = len(document.boundaries) / len(chosen)
    expand = (generate + score - trunk) * share
    say(f"{length} tokens: expand {generate + score - trunk:.1f} s for {len(chosen)} boundaries; floor {floor:.1f} s")
    pairs = [(a, b) for x, y in zip(latents, drawn.latents, strict=True) for a, b in zip(x, y, strict=True)]
    same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    differences = [
        group.line_logps_A - scored.line_logps_A,
        (group.gate_logps_A - scored.gate_logps_A)[list(sampled.boundaries)],
        group.latent_line_logps_TGH[chosen] - scored.latent_line_logps_TGH,
        (group.latent_gate_logps_TGH[chosen] - scored.latent_gate_logps_TGH)[..., 0],
        torch.tensor([p - q for a, b in same for p, q in zip(a.logps, b.logps, strict=True)]),
    ]
    return {
        "speedup": round(expand / times[1], 2),
        "max_logprob_diff": float(f"{max(float(d.abs().max()) for d in differences):.2e}"),
        "floor_ratio": round(times[1] / floor, 3),
        "branch_seconds": round(times[1], 2),
        "expand_seconds_scaled": round(expand, 1),
        "document_tokens": length,
        "boundaries": len(document.boundaries),
        "branches": len(document.boundaries) * args.num_latents,
        "branch_engine_tokens": tokens,
        "expand_sampled_branches": len(chosen) * args.num_latents,
        "latents_drawn_alike": round(len(same) / len(pairs), 3),
    }


class PeakMemory:
    """Largest resident memory of this process while inside, in MB, read every few milliseconds."""

    def __enter__(self) -> PeakMemory:
        self._process, self._done = psutil.Process(), threading.Event()
        self.before = self.peak = self._process.memory_info().rss / 2**20
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss / 2**20)

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()


def measure_memory(bench: Bench, document: Document) -> dict:
    """Peak of a rollout, and what it takes beyond the model, for bounds on the branches in flight."""
    bound, above = bench.branch.max_branch_tokens, {}
    bench.branch.trunk(document)  # touches the weights, which are mapped from the file
    for tokens in (bound // 16, bound // 8, bound):
        bench.branch.max_branch_tokens = tokens
        with PeakMemory() as memory:
            bench.rollout(bench.branch, document)
        above[str(tokens)] = round(memory.peak - memory.before)
    return {"peak_mb": round(memory.peak), "rollout_mb_by_max_branch_tokens": above}


def measure_update(bench: Bench, document: Document) -> dict:
    """The E-step's gradient over all latents of a document, against next-token training on as many tokens."""
    args, length = bench.args, len(document.input_ids)
    group = bench.rollout(bench.branch, document, score=False)
    rows = torch.tensor(document.input_ids).repeat(max(1, _UPDATE_TOKENS // length), 1)
    bound = bench.branch.max_branch_tokens
    bench.branch.max_branch_tokens = args.update_branch_tokens

    def update() -> None:
        for part in bench.branch.split(group):
            policy = bench.branch.log_probs(group, part)
            (policy.gate_T.sum() + policy.token_n.sum()).backward()
        bench.model.zero_grad()

    def plain() -> None:
        logits = bench.model(input_ids=rows, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()).backward()
        bench.model.zero_grad()

    with counted_tokens(bench) as counts, PeakMemory() as memory:
        times, _ = bench.best_of(max(2, args.repeats), plain, update)
    bench.branch.max_branch_tokens = bound
    tokens = sum(counts) // max(2, args.repeats) - rows.numel()
    say(f"update: {times[1]:.1f} s for {tokens} tokens, plain {times[0]:.1f} s for {rows.numel()}")
    return {
        "update_ratio": round(times[1] / (times[0] * tokens / rows.numel()), 3),
        "updates_per_s": round(1 / times[1], 4),
        "update_tokens": tokens,
        "update_branches": len(group.boundaries) * args.num_latents,
        "update_peak_mb": round(memory.peak),
    }
