"""What is to run once where a GPU is at hand, run on the CPU at toy size: the same entry point, the same parts."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks.gpu import profile as module
from benchmarks.gpu.profile import PARTS, PEAK, SIZES, main
from benchmarks.gpu.wheels import closure, needed, pieces


def test_every_part_at_toy_size(tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert main(["--size", "toy", "--out", str(out), "--json"]) == 0
    found = json.loads(out.read_text("utf-8"))
    assert found == json.loads(capsys.readouterr().out) and found["left"] == []
    exact = found["exact"]
    assert set(exact) == {
        f"{what}/{dtype}" for what in ("branch", "expand", "packing/sdpa") for dtype in ("float32", "bfloat16")
    }
    for name, row in exact.items():
        # float32: 1e-4 nats, 1e-4 of the largest gradient; bfloat16 rounds to 2^-8 = 0.004, a gradient some ten times.
        loose = 0.05 if name.endswith("bfloat16") else 1e-4
        assert row["gradient_difference"] < loose
        if name.startswith("packing"):
            assert row["packs"] and row["loss_difference"] < loose
        else:
            assert row["exact"] and max(row["differences"].values()) < loose and len(row["differences"]) == 7
    assert set(found["mstep"]) == {"sdpa/packed", "sdpa/apart"} and set(found["estep"]) == {"rollout", "update"}
    for row in (*found["mstep"].values(), *found["estep"].values()):
        assert row["seconds"] > 0 and row["share_of_peak"] is None and row["memory_gb"] is None
    rollout, update = found["estep"]["rollout"], found["estep"]["update"]
    assert rollout["tokens_with_gradients"] == 0 < update["tokens_with_gradients"]
    assert rollout["tokens"] == update["tokens"] and rollout["boundaries"] == update["boundaries"] > 0


def test_what_there_is_no_time_for_is_named(capsys):
    assert main(["--size", "toy", "--seconds", "0", "--json", "--parts", "mstep"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left"] == ["mstep/sdpa/packed", "mstep/sdpa/apart"] and found["mstep"] == {}


def test_a_row_that_fails_leaves_the_others(capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(PARTS, "mstep", lambda profile: iter([("bad", fail), ("good", lambda: {"seconds": 1.0})]))
    main(["--size", "toy", "--json", "--parts", "mstep"])
    rows = json.loads(capsys.readouterr().out)["mstep"]
    assert rows["bad"]["error"] == "RuntimeError: out of memory" and rows["good"]["seconds"] == 1.0


def test_the_share_of_the_peak():
    """A linear model of 100 weights: 30 tokens at 2 operations a weight, 10 at 6, are 12,000 in a second; half of
    24,000."""

    class Model(torch.nn.Linear):
        @property
        def base_model(self):
            return self

    meter = module.Meter(Model(10, 10, bias=False), torch.device("cpu"), seconds=1.0, tokens=30, learned=10)
    assert meter.row(24_000.0)["share_of_peak"] == pytest.approx(0.5)
    assert PEAK["H200"] == 989e12
    # Qwen2.5-0.5B has 494,032,768 weights, with biases of queries, keys and values, which are there here too.
    size = SIZES["h200"]
    with torch.device("meta"):
        model = module.make_model(size, size.layers)
    assert sum(p.numel() for p in model.parameters()) == 494_032_768


def test_wheels_hold_what_the_machine_lacks():
    names = {line.partition("==")[0] for line in needed("3.12")}
    assert {"trl", "peft", "accelerate", "datasets", "pyarrow"} <= names
    assert not names & {"torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface-hub"}
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+", line) for line in needed("3.12"))
    assert "numpy" in closure(("datasets",), "3.12")
    assert pieces({"a": 5, "b": 4, "c": 3, "d": 2}, most=8) == [["a", "c"], ["b", "d"]]
    with pytest.raises(ValueError, match="a has 9 bytes, more than a piece of 8"):
        pieces({"a": 9}, most=8)
