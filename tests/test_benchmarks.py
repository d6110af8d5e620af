"""`python -m benchmarks phases` on a tiny random model: every figure is there, and what must be exact is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from ra3_trl.segmentation.tokens import FIM_TOKENS


SMALL = [
    "--num_latents", "2", "--latent_tokens", "3", "--row_tokens", "256", "--row_documents", "2", "--repeats", "1",
    "--mstep_updates", "1", "--document_tokens", "96", "--sampled_boundaries", "2", "--process_tokens", "64",
    "--process_rounds", "1", "--resume_tokens", "64", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tokenizers) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def figures(capsys, folder: Path, *parts: str) -> dict:
    main(["phases", "--json", "--model", str(folder), "--parts", *parts, *SMALL])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow  # a timing, whose parts other tests have
def test_phases_in_one_process(capsys, folder):
    found = figures(capsys, folder, "mstep", "estep", "resume")
    for name in ("mstep_vs_sft", "mstep_vs_sft_annotated", "estep_vs_grpo"):
        assert found[name] > 0
    assert found["mstep_loss_diff"] < 1e-4  # the same tokens in the same rows, on both sides
    assert found["mstep_annotated_loss_diff"] < 1e-4
    assert found["estep_boundaries"] >= found["grpo_sampled_boundaries"] == 2
    assert found["resume_rollouts"] == 0
    assert found["resume_update_rollouts"] == [2, 2]
    assert found["resume_loss_diff"] == 0
    assert {"torch", "trl", "transformers", "threads", "seed", "model", "commit"} <= set(found)


@pytest.mark.slow
def test_two_processes(capsys, folder):
    found = figures(capsys, folder, "processes")
    assert found["two_process_speedup"] > 0
    assert set(found["process_update_seconds"]) == {"E1", "E2", "M1", "M2"}


def test_proposals(capsys, tmp_path, tiny_model, tokenizers):
    """What latents in hindsight are worth is their gain and what they pay under the policy."""
    tokenizer = copy.deepcopy(tokenizers["newline_indent"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(FIM_TOKENS[0])})
    tiny_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["--functions", "1", "--latents", "2", "--max_length", "400", "--proposals", "causal", "fim"]
    main(["proposals", "--json", "--model", str(tmp_path), *words])
    found = json.loads(capsys.readouterr().out)
    assert found["elbo_gain"]["causal"]["values"] == found["gain"]["causal"]["values"]
    for i in range(1):
        texts = found["texts"][i]
        assert len(texts["causal"]) == len(texts["fim"]) == 2 and texts["line"].strip()
        gains = [latent["gain"] for latent in texts["fim"]]
        assert found["best_gain"]["fim"]["values"][i] == pytest.approx(max(gains), abs=0.01)
        assert found["gain"]["fim"]["values"][i] == pytest.approx(sum(gains) / 2, abs=0.01)
    assert found["elbo_gain"]["fim"]["mean"] < found["gain"]["fim"]["mean"]  # a random model's q is not its prior
    assert found["gain"]["fim less causal"]["mean"] == pytest.approx(
        found["gain"]["fim"]["mean"] - found["gain"]["causal"]["mean"]
    )
    assert set(found["seconds"]) == {"causal", "fim"}


@pytest.mark.slow  # a timing
@pytest.mark.timeout(600)
def test_annotation(capsys, folder):
    """20 kills lose and double nothing."""
    words = ["--documents", "4", "--num_latents", "2", "--latent_tokens", "3", "--soak_documents", "60"]
    main(["annotate", "--json", "--model", str(folder), *words, "--kill_documents", "40"])
    found = json.loads(capsys.readouterr().out)
    assert (found["kills"], found["rows_lost"], found["rows_doubled"], found["finished_shards_redone"]) == (
        20,
        0,
        0,
        0,
    )
    assert found["killed_bytes_equal"] and found["two_process_bytes_equal"]
    for name in ("documents_per_s", "boundaries_per_s", "two_process_speedup", "rss_mb"):
        assert found[name] > 0
    assert "rss_growth_mb" in found
