"""The cross-entropy of `ra3 compare`: all checkpoints on the same texts, with the same settings."""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..config_file import read_settings
from ..evaluation import Benchmark
from ..files import public_name
from ..models import load_tokenizer
from ..policy import Policy
from ..segmentation import find_format, require_tags, row_to_document, segment_dataset, token_bytes
from .checkpoint import flag_settings, place_of_options
from .data import hold_out, limit, load_splits
from .options import CROSS_ENTROPY as FLAGS
from .options import SHARED


_MEASURED = ("ce", "ce_never", "ce_policy", "elbo", "bound_multi", "think_rate", "code_tokens")


def held_out_numbers(policy: Policy, texts: Dataset) -> tuple[dict[str, float], str]:
    """Measures a checkpoint on texts: nats per code token, rates, bits per byte; and what tells its tokens from those
    of another tokenizer."""
    rows = segment_dataset(texts, policy.segmenter, policy.args.dataset_text_field)
    documents = [row_to_document(row) for row in rows]
    metrics = policy.evaluate(documents)
    numbers = {key: metrics[key] for key in _MEASURED}
    table, size, tokens = token_bytes(policy.tokenizer), 0, hashlib.sha256()
    for document in documents:
        tokens.update(repr(document.input_ids).encode())
        # The bytes of what `ce` counts: no kept comments, and no first token, before which nothing stands.
        spans = [(max(a.start, 1), a.end) for a in document.actions if not a.comment]
        size += sum(len(table[i] or b"") for start, end in spans for i in document.input_ids[start:end])
    numbers["bits_per_byte"] = numbers["ce"] * numbers["code_tokens"] / max(size, 1) / math.log(2)
    return numbers, tokens.hexdigest()


def held_out_texts(options: argparse.Namespace, benchmark: Benchmark | None) -> tuple[Dataset | None, str]:
    """The texts of the cross-entropy, and what they are in words; `None` if there are none.

    Raises:
        `ValueError`: if the corpus can't be read, or nothing of it is held out.
    """
    documents, split = options.eval_documents, options.dataset_split
    name = options.dataset_name or options.code_dir
    if name is None:
        programs = [task.solution for task in benchmark.tasks if task.solution] if benchmark else []
        data = Dataset.from_dict({options.dataset_text_field or "text": programs}) if programs else None
        return limit(data, documents), "the tasks' own solutions"
    splits = load_splits(options.dataset_name, options.code_dir, split or "train", options.dataset_config)
    if split is not None or "test" in splits:
        split = split or "test"
        return limit(splits[split], documents), f"the first of {public_name(name)}, {split}"
    rows = hold_out(splits["train"], documents, None, options.seed)[1]
    if rows is None:
        raise ValueError(f"{name!r} is too small to hold some of it out; set `dataset_split` to take its first rows.")
    return rows, f"of {public_name(name)}, those that `ra3 train` holds out with seed {options.seed}"


def shared_settings(options: argparse.Namespace, checkpoints: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The settings that all checkpoints (by name) are measured with, those of the first that was mid-trained, but for
    flags; and a sentence on each that was trained with others.

    Raises:
        `ValueError`: if a tokenizer lacks what the action format needs.
    """
    place = {"revision": options.model_revision}
    trained = {name: read_settings(checkpoint, **place) or {} for name, checkpoint in checkpoints.items()}
    first = next((name for name, settings in trained.items() if settings), None)
    shared = {key: trained[first][key] for key in SHARED if key in trained[first]} if first else {}
    notes = []
    for name, settings in trained.items():
        others = [key for key, value in shared.items() if settings.get(key, value) != value]
        if others := [f"`{key}`" for key in others if vars(options).get(key) is None or key not in FLAGS]:
            notes.append(f"All were measured with {first}'s settings; {name} has another {', '.join(others)}.")
    for name, checkpoint in checkpoints.items():
        try:
            require_tags(load_tokenizer(checkpoint, place_of_options(options)), find_format(_format(options, shared)))
        except ValueError as error:
            raise ValueError(f"{name}: {error} Or set `no_ce`, or another `action_format`.") from error
    return shared, notes


def _format(options: argparse.Namespace, shared: Mapping[str, Any]) -> str:
    return options.action_format or shared.get("action_format", "python")


def measure(
    options: argparse.Namespace, shared: Mapping[str, Any], checkpoints: Mapping[str, str], texts: Dataset
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """[`held_out_numbers`] of each with the shared settings; and a sentence if not all saw the same tokens."""
    place = {"revision": options.model_revision}
    options_of_model = {"dtype": options.dtype, **place_of_options(options)}
    numbers, tokens = {}, set()
    for name, checkpoint in checkpoints.items():
        settings = {**shared, **flag_settings(options, FLAGS)}
        # The head decides where it was trained to, and only on text of the format that it knows.
        trained = read_settings(checkpoint, **place) or {}
        if trained.get("gate") != "head" or trained.get("action_format") != _format(options, shared):
            settings["gate"] = "token"
        policy = Policy.open(checkpoint, model_init_kwargs=options_of_model, **settings)
        numbers[name], seen = held_out_numbers(policy, texts)
        tokens.add(seen)
        del policy
        gc.collect()  # the weights, before others are loaded
    others = "Tokenizers differ, so nats per code token can't be compared between them; bits per byte can."
    return numbers, [others] if len(tokens) > 1 else []
