"""The card of an annotated corpus: where it comes from, how it was made, and what its latents look like."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData

from ..markdown import cell, code_cell
from ..policy import Policy
from ..segmentation import find_format
from .card import PAPER, count_licenses, hub_ids, public_name
from .licenses import license_metadata


TEMPLATE = Path(__file__).parent / "dataset_card.md.jinja"
DATA_FILES = "data/train-*"
_SHOWN = (
    "annotation", "prior_alpha", "num_latents", "max_latent_length", "horizon", "discount",
    "temperature", "top_k", "top_p", "action_format", "existing_comments", "max_length", "seed",
)  # fmt: skip
_PREVIEWED = 8
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


def size_category(rows: int) -> str:
    """The Hub's word for a number of rows, as `"1K<n<10K"`."""
    return next((name for name, limit in _SIZES if rows < limit), "10M<n<100M" if rows < 10**8 else "100M<n<1B")


def preview_rows(annotated: Dataset, action_format: str, limit: int = _PREVIEWED) -> list[dict[str, Any]]:
    """The first latent of each of the first rows that have one: `row`, `latent`, `next` and `gain`.

    `next` is what stands behind the latent, up to the end of that line or of the next.
    """
    form = find_format(action_format)
    close = form.end.strip()
    shown = ((number, row) for number, row in enumerate(annotated) if row["latents"])
    found = []
    for number, row in islice(shown, limit):
        first = row["latents"][0]
        latent = form.think + first["text"]
        rest = "\n".join(row["annotated_text"].split("\n")[first["line"] - 1 :]).partition(latent)[2]
        behind = rest.removeprefix(close).strip().split("\n")[0]
        found.append({"row": number, "latent": latent, "next": behind, "gain": first["gain"]})
    return found


def render_dataset_card(
    policy: Policy,
    annotated: Dataset,
    repo_id: str,
    checkpoint: str | None = None,
    dataset_name: str | None = None,
    dataset_license: str | None = None,
    revision: str | None = None,
    updates: int = 0,
) -> DatasetCard:
    """The card of an annotated corpus, with metadata that the Hub takes.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            What annotated it.
        annotated (`datasets.Dataset`):
            From [`annotate_dataset`], with a column `license` where licences are known.
        repo_id (`str`):
            Its full name on the Hub.
        checkpoint (`str`, *optional*):
            Name of the weights; the default is the policy's model after its `updates`.
        dataset_name (`str`, *optional*), dataset_license (`str`, *optional*):
            The source in words; the licence of all rows, where they have no column for it.
        revision (`str`, *optional*):
            The branch that it is on; `None` is `main`.
        updates (`int`, *optional*, defaults to `0`):
            How many updates of RA3 the weights have seen, where they have no name.
    """
    base = policy.backbone.causal_lm.config._name_or_path
    licenses: Mapping[str, int] = count_licenses(annotated)
    if not licenses:
        licenses = {dataset_license or "unknown": len(annotated)}
    if checkpoint is None:
        checkpoint = f"{Path(base).name or 'a model'} after {updates} updates of RA3"
    data = DatasetCardData(
        **license_metadata(licenses),
        annotations_creators="machine-generated",
        task_categories=["text-generation"],
        size_categories=size_category(len(annotated)),
        source_datasets=hub_ids([dataset_name]) or None,
        tags=["ra3", "trl", "mid-training", "synthetic"],
        pretty_name=repo_id.split("/")[-1],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILES}]}],
    )
    return DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        revision=revision,
        source=dataset_name and public_name(dataset_name),
        checkpoint=public_name(checkpoint),
        checkpoint_id=next(iter(hub_ids([checkpoint])), None),
        rows=len(annotated),
        latents=sum(map(len, annotated["latents"])),
        boundaries=sum(annotated["num_boundaries"]),
        licenses=list(licenses.items()),
        columns=annotated.column_names,
        preview=preview_rows(annotated, policy.args.action_format),
        think=find_format(policy.args.action_format).think,
        settings={name: vars(policy.args)[name] for name in _SHOWN},
        version=metadata.version("ra3-trl"),
        paper=PAPER,
        cell=cell,
        code_cell=code_cell,
    )
