"""The card of an annotated corpus: where it comes from, how it was made, and what its latents look like."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData

from ..files import public_name
from ..policy import Policy
from ..segmentation import find_format
from .card import count_licenses, hub_ids, render
from .licenses import license_metadata


_SHOWN = (
    "annotation", "prior_alpha", "exploration", "penalty", "num_latents", "max_latent_length", "horizon", "discount",
    "temperature", "top_k", "top_p", "action_format", "existing_comments", "max_length", "seed",
)  # fmt: skip
_PREVIEWED = 8
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


def size_category(rows: int) -> str:
    """The Hub's term for a number of rows, as `"1K<n<10K"`."""
    return next((name for name, limit in _SIZES if rows < limit), "10M<n<100M" if rows < 10**8 else "100M<n<1B")


def preview_rows(annotated: Dataset, action_format: str) -> list[dict[str, Any]]:
    """The first latent of each of the first rows that have one: `row`, `latent`, `next` and `gain`.

    `next` is what stands behind the latent, up to the end of that line or of the next.
    """
    form = find_format(action_format)
    preview = []
    for number, row in islice((pair for pair in enumerate(annotated) if pair[1]["latents"]), _PREVIEWED):
        first = row["latents"][0]
        latent = form.think + first["text"]
        # From the latent's line on: the same text may stand before it as the source's own.
        rest = "\n".join(row["annotated_text"].split("\n")[first["line"] - 1 :]).partition(latent)[2]
        behind = rest.removeprefix(form.end.strip()).strip().split("\n")[0]
        preview.append({"row": number, "latent": latent, "next": behind, "gain": first["gain"]})
    return preview


@dataclass(frozen=True)
class CorpusFacts:
    """What a card says of an annotated corpus: so many `rows`, `latents` and `boundaries`, rows by licence, names of
    columns, and the first latents as from [`preview_rows`]."""

    rows: int
    latents: int
    boundaries: int
    licenses: dict[str, int]
    columns: list[str]
    preview: list[dict[str, Any]]

    @classmethod
    def of(cls, annotated: Dataset, action_format: str) -> CorpusFacts:
        """Counts them in rows of [`annotate_dataset`]."""
        latents, boundaries = sum(map(len, annotated["latents"])), sum(annotated["num_boundaries"])
        preview = preview_rows(annotated, action_format)
        return cls(len(annotated), latents, boundaries, count_licenses(annotated), annotated.column_names, preview)


def render_dataset_card(
    policy: Policy,
    annotated: Dataset | CorpusFacts,
    repo_id: str,
    checkpoint: str | None = None,
    dataset_name: str | None = None,
    dataset_license: str | None = None,
    revision: str | None = None,
    updates: int = 0,
) -> DatasetCard:
    """Lays out the card of an annotated corpus, with metadata that the Hub takes.

    Args:
        policy ([`~ra3_trl.policy.Policy`]), annotated (`datasets.Dataset` or [`CorpusFacts`]):
            What annotated it, and what came of it, with a column `license` where licences are known.
        repo_id (`str`), revision (`str`, *optional*):
            Its full name on the Hub, and the branch that it is on; `None` is `main`.
        checkpoint (`str`, *optional*):
            Name of the weights; the default is the policy's model after its `updates`.
        dataset_name (`str`, *optional*), dataset_license (`str`, *optional*):
            The source in words; the licence of all rows, where they have no column for it.
        updates (`int`, *optional*, defaults to `0`):
            How many updates of RA3 the weights have seen, where they have no name.
    """
    base = policy.backbone.causal_lm.config._name_or_path
    facts = annotated if isinstance(annotated, CorpusFacts) else CorpusFacts.of(annotated, policy.args.action_format)
    licenses = facts.licenses or {dataset_license or "unknown": facts.rows}
    # A path says where somebody works: the names of the card are public ones.
    if checkpoint is None:
        checkpoint = f"{Path(base).name or 'a model'} after {updates} updates of RA3"
    data = DatasetCardData(
        **license_metadata(licenses),
        annotations_creators="machine-generated",
        task_categories=["text-generation"],
        size_categories=size_category(facts.rows),
        source_datasets=hub_ids([dataset_name]) or None,
        tags=["ra3", "trl", "mid-training", "synthetic"],
        pretty_name=repo_id.split("/")[-1],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    text = render(
        "dataset_card.md.jinja",
        data,
        repo_id=repo_id,
        revision=revision,
        source=dataset_name and public_name(dataset_name),
        checkpoint=public_name(checkpoint),
        checkpoint_id=next(iter(hub_ids([checkpoint])), None),
        rows=facts.rows,
        latents=facts.latents,
        boundaries=facts.boundaries,
        licenses=list(licenses.items()),
        columns=facts.columns,
        preview=facts.preview,
        think=find_format(policy.args.action_format).think,
        settings={name: vars(policy.args)[name] for name in _SHOWN},
        version=metadata.version("ra3-trl"),
    )
    return DatasetCard(text)
