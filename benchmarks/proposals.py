"""What latents are worth by where they come from: the policy, or a prompt that holds the lines they explain.

On functions of the standard library, one boundary each: gain of a latent in nats of its line, its log-prob under the
policy, what is left of the gain once that is paid, and how tight a bound many of them give.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from datasets import Dataset

from ra3_trl import Policy, load_code_directory
from ra3_trl.analysis import Estimate
from ra3_trl.experimental.hindsight import attach
from ra3_trl.experimental.hindsight.proposals import prior_logps
from ra3_trl.losses import compute_returns, log1mexp
from ra3_trl.records import Document, RolloutGroup
from ra3_trl.rollout import NoiseKey
from ra3_trl.segmentation import row_to_document, segment_dataset

from .common import default_model, no_warnings, say


NOISE = NoiseKey(seed=0, phase=0, step=0)
PAYS = 0.5  # nats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--proposals", nargs="+", default=["causal", "chat", "causal+chat"], help="as in its config")
    parser.add_argument("--functions", type=int, default=24, help="functions, one boundary each")
    parser.add_argument("--latents", type=int, default=6, help="latents at each boundary, of each proposal")
    parser.add_argument("--lines", type=int, default=4, help="next lines that a proposal in hindsight knows")
    parser.add_argument("--max_length", type=int, default=256, help="longest function, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of functions")


def one_boundary(document: Document) -> tuple[int, ...]:
    """The middle boundary."""
    return (document.boundaries[len(document.boundaries) // 2],) if document.boundaries else ()


def bound(group: RolloutGroup, think: float) -> float:
    """Multi-sample bound on the log-probability of the line, thinking with probability `think`, over that without."""
    returns = compute_returns(group, 1, 1.0)
    log_think = torch.tensor(math.log(think))
    latent_T = torch.logsumexp(returns.latent_TG, 1) - math.log(returns.latent_TG.shape[1])
    return float(torch.logaddexp(log1mexp(log_think) + returns.act_T, log_think + latent_T) - returns.act_T)


def of_group(group: RolloutGroup, log_prior: float) -> dict[str, float]:
    """What a boundary's latents are worth."""
    weighed = compute_returns(group, 1, 1.0).gain_TG[0]
    gain = compute_returns(replace(group, log_ratio_TG=None), 1, 1.0).gain_TG[0]
    weights = torch.cat([torch.zeros(1), weighed - math.log(len(weighed))]).double().softmax(0)
    return {
        "gain": float(gain.mean()),
        "best_gain": float(gain.max()),
        "one_pays": float(gain.max() > PAYS),
        "log_prior": log_prior,
        "elbo_gain": float(weighed.mean()),
        "effective_size": float(1 / weights.square().sum()),
        "kept_at_a_half": float(1 - weights[0]),
        "bound": bound(group, 0.5),
        "latent_tokens": sum(len(z.token_ids) for z in group.latents[0]) / len(weighed),
    }


def choose(policy: Policy, data: Dataset, count: int) -> list[Document]:
    """Whole functions of at least four boundaries, as the data's order has them."""
    seen: dict[int, list[Document]] = {}
    for document in map(row_to_document, segment_dataset(data, policy.segmenter, policy.args.dataset_text_field)):
        seen.setdefault(document.doc_id, []).append(document)
    whole = [chunks[0] for chunks in seen.values() if len(chunks) == 1 and len(chunks[0].boundaries) >= 4]
    return whole[:count]


@no_warnings()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """One row a measure, over proposals, with intervals over functions; texts of the latents."""
    policy = Policy.open(
        args.model or default_model(), num_latents=args.latents, eval_num_latents=args.latents, horizon=1,
        max_length=args.max_length, max_latent_length=12, existing_comments="strip", use_cpu=True,
    )  # fmt: skip
    data = load_code_directory().shuffle(seed=args.seed)
    data = data.select(range(min(20 * args.functions, len(data))))
    documents = choose(policy, data, args.functions)
    rows: dict[str, dict[str, list[float]]] = {}
    texts: list[dict[str, Any]] = [{} for _ in documents]
    seconds: dict[str, float] = {}
    for name in args.proposals:
        proposing = attach(policy, proposal=name, proposal_lines=args.lines)
        for i, document in enumerate(documents):
            begin = time.process_time()
            (group,) = proposing.propose([document], [one_boundary(document)], args.latents, NOISE)
            seconds[name] = seconds.get(name, 0.0) + (time.process_time() - begin) / len(documents)
            log_prior = float(prior_logps(policy.engine, document, group.boundaries, group.latents).mean())
            for key, value in of_group(group, log_prior).items():
                rows.setdefault(key, {}).setdefault(name, []).append(value)
            texts[i] |= as_texts(policy, group, name)
        say(f"{name}: " + ", ".join(f"{key} {sum(row[name]) / len(row[name]):.3g}" for key, row in rows.items()))
    return {"functions": len(texts), "seconds": seconds, **estimates(rows), "texts": texts}


def estimates(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each measure over proposals, and over differences to the first one, paired by function."""
    found = {key: {name: asdict(Estimate.of(values)) for name, values in row.items()} for key, row in rows.items()}
    for key, row in rows.items():
        first, *others = row
        for name in others:
            less = [a - b for a, b in zip(row[name], row[first], strict=True)]
            found[key][f"{name} less {first}"] = asdict(Estimate.of(less))
    return found


def as_texts(policy: Policy, group: RolloutGroup, name: str) -> dict[str, Any]:
    """The line, and each latent with its gain and what is left of it."""
    decode = policy.tokenizer.decode
    action = group.document.actions[group.boundaries[0]]
    weighed = compute_returns(group, 1, 1.0).gain_TG[0].tolist()
    gain = compute_returns(replace(group, log_ratio_TG=None), 1, 1.0).gain_TG[0].tolist()
    latents = [
        {"text": decode(list(z.token_ids)), "gain": round(g, 2), "elbo_gain": round(w, 2)}
        for z, g, w in zip(group.latents[0], gain, weighed, strict=True)
    ]
    return {"line": decode(list(group.document.input_ids[action.start : action.end])), name: latents}
