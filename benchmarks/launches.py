"""What the engine asks of an accelerator, counted on the CPU: launches, waits, tokens a forward, bytes of logits.

A random Qwen2-like model is put on a pretended device (`launches_device.py`) and rolls out, scores, learns, annotates
and evaluates. Counts do not depend on the machine. What is compared by CPU time is run on the CPU, both sides in turn.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ra3_trl import RA3Config
from ra3_trl.em.mstep import mstep_loss, pack
from ra3_trl.policy import Policy, evaluate_documents
from ra3_trl.policy.annotate import _choose_by_resampling as choose_by_resampling
from ra3_trl.policy.annotate import annotate_all
from ra3_trl.records import AnnotatedExample, Document, Latent, RolloutGroup
from ra3_trl.rollout import Backbone, BranchEngine, NoiseKey, SamplingParams
from ra3_trl.rollout import branch as branch_module
from ra3_trl.segmentation import PYTHON, Segmenter, build_token_table, splice, standard_library

from .common import say
from .launches_device import Counts, Watch, to_device
from .launches_logits import bytes_per_logit
from .launches_memory import peak_of_an_update


NOISE = NoiseKey(0, 0, 0)
_END = "<|end|>"
_FREQUENT = 0.2  # spread of random weights under which latents differ so much that many are placed
PARTS = ("rollout", "update", "annotation", "evaluation", "mstep", "memory", "cpu")
HALVES = ("rollout_cpu", "annotation_cpu")  # of `cpu`, which takes longest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *HALVES], default=list(PARTS), help="what to measure")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--head_size", type=int, default=4, help="of 14 query and 2 key heads")
    parser.add_argument("--vocab_size", type=int, default=2048, help="of a tokenizer that is trained on the spot")
    parser.add_argument("--module", default="shutil.py", help="file of the standard library that documents come from")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a document, nearly")
    parser.add_argument("--num_latents", type=int, default=8, help="latents per boundary (G)")
    parser.add_argument("--latent_tokens", type=int, default=16, help="longest latent (K)")
    parser.add_argument("--top_k", type=int, default=0, help="symbols kept in sampling; 0 is all")
    parser.add_argument("--top_p", type=float, default=1.0, help="mass kept in sampling; 1 is all")
    parser.add_argument("--horizon", type=int, default=2, help="lines scored under a latent (H)")
    parser.add_argument("--max_branch_tokens", type=int, default=8192)
    parser.add_argument("--annotated", type=int, default=2, help="documents of the annotation and the evaluation")


def run(args: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    bench = Bench(args)
    say(f"{len(bench.documents)} documents of {sum(len(d.input_ids) for d in bench.documents)} tokens, "
        f"{sum(len(d.boundaries) for d in bench.documents)} boundaries")  # fmt: skip
    result: dict[str, Any] = {}
    groups: list[RolloutGroup] = []
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "rollout": lambda: count_rollout(bench, groups),
        "update": lambda: count_update(bench, groups),
        "annotation": lambda: count_annotation(bench),
        "evaluation": lambda: count_evaluation(bench),
        "mstep": lambda: count_mstep(bench),
        "memory": lambda: peak_of_an_update(bench.tokenizer, bench.documents[0]),
        "cpu": lambda: compare_rollouts(bench) | compare_annotation(bench),
        "rollout_cpu": lambda: compare_rollouts(bench),
        "annotation_cpu": lambda: compare_annotation(bench),
    }
    for part in args.parts:
        if part == "update" and not groups:
            count_rollout(bench, groups)
        since = time.perf_counter()
        result |= measures[part]()
        say(f"{part}: {time.perf_counter() - since:.0f} s")
    result["phases"] = {name: summary(counts) for name, counts in bench.counted.items()}
    result["bytes_per_logit"] = bytes_per_logit(bench.tokenizer, args.latent_tokens)
    result["mixes"] = sum(watch.mixes.total() for watch in bench.watches)
    return result | {"benchmark_seconds": round(time.perf_counter() - begin, 1)}


class Bench:
    """A random model twice, on the CPU and on the pretended device, and documents."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = train_tokenizer(args.vocab_size, args.module)
        self.documents = pick_documents(self.tokenizer, args)
        self.host = make_model(args, len(self.tokenizer))
        self.device = copy.deepcopy(self.host)
        to_device(self.device)
        self.counted: dict[str, Counts] = {}
        self.watches: list[Watch] = []

    def engine(self, model: PreTrainedModel, max_length: int = 0) -> BranchEngine:
        args = self.args
        table = build_token_table(self.tokenizer, len(self.tokenizer))
        params = SamplingParams(max_length or args.latent_tokens, 1.0, args.top_k, args.top_p)
        with Watch(0).watching():  # or the table would not get to the pretended device
            return BranchEngine(Backbone(model), table, params, args.max_branch_tokens)

    def policy(self, model: PreTrainedModel) -> Policy:
        """Annotates and evaluates by the package's defaults."""
        config = RA3Config(use_cpu=True, report_to="none", max_length=4 * self.args.tokens, e_steps=0)
        return Policy(self.engine(model, config.max_latent_length), config)

    @contextmanager
    def watching(self, name: str) -> Iterator[Watch]:
        """Counts what runs inside by phase; what is in none counts for `name`."""
        watch = Watch(len(self.tokenizer))
        self.watches.append(watch)
        with phases_of_the_engine(watch), watch.watching(), watch.phase(name):
            yield watch

    def keep(self, watch: Watch, name: str = "") -> None:
        """Keeps the phases of a watch, or all of them as one phase `name`."""
        for phase, counts in watch.by_phase.items():
            self.counted.setdefault(name or phase, Counts()).__iadd__(counts)


