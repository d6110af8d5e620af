"""The E-step's update against TRL's `GRPOTrainer` with the same boundaries as prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from ra3_trl import RA3MidTrainer
from ra3_trl.records import Document, TokenTable

from .common import LONG_PHASE, SHARED, load, make_ra3, median_chunk, opening, say, scratch, timed


class LineReward:
    """Log-likelihood of the expert's line after the latent, under a copy of the model of its own.

    One right-padded forward for all completions, and logits only where the line is predicted.
    """

    __name__ = "line_reward"

    def __init__(self, folder: str, stop_ids: set[int]):
        self.model = load(folder)[0].eval()
        self.stop_ids = stop_ids

    @torch.no_grad()
    def __call__(self, completion_ids, prefix_ids, close_ids, line_ids, **kwargs) -> list[float]:
        latents = [[t for t in ids if t not in self.stop_ids] for ids in completion_ids]
        heads = [[*p, *z, *c] for p, z, c in zip(prefix_ids, latents, close_ids, strict=True)]
        rows = [torch.tensor([*head, *line]) for head, line in zip(heads, line_ids, strict=True)]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        at = [(i, len(h) - 1 + j) for i, h in enumerate(heads) for j in range(len(line_ids[i]))]
        row, column = torch.tensor(at).T
        logps = self.model.get_output_embeddings()(hidden[row, column]).float().log_softmax(-1)
        logps = logps.gather(-1, ids[row, column + 1][:, None])[:, 0]
        return torch.zeros(len(rows)).index_add(0, row, logps).tolist()


def stop_ids(table: TokenTable, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a latent: those that hold a newline, and the end of the text."""
    return sorted({*table.stop_ids.tolist(), tokenizer.eos_token_id})


def sample_boundaries(document: Document, count: int) -> list[int]:
    """`count` of the boundaries by pairs of neighbours (which pad well together), the pairs evenly spaced."""
    boundaries = document.boundaries
    count = min(count, len(boundaries)) // 2 * 2 or 1
    if count == 1:
        return [boundaries[len(boundaries) // 2]]
    pairs = count // 2
    firsts = [min(int((i + 0.5) * len(boundaries) / pairs - 0.5), len(boundaries) - 2) for i in range(pairs)]
    return sorted({boundaries[at + step] for at in firsts for step in (0, 1)})


def grpo_rows(tokenizer: PreTrainedTokenizerBase, document: Document, boundaries: list[int]) -> list[dict]:
    rows = []
    for boundary in boundaries:
        action = document.actions[boundary]
        prefix = [*document.input_ids[: action.start], *action.boundary.think]
        rows.append(
            {
                "prompt": tokenizer.decode(prefix, clean_up_tokenization_spaces=False),
                "prefix_ids": prefix,
                "close_ids": list(action.boundary.close),
                "line_ids": list(document.input_ids[action.start : action.end]),
            }
        )
    return rows


def make_grpo(folder: str, out: Path, rows: list[dict], batch: int, stops: list[int], args, kl_coef) -> GRPOTrainer:
    """One optimizer step for half of the rows (the other half is the warm-up), `batch` boundaries at a time."""
    model, tokenizer = load(folder)
    model.generation_config.eos_token_id = stops  # generation ends where our latents do
    config = GRPOConfig(
        output_dir=str(out), num_generations=args.num_latents, max_completion_length=args.latent_tokens,
        seed=args.seed, temperature=1.0, beta=kl_coef, num_iterations=1, loss_type="dr_grpo", scale_rewards="none",
        max_steps=2, per_device_train_batch_size=batch * args.num_latents, shuffle_dataset=False,
        steps_per_generation=1, gradient_accumulation_steps=len(rows) // 2 // batch, **SHARED,
    )  # fmt: skip
    reward = LineReward(folder, set(stops))
    return GRPOTrainer(model, reward, config, Dataset.from_list(rows), processing_class=tokenizer)


def measure_estep(folder: str, args: argparse.Namespace) -> dict:
    """Both trainers do a warm-up update and a timed one in each round; the best round of each side counts."""
    tokenizer = load(folder)[1]
    document = median_chunk(tokenizer, args.module, args.document_tokens)
    sampled = sample_boundaries(document, args.sampled_boundaries)
    with scratch() as out:
        ours = make_ra3(
            folder, out / "ra3", [opening(tokenizer), document], e_steps=LONG_PHASE, m_steps=0, horizon=1,
            num_latents=args.num_latents, max_latent_length=args.latent_tokens, per_device_train_batch_size=1,
            seed=args.seed,
        )  # fmt: skip
        stops = stop_ids(ours.table, tokenizer)
        # The first boundary is the cheapest: it stands for all in the warm-up.
        rows = grpo_rows(tokenizer, document, [document.boundaries[0]] * len(sampled) + sampled)
        batch = 2 if len(sampled) > 1 else 1
        theirs = make_grpo(folder, out / "grpo", rows, batch, stops, args, ours.args.kl_coef)
        clocks = timed(ours, args.clock, last=2), timed(theirs, args.clock)
        best = [float("inf"), float("inf")]
        share = len(document.boundaries) / len(sampled)
        for turn in range(args.estep_repeats):
            for side, trainer in enumerate((ours, theirs)):
                trainer.train()
                total, step = clocks[side].seconds[1], clocks[side].optimizer[1]
                # The optimizer steps once an update, on however many boundaries.
                best[side] = min(best[side], total if side == 0 else (total - step) * share + step)
                say(f"E-step round {turn + 1}: {'GRPO' if side else 'RA3'} {total:.1f} s, optimizer {step:.2f} s")
        lengths = _lengths(ours, theirs)
    boundaries = len(document.boundaries)
    return {
        "estep_vs_grpo": round(best[1] / best[0], 2),
        "estep_boundaries_per_s": round(boundaries / best[0], 3),
        "grpo_boundaries_per_s": round(boundaries / best[1], 4),
        "estep_seconds": round(best[0], 2),
        "grpo_seconds_scaled": round(best[1], 1),
        "estep_document_tokens": len(document.input_ids),
        "estep_boundaries": boundaries,
        "grpo_sampled_boundaries": len(sampled),
        "num_latents": args.num_latents,
        "latent_tokens": args.latent_tokens,
        "estep_kl_coef": ours.args.kl_coef,
        **lengths,
    }


def _lengths(ours: RA3MidTrainer, theirs: GRPOTrainer) -> dict[str, float]:
    """Mean latent of the timed update; GRPO's counts the stop token."""
    key = "completions/mean_length"
    drawn = [e["estep/latent_length"] for e in ours.state.log_history if "estep/latent_length" in e]
    completed = [e[key] for e in theirs.state.log_history if key in e]
    return {"estep_mean_latent": round(drawn[-1], 1), "grpo_mean_completion": round(completed[-1], 1)}
