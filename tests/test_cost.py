"""What a run would cost elsewhere: FLOPs, hours and money, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ra3_trl.cli import main
from ra3_trl.em import Schedule
from ra3_trl.report.cost import DEVICES, Cost, Device, PhaseCost, Shape, count_flops, phase_seconds, this_machine
from ra3_trl.report.estimate import Workload, count_work


def settings(**changed) -> SimpleNamespace:
    values = {
        "max_latent_length": 12, "horizon": 2, "kl_coef": 0.0, "reward_model": "live", "annotation": "resample",
        "uses_latents": True, "max_branch_tokens": 26, "train_batch_size": 2, "activation_checkpointing": False,
        "max_boundaries": 0, "num_latents": 4, "boundary_selection": "gate", "boundary_budget": 0.25,
        "world_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def test_flops_by_hand():
    """10 weights; 2 E-documents of 50 tokens with 6 branches of 12 tokens, lines of 10; 4 M-documents of 200 tokens
    in all, 5 branches each to annotate."""
    work = Workload(2, 6, 72, 4, 10, 20, 200)
    shape = Shape(10, 40, 3)
    costs = count_flops(shape, work, settings(), 10.0)
    # To draw 20 x 72; read and scored 20 x (100 + 6 x (3 + 20)); learned 60 x (100 + 72).
    assert costs["E-phase"] == PhaseCost(20 * (100 + 6 * 23) + 60 * 172, 20 * 72, 12 * 3)
    # 26 // 13 = 2 branches in flight: 1 batch of 6 branches is 3 times 12 forwards; 2 batches of 10 are 5 times each.
    assert costs["annotation"] == PhaseCost(20 * (200 + 20 * 23), 20 * 240, 12 * 2 * 5)
    assert costs["M-phase"] == PhaseCost(60 * 200)
    # A KL and a frozen reward model read documents and latents once more each; checkpointing reads once more to learn.
    more = count_flops(shape, work, settings(kl_coef=0.05, reward_model="frozen", activation_checkpointing=True), 10.0)
    assert more["E-phase"].products == 20 * (100 + 6 * 23) + (80 + 40) * 172
    assert count_flops(shape, work, settings(annotation="policy"), 10.0)["annotation"].products == 20 * 200
    assert list(count_flops(shape, work, settings(uses_latents=False), 10.0)) == ["E-phase", "M-phase"]


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        # Products: 4,000 at half of 2,000 a second, 4 s. Drawing: 10 forwards.
        (Device("", 2000, 100, 0, 0, 0.5, 0.001), 4 + 10 * 0.4),  # 40 bytes at 100 a second; 144 launches are 0.144 s
        (Device("", 2000, 1e9, 0, 0, 0.5, 0.01), 4 + 10 * 1.44),  # 48 x 3 launches of 0.01 s
        (Device("", 2000, 1e9, 0, 0, 0.5, 0.0), 4 + 1),  # the products themselves: 1,000
    ],
)
def test_drawing_takes_what_is_longest(device, expected):
    cost, shape = PhaseCost(4000.0, 1000.0, 10), Shape(10, 40, 3)
    assert phase_seconds(cost, shape, device) == pytest.approx(expected)
    assert phase_seconds(cost, shape, device, devices=8) == pytest.approx(expected / 8)


def test_the_share_of_boundaries_that_is_tried_is_counted():
    """Chunks of 10 and 3 boundaries: a quarter of each, rounded up, is 3 and 1, and all of them with `random`."""
    sizes = np.array([[10, 200], [3, 100]])
    for selection, most, tried in (("gate", 0, 2), ("gate", 2, 1.5), ("random", 0, 6.5), ("random", 5, 4)):
        args = settings(boundary_selection=selection, max_boundaries=most)
        assert count_work(sizes, args, Schedule(1, 5, 1), True).e_branches == 5 * 2 * tried * 4


def test_a_tied_head_is_a_product_and_embeddings_are_none(tiny_model, tokenizers):
    model = tiny_model("llama", tokenizers["newline_indent"])
    embeddings = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    shape = Shape.of(model, 2)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shape.weights == total - (0 if tied else embeddings)
    assert shape.size == sum(p.numel() * p.element_size() for p in model.parameters())


def test_the_report_says_all_of_it():
    phases = {"E-phase": PhaseCost(1e18), "M-phase": PhaseCost(3e18)}
    cost = Cost(DEVICES["h100"], 8, phases, {"E-phase": 1.0, "M-phase": 0.5}, 90_000_000_000, 6.0, 3.0)
    said = cost.render()
    for words in ("8 x H100 SXM: 989 TFLOP/s, 40% reached", "4.00e+18: E-phase 1.00e+18", "does not fit", "1.5 on 8",
                  "36.00 dollars, at 3 for each and hour", "ratio 2.00"):  # fmt: skip
        assert words in said


def test_this_machine_multiplies():
    here = this_machine(torch.device("cpu"), 64)
    assert math.isfinite(here.flops) and here.flops > 1e6


# ---- the command ----


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "8", "--dry_run"], "`devices` and `price_per_hour` are of use with `device`"),
        (["--device", "h100"], "`device` is 'h100', for which a run is estimated; set `dry_run` too"),
        (["--device", "h100", "--devices", "0", "--dry_run"], "`devices` is 0"),
        (["--device", "h100", "--price_per_hour", "-1", "--dry_run"], "`price_per_hour` is -1"),
    ],
)
def test_what_cant_be_estimated_is_refused(words, says, capsys):
    assert main.main(["train", "--model_name_or_path", "x", "--use_cpu", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_dry_run_says_what_it_costs(tiny_model, tokenizers, tmp_path, capsys):
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(tmp_path / "model")
    tokenizers["newline_indent"].save_pretrained(tmp_path / "model")
    code = "".join(f"def f{i}(x):\n    y = x + {i}\n    y += 1\n    return y\n\n\n" for i in range(6))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text(code)
    argv = ["--model_name_or_path", str(tmp_path / "model"), "--code_dir", str(tmp_path / "code"), "--use_cpu"]
    argv += ["--max_length", "128", "--num_latents", "2", "--max_latent_length", "3", "--report_to", "none"]
    argv += ["--dry_run", "--devices", "8", "--device", "h100", "--price_per_hour", "2"]
    assert main.main(["train", *argv]) == 0
    said = capsys.readouterr().out
    for word in ("Device", "FLOPs", "Fits", "Hours", "Money", "Checked"):
        assert f"\n{word} " in said
    assert "8 x H100 SXM" in said and "at 2 for each and hour" in said
