"""What resuming in the middle of an E-phase costs, and whether anything is rolled out twice."""

from __future__ import annotations

import argparse
import gc

from ra3_trl import RA3MidTrainer

from .common import LONG_PHASE, Clock, chunks_of, load, make_ra3, say, scratch, timed


_SAVED = 3  # the checkpoint is written after this update
_BATCH = 2


def count_rollouts(trainer: RA3MidTrainer) -> list[int]:
    """The update that each document rolled out by the engine from now on is for, by the noise it gets."""
    updates: list[int] = []
    rollouts = trainer.policy.engine.rollouts

    def counted(documents, boundaries, num_latents, horizon, noise, *args, **kwargs):
        updates.extend([noise.step] * len(documents))
        return rollouts(documents, boundaries, num_latents, horizon, noise, *args, **kwargs)

    trainer.policy.engine.rollouts = counted
    return updates


def _run(folder: str, out, args: argparse.Namespace) -> tuple[RA3MidTrainer, list[int], Clock]:
    chunks = chunks_of(load(folder)[1], args.module, args.resume_tokens)
    documents = [chunks[i % len(chunks)] for i in range(2 * _BATCH * (_SAVED + 1))]
    trainer = make_ra3(
        folder, out, documents, e_steps=LONG_PHASE, m_steps=0, horizon=1, num_latents=args.num_latents,
        max_boundaries=2, max_latent_length=args.latent_tokens, per_device_train_batch_size=_BATCH,
        save_strategy="steps", save_steps=_SAVED, seed=args.seed,
    )  # fmt: skip
    return trainer, count_rollouts(trainer), timed(trainer, args.clock, last=_SAVED + 1)


def measure_resume(folder: str, args: argparse.Namespace) -> dict:
    """The same update, once in the run left alone and once as the first one after resuming."""
    with scratch() as out:
        left, drawn, clock = _run(folder, out, args)
        left.train()
        alone, loss = clock.seconds[_SAVED], left.state.log_history[_SAVED]["estep/loss"]
        drawn = [step for step in drawn if step == _SAVED]
        del left
        gc.collect()
        resumed, again, clock = _run(folder, out, args)
        begin = clock.now()
        resumed.train(resume_from_checkpoint=True)
        taken = clock.ends[0] - begin
        entry = resumed.state.log_history[_SAVED]
    say(f"resume: {taken:.2f} s to the end of the first update, {alone:.2f} s for it in the run left alone")
    return {
        "resume_extra_s": round(taken - alone, 2),
        "resume_rollouts": sum(step < _SAVED for step in again),
        "resume_update_rollouts": [len(drawn), sum(step == _SAVED for step in again)],
        "resume_update_s": round(alone, 2),
        "resume_loss_diff": abs(entry["estep/loss"] - loss),
        "resume_after_updates": _SAVED,
    }
