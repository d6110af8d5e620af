"""`ra3 train --dry_run` against runs: time and memory within 1.5 times, by the CPU's clock, since walls are shared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ra3_trl import RA3Config
from ra3_trl.config_fields import beside_trainers
from ra3_trl.em import Schedule
from ra3_trl.report.estimate import count_evaluations, count_work


# ---- counting ----


def config(tmp_path, **settings):
    with beside_trainers():
        return RA3Config(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("settings", "held_out", "count"),
    [
        ({"eval_on_start": True}, True, 2),  # the base, and the end
        ({}, True, 1),
        ({"eval_on_start": True}, False, 0),
        ({"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4}, True, 4),  # 0, 4, 8 and the end, 10
        ({"eval_strategy": "steps", "eval_steps": 5}, True, 2),  # 5 and 10: the end is not evaluated twice
        ({"eval_strategy": "steps", "eval_steps": 0.5}, True, 2),
        ({"eval_strategy": "epoch"}, True, 3),  # 14 rows of 4: 4 updates a pass: 4, 8 and the end
    ],
)
def test_evaluations_are_counted(tmp_path, settings, held_out, count):
    args = config(tmp_path, per_device_train_batch_size=4, **settings)
    assert count_evaluations(args, Schedule(1, 4, 6), held_out, 14) == count


def test_branches_are_those_of_the_boundaries_that_are_tried(tmp_path):
    """Of 10 and 6 boundaries a quarter, rounded up, is 3 and 2: 2.5 a document, in 4 E-updates of 2, times G = 4."""
    sizes = np.array([(10, 100), (6, 60)])
    args = config(tmp_path, per_device_train_batch_size=2, num_latents=4, boundary_budget=0.25)
    assert count_work(sizes, args, Schedule(1, 4, 6), True).e_branches == 4 * 2 * 2.5 * 4
    args = config(tmp_path, per_device_train_batch_size=2, num_latents=4, boundary_selection="random")
    assert count_work(sizes, args, Schedule(1, 4, 6), True).e_branches == 4 * 2 * 8 * 4


# ---- against runs ----

ROOT = Path(__file__).parents[1]
FUNCTION = "def f{i}(x, y={i}):\n    total = x * {i}\n" + "    if total > {i}:\n        total += y - {i}\n" * 3
LONG = "    value = [item for item in (x, y, total)]\n    total = sum(value) + {i}\n" * 14
JOBS = {
    "full": [],
    "lora": ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"],
    "long": ["--max_length", "1024"],
    "not_evaluated": ["--eval_documents", "0", "--m_steps", "12"],
    "two_processes": ["--accelerate_config", str(ROOT / "examples" / "accelerate_configs" / "multi_process.yaml")],
}
# Clocks of the CPU in the place of the wall's, so that other work on the machine counts in neither.
ESTIMATE = """
import json, sys, time, types
import psutil, ra3_trl.cli.estimate as module
from ra3_trl.cli import train
born = psutil.Process().create_time()
module.time = types.SimpleNamespace(perf_counter=time.process_time, time=lambda: born + time.process_time())
kept = []
train.render = lambda estimate: kept.append(estimate) or ""
assert train.main(sys.argv[1:] + ["--dry_run"]) == 0
print(json.dumps({"seconds": 3600 * sum(kept[0].hours.values()), "peak": kept[0].peak, "n": kept[0].processes}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizers, tiny_model):
    folder = tmp_path_factory.mktemp("jobs")
    tokenizer, size = tokenizers["newline_indent"], {"hidden_size": 128, "intermediate_size": 384}
    tiny_model("llama", tokenizer, num_hidden_layers=3, **size).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, text in (("code", FUNCTION), ("long", FUNCTION + LONG)):
        (folder / name).mkdir()
        for i in range(40):
            (folder / name / f"part{i}.py").write_text((text + "    return total\n").replace("{i}", str(i)))
    return folder


def child(command, place):
    """What a command said, its CPU seconds with those of its children, and the largest resident size of one."""
    timed = (
        "import json, resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=sys.stderr);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", timed, *command], cwd=place, env=environment, capture_output=True, text=True
    )
    code, seconds, size = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr[-3000:]
    return done.stderr, seconds, size


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("job", JOBS)
def test_time_and_memory_are_within_one_and_a_half_times(job, place):
    words = [
        "--model_name_or_path", "model", "--code_dir", "long" if job == "long" else "code", "--output_dir", job,
        "--use_cpu", "--e_steps", "4", "--m_steps", "8", "--eval_documents", "8", "--report_to", "none",
        "--num_latents", "4", "--per_device_train_batch_size", "4", "--max_length", "384", "--save_strategy", "no",
        "--log_latents_steps", "0", *JOBS[job],
    ]  # fmt: skip
    said, _, _ = child([sys.executable, "-c", ESTIMATE, *words], place)
    expected = json.loads(re.findall(r"^\{.*\}$", said, re.M)[-1])
    _, seconds, size = child([sys.executable, "-m", "ra3_trl.cli.main", "train", *words], place)
    n = expected["n"]
    assert n == 1 + (job == "two_processes")
    if n > 1:  # the command and accelerate's launcher start as a run does, and then wait
        seconds -= 2 * child([sys.executable, "-c", "import ra3_trl.cli.train"], place)[1]
    ratios = {"time": n * expected["seconds"] / seconds, "memory": expected["peak"] / size}
    print(job, {name: round(ratio, 2) for name, ratio in ratios.items()}, f"{seconds:.1f} s, {size / 1e6:.0f} MB")
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios.values()), (ratios, seconds, size, expected)
