"""Rows and names on the model card."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from ra3_trl import RA3Config
from ra3_trl.hub import all_evaluations, write_model_card
from ra3_trl.hub.card import evaluated_sets, evaluation_rows


COUNTS = {"train": {"documents": 8, "boundaries": 20, "tokens": 300}}


def metrics(ce: float, prefix: str = "eval") -> dict[str, float]:
    names = ("ce", "ce_policy", "elbo", "bound_multi", "think_rate", "gain")
    return {f"{prefix}_{name}": ce + i for i, name in enumerate(names)}


def card(tmp_path, evaluations=(), dataset_name=None, **extra) -> ModelCard:
    args = RA3Config(output_dir=str(tmp_path), use_cpu=True)
    config = SimpleNamespace(_name_or_path="Qwen/Qwen2.5-Coder-0.5B")
    backbone = SimpleNamespace(causal_lm=SimpleNamespace(config=config))
    write_model_card(args, list(evaluations), backbone, COUNTS, dataset_name=dataset_name, extra=extra)
    return ModelCard.load(tmp_path / "README.md")


def test_sets_of_an_evaluation():
    assert evaluated_sets({"loss": 1.0, "estep/elbo": 2.0}) == []
    assert evaluated_sets({**metrics(1.0), "step": 3}) == ["eval"]
    assert evaluated_sets({**metrics(1.0, "eval_a"), **metrics(2.0, "eval_my_set")}) == ["eval_a", "eval_my_set"]


def test_rows_are_the_first_and_the_last_of_each_set():
    """Whether the sets were logged together or one by one, as `Trainer` does."""
    one_by_one = [metrics(2.0, "eval_a") | {"step": 0}, metrics(3.0, "eval_b") | {"step": 0},
                  metrics(1.5, "eval_a") | {"step": 5}, metrics(1.0, "eval_a") | {"step": 9}]  # fmt: skip
    together = [one_by_one[0] | one_by_one[1], *one_by_one[2:]]
    for evaluations in (one_by_one, together):
        rows = evaluation_rows(evaluations)
        assert [(row["label"], row["step"], row["ce"]) for row in rows] == [
            ("first evaluation of a", 0, 2.0), ("last evaluation of a", 9, 1.0), ("last evaluation of b", 0, 3.0),
        ]  # fmt: skip
    assert [row["label"] for row in evaluation_rows([metrics(2.0) | {"step": 0}] * 2)] == [
        "first evaluation", "last evaluation",
    ]  # fmt: skip


def test_evaluations_of_the_log_and_of_the_trainer():
    """A run that was resumed at update 4: its log has update 2, and the trainer what came after (and before)."""
    own = [metrics(1.5) | {"step": 6}, metrics(1.5) | {"step": 8}]
    log = [{"loss": 3.0, "step": 1}, metrics(2.0) | {"step": 2}, metrics(1.5) | {"step": 6, "epoch": 1.0}]
    assert [(entry["step"], entry["eval_ce"]) for entry in all_evaluations(log, own)] == [(2, 2.0), (6, 1.5), (8, 1.5)]
    of_two = [metrics(2.0, "eval_b") | {"step": 0}, metrics(1.0, "eval_a") | {"step": 0}]
    assert len(all_evaluations(of_two, of_two)) == 2
    assert all_evaluations([], []) == []


def test_rows_reach_the_card(tmp_path):
    text = card(tmp_path, [metrics(2.0, "eval_a") | {"step": 4}]).content
    assert "| last evaluation of a (update 4) | 2.0000 | 3.0000 | 4.0000 | 5.0000 | 6.0000 | +7.000 |" in text
    assert "Not evaluated" not in text
    assert "Not evaluated on held-out code" in card(tmp_path).content


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("bigcode/the-stack-smol", ["bigcode/the-stack-smol"]),
        ("org/a, org/b", ["org/a", "org/b"]),
        ("rows.jsonl", None),  # a file's name
        ("src", None),  # a folder's name
        ("rows.jsonl, org/a", ["org/a"]),
        ("the Python standard library", None),
        (None, None),
    ],
)
def test_only_names_of_the_hub_are_metadata(tmp_path, name, ids):
    assert card(tmp_path, dataset_name=name).data.datasets == ids


def test_a_folder_of_two_names_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "code").mkdir(parents=True)
    assert card(tmp_path, dataset_name="my/code").data.datasets is None
    assert card(tmp_path, dataset="org/a").data.datasets == ["org/a"]
