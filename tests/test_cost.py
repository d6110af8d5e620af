"""What work would take on devices that are not here, by hand, and the commands that say it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_annotated_dataset import CODE

from benchmarks import cost as benchmark
from benchmarks.__main__ import main as benchmarks
from ra3_trl.cli import main
from ra3_trl.cli.cost import Cost, Passes, Shape, _draw, count_passes, seconds_of, this_machine
from ra3_trl.cli.devices import DEVICES, Device, choose_device
from ra3_trl.cli.early import refuse_early
from ra3_trl.report.estimate import Workload


WORK = Workload(2, 6, 72, 4, 40, 160, 200)
SHAPE = Shape(10, 10, 40, 3)


def settings(**changed) -> SimpleNamespace:
    values = {
        "max_latent_length": 12, "horizon": 2, "kl_coef": 0.0, "reward_model": "live", "annotation": "resample",
        "max_branch_tokens": 26, "train_batch_size": 2, "activation_checkpointing": False,
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


# ---- arithmetic ----


def test_passes_by_hand():
    """2 E-documents of 50 tokens with 6 branches of 12 tokens; 4 M-documents of 50 tokens with 10 boundaries each, 4
    latents at each; lines of 10 tokens; 26 tokens in a pass; 2 documents together."""
    phases = count_passes(WORK, settings(), 50, 10, 2)
    # Read 100 tokens: 4 passes of 26. Draw 6 branches at once, 11 tokens each behind the first. Score 6 times 3 + 20
    # tokens. Learn from 100 + 6 x 12 tokens: 7 passes.
    assert phases["E-phase"] == (Passes(4, 100), Passes(11, 66), Passes(6, 138), Passes(7, 172, learns=True))
    # 2 rounds of 100 tokens, 4 passes each; 10 boundaries are 2 windows of at most 8, so 4 in all, of 40 branches
    # each, of which 26 fit at once: 4 x 2 x 11. Score 160 x 23 = 3,680: 36 passes in each window.
    assert phases["annotation"] == (Passes(8, 200), Passes(88, 1760), Passes(144, 3680))
    assert phases["M-phase"] == (Passes(8, 200, learns=True),)  # 2 updates of 100 tokens, 4 passes each


def test_what_else_is_read():
    # A KL and a frozen reward model read documents and latents once more each: 2 x 172. Checkpointing: once to learn.
    more = count_passes(WORK, settings(kl_coef=0.05, reward_model="frozen", activation_checkpointing=True), 50, 10, 2)
    assert more["E-phase"][3:] == (Passes(14, 344), Passes(7, 172, learns=True, again=True))
    unscored = count_passes(WORK, settings(annotation="policy"), 50, 10, 2)["annotation"]
    assert [p.tokens for p in unscored] == [200, 1760]
    # Where 100 branches fit: 2 rounds of 2 windows of 40 branches; all boundaries at once with horizon 1, 2 rounds of
    # 80; one document after the other 4 rounds of 2 windows of 20.
    for changed, together, flights in (({}, 2, 4), ({"horizon": 1}, 2, 2), ({}, 1, 8)):
        wide = count_passes(WORK, settings(max_branch_tokens=100, **changed), 50, 10, together)
        assert wide["annotation"][1] == Passes(flights * 11, 1760)
    no_e = count_passes(Workload(0, 0, 0, 4, 0, 0, 200), settings(), 50, 10, 2)
    assert list(no_e) == ["M-phase"]


def test_drawing_takes_the_passes_that_were_counted():
    """benchmarks/LOG.md: 1,176 branches of K = 16 took 15 forwards."""
    assert _draw(1176, 1, settings(max_latent_length=16, max_branch_tokens=8192)).count == 15


def test_flops_of_learning():
    # 10 weights, 5 tokens: 100 forwards, 100 backwards, 100 more if all are trained, 20 if 2 of them are.
    adapter = Shape(10, 2, 40, 3)
    kinds = Passes(1, 5), Passes(1, 5, learns=True), Passes(1, 5, learns=True, again=True)
    assert [p.flops(shape) for shape in (SHAPE, adapter) for p in kinds] == [100, 300, 400, 100, 220, 320]
    slow = Device("", 1e9, 1e9, 0, 0, launch=0.01)  # 463 x 3 launches of 0.01 s
    assert seconds_of((Passes(2, 5, learns=True),), SHAPE, slow) == pytest.approx(2 * 13.89)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device("", 2000, 100, 0, 0, 0.5, 0.001), 10 * 0.4),  # 40 bytes at 100 a second; 144 launches are 0.144 s
        (Device("", 2000, 1e9, 0, 0, 0.5, 0.01), 10 * 1.44),  # 48 x 3 launches of 0.01 s
        (Device("", 2000, 1e9, 0, 0, 0.5, 0.0), 2.0),  # products: 2 x 10 x 100 at half of 2,000 a second
    ],
)
def test_a_pass_takes_what_is_longest(device, expected):
    assert seconds_of((Passes(10, 100),), SHAPE, device) == pytest.approx(expected)
    assert seconds_of((Passes(10, 100), Passes(10, 100)), SHAPE, device) == pytest.approx(2 * expected)


def test_a_row_of_the_table_by_hand():
    """7B on one H100: the M-phase is 10^9 tokens x 6 x 7.07 10^9 = 4.242 10^19 FLOPs, at 40 % of 989 10^12 a second
    107,230 s or 29.79 hours; launches are less: 156,250 passes of 463 x 28 x 5 us = 0.065 s are 2.8 hours. Annotation
    draws in ceil(1,250,000 / 64) = 19,532 rounds of 80 / 8 = 10 windows, 11 passes each: 2,148,520 of 48 x 28 x 5 us
    = 6.72 ms (reading 15.24 GB takes 4.55 ms), 4.01 hours; the products are 2 x 7.07 10^9 x 8.8 10^9 tokens at 3.956
    10^14, 87.37 hours, and longer. It scores 8 10^8 branches of 3 + 20 tokens: 182.69 hours; reads 10^9: 9.93."""
    (row,) = [r for r in benchmark.measure(counts=(1,)) if r["model"] == "7B"]
    assert row["hours"]["M-phase"] == pytest.approx(29.79, abs=0.01)
    assert row["hours"]["annotation"] == pytest.approx(87.37 + 182.69 + 9.93, abs=0.02)
    assert row["dollars"] == pytest.approx(3 * sum(row["hours"].values()))
    assert row["memory_gb"] == pytest.approx(12 * 7.62)


def test_what_each_of_some_devices_does():
    """Of an epoch its part; of so many updates all of them, on documents of its own."""
    work = Workload(16, 80, 800, 160, 320, 640, 8000)
    epochs = SimpleNamespace(m_steps=-1, max_steps=-1, world_size=1)
    assert work.of_each(epochs, 8) == Workload(16, 80, 800, 20, 40, 80, 1000)
    assert work.of_each(SimpleNamespace(m_steps=9, max_steps=-1, world_size=1), 8) == work
    assert work.of_each(SimpleNamespace(m_steps=9, max_steps=-1, world_size=2), 8).m_chunks == 80  # counted for two


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_a_product_and_embeddings_are_none(tied, tiny_model, tokenizers):
    model = tiny_model("llama", tokenizers["newline_indent"], tie_word_embeddings=tied)
    embeddings = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    weights = total - (0 if tied else embeddings)
    assert Shape.of(model) == Shape(weights, weights, 4 * total, model.config.num_hidden_layers)
    model.requires_grad_(False)
    assert Shape.of(model).trained == 0


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_of_a_mixtures_experts_those_count_that_a_token_goes_to(model_type, tiny_model, tokenizers):
    """Two of four; all their weights are held and read. What is shared by all tokens, the router too, counts whole."""
    model = tiny_model(model_type, tokenizers["newline_indent"])
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight
    only_read = 0 if model.get_output_embeddings().weight is embeddings else embeddings.numel()
    shape = Shape.of(model)
    assert experts > 0 and shape.weights == total - only_read - experts // 2 and shape.size == 4 * total


def test_the_report_says_all_of_it():
    # 2 x 10 weights x 10^18 tokens x 8 devices are 1.6 10^20 FLOPs, on each 2 10^19 at 40 % of 989 10^12: 14.04 hours.
    phases = {"E-phase": (Passes(1, 1e18),)}
    here = Device("this machine", 1e12, 1e12, 0, 0, 0.5, 0)  # 10^9 tokens: 2 10^10 at 5 10^11, 0.04 s
    cost = Cost(
        DEVICES["h100"], 8, SHAPE, phases, 90_000_000_000, here, {"E-phase": (Passes(1, 1e9),)}, {"E-phase": 0.1}
    )
    said = cost.render()
    for words in ("8 x H100 SXM, 989 TFLOP/s of which 40% are reached", "5 us a launch", "8e+18 tokens", "1.6e+20:",
                  "90.0 GB (by part above) of 80 GB", "does not fit", "14 on all of them: E-phase 14.0 h",
                  "337.04 dollars, at 3 for each and hour",
                  "E-phase ratio 2.50 (0.1 s / 0.04 s), all ratio 2.50"):  # fmt: skip
        assert words in said, (words, said)


def test_this_machine_is_measured():
    here = this_machine(torch.device("cpu"), size=64)
    assert here.flops > 1e6 and here.bandwidth > 1e6 and 0 < here.launch < 1 and here.share == 0.4


# ---- the page ----


def test_the_table_of_the_page_is_what_the_command_prints(capsys):
    benchmarks(["cost", "--json"])
    table = json.loads(capsys.readouterr().out)["table"].strip()
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text("utf-8")
    assert table in page and table.count("\n") == 10
    before = page[: page.index(table)][-600:]
    assert "**Computed**" in before and "python -m benchmarks cost" in before


# ---- the commands ----


def test_devices_are_chosen_or_refused():
    assert choose_device(None, None, None, False) is None and choose_device(None, None, None, True) is None
    device, count = choose_device("h100", None, 2.5, True)
    assert (device.name, device.price, count) == ("H100 SXM", 2.5, 1)
    for arguments, says in {
        ("h100", 8, None, False): "`device` is 'h100'",
        (None, 8, None, True): "`devices` is 8 without a `device`",
        (None, None, 1.0, True): "`price_per_hour` is 1.0 without a `device`",
        ("h100", -1, None, True): "`devices` is -1",
        ("h100", 1, float("inf"), True): "`price_per_hour` is inf",
        ("H1000", 1, None, True): "`device` is 'H1000'; choose one of",
    }.items():
        with pytest.raises(ValueError, match=re.escape(says)):
            choose_device(*arguments)


def test_a_file_of_options_may_say_the_rest():
    refuse_early("train", ["--config", "x.yaml", "--devices", "8"])
    refuse_early("train", ["--config", "x.yaml", "--device", "h100"])
    with pytest.raises(ValueError, match="`devices` is 0"):
        refuse_early("train", ["--config", "x.yaml", "--devices", "0"])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, tokenizers) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(folder / "model")
    tokenizers["newline_indent"].save_pretrained(folder / "model")
    (folder / "code").mkdir()
    for i in range(6):
        (folder / "code" / f"part{i}.py").write_text(CODE.replace("{i}", str(i)))
    rows = [{"text": CODE.replace("{i}", str(i))} for i in range(6)] + [{"text": None}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SAID = ("Device", "Passes", "FLOPs", "Fits", "Hours", "Money", "Checked")
EIGHT = ["--use_cpu", "--num_latents", "2", "--max_latent_length", "3", "--max_length", "128",
         "--dry_run", "--devices", "8", "--device", "h100", "--price_per_hour", "2"]  # fmt: skip


def test_a_dry_run_says_what_it_costs(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--model_name_or_path", str(place / "model"), "--code_dir", str(place / "code"), "--report_to", "none"]
    assert main.main(["train", *argv, *EIGHT, "--e_steps", "2"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{word} " in said for word in SAID)
    assert "8 x H100 SXM" in said and "at 2 for each and hour" in said
    for phase in ("E-phase", "annotation", "M-phase", "all"):
        assert re.search(rf"{phase} ratio \d", said), said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_an_annotation(place, tmp_path, monkeypatch, capsys):
    """7 rows, of which one can't be read. By `ra3 annotate` itself: as many boundaries in the other six."""
    monkeypatch.chdir(tmp_path)
    argv = ["annotate", str(place / "model"), "--dataset_name", str(place / "rows.jsonl")]
    assert main.main([*argv, *EIGHT]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{word} " in said for word in ("Boundaries", "Branches", "Tokens", "Memory", "Time", *SAID))
    assert "7; 7 looked at, of which 1 can't be read" in said and "annotation ratio" in said
    assert not list(tmp_path.iterdir())
    assert main.main([*argv, *EIGHT[:-7], "--output_dir", "out", "--skip_broken_rows"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert f"about {manifest['boundaries']:,} in" in said
    assert main.main([*argv, "--dry_run", "--annotator", "trace"]) == 2
    assert "`dry_run` estimates the policy's own latents" in capsys.readouterr().err