def train_tokenizer(vocab_size: int, module: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary of `module` and a few files more."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    files = (module, "textwrap.py", "contextlib.py", "argparse.py", "pathlib.py", "tarfile.py")
    paths = [Path(standard_library(), name) for name in files]
    tokenizer.train_from_iterator([path.read_text("utf-8") for path in paths if path.is_file()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def pick_documents(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> list[Document]:
    text = (standard_library() / args.module).read_text("utf-8")
    chunks = Segmenter(tokenizer, PYTHON, args.tokens, "strip")(0, text)
    full = [chunk for chunk in chunks if len(chunk.input_ids) > 0.9 * args.tokens and chunk.boundaries]
    if len(full) < args.documents:
        raise ValueError(
            f"`--documents` is {args.documents}, but {args.module!r} has {len(full)} chunks of {args.tokens} tokens; "
            "pass a longer `--module`."
        )
    return full[: args.documents]


def make_model(args: argparse.Namespace, vocab_size: int, spread: float = 0.02) -> PreTrainedModel:
    hidden = 14 * args.head_size
    config = AutoConfig.for_model(
        "qwen2", hidden_size=hidden, num_hidden_layers=args.layers, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=5 * hidden, vocab_size=vocab_size, max_position_embeddings=4 * args.tokens,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True, initializer_range=spread,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@contextmanager
def phases_of_the_engine(watch: Watch) -> Iterator[None]:
    """Tells the watch which of a rollout's phases runs."""

    def within(owner: Any, method: str, phase: Callable[[], str | None]) -> Any:
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            name = phase()
            if name is None:
                return original(*args, **kwargs)
            with watch.phase(name):
                return original(*args, **kwargs)

        return patch.object(owner, method, wrapped)

    hidden = Backbone.hidden

    def counted(self: Backbone, through: Any = None, **inputs: Any) -> torch.Tensor:
        if watch.current == "decode":
            watch.step += 1
        with watch.forward(inputs["input_ids"].numel(), getattr(inputs.get("ra3"), "_wide", 0)):
            return hidden(self, through, **inputs)

    flight = branch_module._Flight
    with (
        within(BranchEngine, "_run", lambda: "trunk"),
        within(flight, "_open", lambda: "open"),
        within(flight, "sample", lambda: "decode"),
        within(flight, "score", lambda: "score"),
        within(Backbone, "chunked", lambda: "draw" if watch.current == "decode" else None),
        patch.object(Backbone, "hidden", counted),
    ):
        yield


def summary(counts: Counts) -> dict[str, Any]:
    tokens = sum(counts.forwards)
    return {
        "launches": counts.launches,
        "syncs": len(counts.waits),
        "forwards": len(counts.forwards),
        "tokens": tokens,
        "tokens_per_forward": round(tokens / max(len(counts.forwards), 1)),
        "vocabulary_mb": round(counts.vocabulary_bytes / 1e6, 1),
    }


def waits_per_step(waits: Sequence[tuple[str, int]], steps: int) -> float:
    """Waits between two decoding steps: those behind the first forward of a rollout and before the last."""
    between = [step for _, step in waits if 0 < step < steps]
    return len(between) / max(steps - 1, 1)


def count_rollout(bench: Bench, groups: list[RolloutGroup]) -> dict[str, Any]:
    args, engine = bench.args, bench.engine(bench.device)
    with bench.watching("other") as watch:
        where = [document.boundaries for document in bench.documents]
        groups[:] = engine.rollouts(bench.documents, where, args.num_latents, args.horizon, NOISE)
    bench.keep(watch)
    decode, draw = watch.by_phase["decode"], watch.by_phase["draw"]
    steps, waits = len(decode.forwards), [*decode.waits, *draw.waits]
    return {
        "syncs_per_rollout": sum(len(counts.waits) for counts in watch.by_phase.values()),
        "syncs_per_decode_step": round(waits_per_step(waits, steps), 3),
        "launches_per_decode_forward": round(decode.launches / steps),
        "launches_per_decode_token": round((decode.launches + draw.launches) / sum(decode.forwards), 3),
        "decode_forwards_per_update": steps,
        "decode_tokens_per_forward": round(sum(decode.forwards) / steps),
        "decode_shapes": sum(phase == "decode" for phase, _, _ in watch.shapes),
        "graph_breaks": count_graph_breaks(bench),
        "mixes": watch.mixes.total(),
    }


def count_graph_breaks(bench: Bench) -> int:
    """Breaks that `torch.compile` makes in a decoding step, on the CPU and a part of the documents."""
    engine, kept = bench.engine(bench.host), list[dict[str, Any]]()
    handle = engine.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs), with_kwargs=True
    )
    engine.rollouts(bench.documents[:1], [bench.documents[0].boundaries[:2]], 2, 1, NOISE, score=False)
    handle.remove()
    with torch.no_grad(), engine.gradients():
        explained = torch._dynamo.explain(engine.backbone.decoder)(**kept[-1])
    return explained.graph_break_count


def count_update(bench: Bench, groups: list[RolloutGroup]) -> dict[str, Any]:
    """The reference pass and the pass with gradients, forward by forward as the trainer's."""
    engine = bench.engine(bench.device)
    pieces = [(group, part) for group in groups for part in engine.split(group)]
    joined = engine.join(pieces)
    part = max(joined, key=lambda part: part.stop - part.start)  # one forward stands for all
    with bench.watching("reference") as watch, torch.no_grad():
        engine.packed_log_probs(pieces[part])
    bench.keep(watch)
    with bench.watching("update") as watch, engine.gradients():
        logps = engine.packed_log_probs(pieces[part])
        forward = watch.by_phase["update"].logits  # the backward pass may make them anew
        sum(one.gate_T.sum() + one.token_n.sum() for one in logps).backward()
        watch.by_phase["update"].logits = forward
    bench.keep(watch)
    update = watch.by_phase["update"]
    return {
        "packed_forwards_per_update": len(joined),
        "launches_per_piece": update.launches,
        "mask_mb": round(sum(watch.masks["update"].values()) / 1e6, 1),
    }


def count_annotation(bench: Bench) -> dict[str, Any]:
    """By the model of [`compare_annotation`] that places many latents, each of which changes the text behind it."""
    documents = bench.documents[: bench.args.annotated]
    model = make_model(bench.args, len(bench.tokenizer), spread=_FREQUENT)
    to_device(model)
    policy = bench.policy(model)
    with bench.watching("other") as watch, policy.inference():
        examples = annotate_all(policy, documents, NOISE)
    bench.keep(watch, "annotation")
    trunk, clean = sum(watch.by_phase["trunk"].forwards), sum(len(d.input_ids) for d in documents)
    return {
        "annotation_trunk_ratio": round(trunk / clean, 2),
        "annotation_placed_rate": round(
            sum(len(e.placed) for e in examples) / sum(len(d.boundaries) for d in documents), 2
        ),
        "annotation_length_ratio": round(sum(len(e.input_ids) for e in examples) / clean, 2),
    }


def count_evaluation(bench: Bench) -> dict[str, Any]:
    policy = bench.policy(bench.device)
    with bench.watching("other") as watch, policy.inference():
        evaluate_documents(policy, bench.documents[: bench.args.annotated])
    bench.keep(watch, "evaluation")
    return {}


def count_mstep(bench: Bench) -> dict[str, Any]:
    """Next-token training on the documents as they stand, in one row each."""
    examples: list[AnnotatedExample] = [splice(document, {}) for document in bench.documents[:1]]
    rows = pack(examples, bench.args.tokens, packing=True)
    with bench.watching("M-step") as watch:
        loss = mstep_loss(Backbone(bench.device), rows, float(rows.num_tokens))[0]
        loss.backward()
    bench.keep(watch)
    return {}


def compare_rollouts(bench: Bench) -> dict[str, Any]:
    """Documents together against one after the other, on the CPU: the same latents, in which CPU time."""
    args, engine = bench.args, bench.engine(bench.host)
    where = [document.boundaries for document in bench.documents]

    def rollouts(part: slice) -> list[RolloutGroup]:
        return engine.rollouts(bench.documents[part], where[part], args.num_latents, args.horizon, NOISE)

    pairs, seconds = in_turn(args.documents, rollouts, rollouts)
    latents = [(z.token_ids, y.token_ids) for a, b in pairs for r, s in zip(a.latents, b.latents, strict=True)
               for z, y in zip(r, s, strict=True)]  # fmt: skip
    return {
        "alike": round(sum(z == y for z, y in latents) / len(latents), 4),
        "cpu_ratio": round(seconds[0] / seconds[1], 3),
        "rollout_cpu_seconds": round(seconds[0], 1),
    }


def compare_annotation(bench: Bench) -> dict[str, Any]:
    """Annotation against [`annotate_anew`] on the CPU, under a model of its own, with weights so large that latents
    differ in what they bring and many are placed."""
    policy = bench.policy(make_model(bench.args, len(bench.tokenizer), spread=_FREQUENT))
    documents = bench.documents[: bench.args.annotated]
    with policy.inference():
        examples, seconds = in_turn(
            len(documents),
            lambda part: annotate_all(policy, documents[part], NOISE),
            lambda part: [annotate_anew(policy, document) for document in documents[part]],
        )
    return {
        "annotation_speedup": round(seconds[1] / seconds[0], 3),
        "annotation_cpu_seconds": round(seconds[0], 1),
        "annotation_alike": sum(one.input_ids == other.input_ids for one, other in examples) / len(examples),
        "annotation_placed": sum(len(one.placed) for one, _ in examples),
    }


def in_turn(
    count: int, together: Callable[[slice], list], each: Callable[[slice], list]
) -> tuple[list[tuple[Any, Any]], tuple[float, float]]:
    """Does `count` things together and one by one; pairs of what came out, and CPU seconds of both sides."""
    seconds, found = [], []
    for function, parts in ((together, [slice(0, count)]), (each, [slice(i, i + 1) for i in range(count)])):
        begin = time.process_time()
        found.append([one for part in parts for one in function(part)])
        seconds.append(time.process_time() - begin)
    return list(zip(*found, strict=True)), (seconds[0], seconds[1])


def annotate_anew(policy: Policy, document: Document) -> AnnotatedExample:
    """Annotates as it was before anything was remembered: the whole text so far, for each eight boundaries."""
    placed: dict[int, Latent] = {}
    left = list(document.boundaries)
    while left:
        (choice,) = choose_by_resampling(policy, [splice(document, placed).document], [left[:8]], NOISE)
        last = next(iter(choice.placed), left[:8][-1])
        placed |= choice.up_to(last).placed
        left = [boundary for boundary in left if boundary > last]
    return splice(document, placed)
