"""Where a model was shown thoughts and where not: did it learn to think there, or merely to comment everywhere?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..losses import compute_returns
from ..policy import Policy
from ..policy.annotators import boundary_lines
from ..records import Document, RolloutGroup


Kept = Mapping[tuple[int, int], Collection[int]]  # by document and chunk: boundaries where a thought was kept
_OFTEN = 0.1  # P(think) from which on a model is one that thinks
COLD_START = (
    "Its own comments harm where it thinks ({gain:+.2f} nats): an E-phase has little to reinforce, and more samples "
    "do not mend that. Begin with a cold start, docs/cold_start.md: `ra3 annotate --annotator trace`, "
    "`ra3 train --e_steps 0` on what comes out, then `ra3 train`."
)
EVERYWHERE = (
    "It comments everywhere: P(think) is {think_elsewhere:.2f} where no thought was kept and {think_there:.2f} where "
    "one was, and its comments elsewhere bring {gain_elsewhere:+.2f} nats. Take fewer updates or a larger share of "
    "text without thoughts (docs/cold_start.md)."
)


def kept_boundaries(policy: Policy, rows: Mapping[int, Mapping[str, Any]], documents: Sequence[Document]) -> Kept:
    """Finds the boundaries before which annotation has kept a thought.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            What cut the texts.
        rows (`Mapping[int, Mapping]`):
            By `doc_id`, with the text and what `ra3 annotate` has added to it: `latents`, each with its `line`.
        documents (`Sequence[Document]`):
            All chunks of these texts.
    """
    kept = {}
    for doc_id, row in rows.items():
        chunks = [document for document in documents if document.doc_id == doc_id]
        # A latent's line is counted with those of the latents before it.
        lines = {latent["line"] - i for i, latent in enumerate(sorted(row["latents"], key=lambda x: x["line"]))}
        where = boundary_lines(row[policy.args.dataset_text_field], chunks, policy.engine.table.token_bytes)
        for chunk, at in zip(chunks, where, strict=True):
            kept[doc_id, chunk.chunk] = {boundary for line, boundary in at.items() if line in lines}
    return kept


def compare_thoughts(policy: Policy, groups: Sequence[RolloutGroup], kept: Kept) -> dict[str, Any]:
    """Compares P(think) and what own latents bring at boundaries where a thought was kept and where none was."""
    args = policy.args
    names = ("think_there", "gain_there", "think_elsewhere", "gain_elsewhere")
    columns: dict[str, list[float]] = {name: [] for name in names}
    for group in groups:
        gain_TG = compute_returns(group, args.horizon, args.discount, args.line_reduction).gain_TG
        shown = kept.get((group.document.doc_id, group.document.chunk), ())
        for t, boundary in enumerate(group.boundaries):
            place = "there" if boundary in shown else "elsewhere"
            columns[f"think_{place}"].append(float(group.decision_logps_A[boundary].exp()))
            columns[f"gain_{place}"].append(float(gain_TG[t].mean()))
    means = {name: fmean(values) if values else None for name, values in columns.items()}
    return {"kept": len(columns["think_there"]), "others": len(columns["think_elsewhere"]), **means}


def advice(diagnosis: Mapping[str, Any], penalty: float = 0.0) -> list[str]:
    """What to do about a checkpoint, in words; nothing where nothing stands out.

    Args:
        diagnosis (`Mapping`):
            Of [`~ra3_trl.evaluation.diagnose.diagnose`].
        penalty (`float`, *optional*, defaults to 0):
            Nats that a latent costs.
    """
    found = []
    gain = diagnosis["economics"]["gain_where_it_thinks"]
    if gain < 0:
        found.append(COLD_START.format(gain=gain))
    thoughts = diagnosis.get("thoughts") or {}
    if None not in (thoughts.get("think_there"), thoughts.get("think_elsewhere")):
        often = thoughts["think_elsewhere"] > max(_OFTEN, thoughts["think_there"] / 2)
        if often and thoughts["gain_elsewhere"] < penalty:
            found.append(EVERYWHERE.format(**thoughts))
    return found
