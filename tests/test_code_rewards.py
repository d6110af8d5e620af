"""The judge's verdicts and the rewards made of them; programs are honest here, see test_sandbox.py for others."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from conftest import needs_bwrap
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ra3_trl.rlvr import (
    code_execution_reward,
    extract_program,
    format_reward,
    fraction_passed_reward,
    get_think_cost_reward,
    problem_columns,
    rewards,
    think_cost_reward,
    use_judge,
)
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox
from ra3_trl.segmentation import count_code_lines, own_line_comments


DOCS = Path(__file__).parents[1] / "docs" / "rewards.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.S)
NODES = (
    "class Node:\n    def __init__(self, value):\n        self.value, self.left = value, None\n"
    "def depth(node): return 0 if node is None else 1 + depth(node.left)\n"
)
TYPES = "{'a': (1, 2), 'b': {3}, 'c': None, 'd': b'x', 'e': 1j, 'f': 2**70, 'g': float('inf'), 'h': [True]}"
RAISES = "try:\n    f(-1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'below 0'"
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(1) == 1\n"

# tests, program, what becomes of it: verdict, assertions that hold, all assertions
JUDGED = {
    "equal": (["assert f(1) == 2"], "def f(x): return x + 1", ("passed", 1, 1)),
    "unequal": (["assert f(1) == 2", "assert f(1) == 1"], "def f(x): return x", ("failed", 1, 2)),
    "near": (["assert abs(f(0.5) - 0.25) < 1e-6"], "def f(x): return x * x + 1e-9", ("passed", 1, 1)),
    "near_by_math": (["assert math.isclose(f(2), 2 ** 0.5)"], "def f(x): return x ** 0.5", ("passed", 1, 1)),
    "types": ([f"assert f() == {TYPES}"], f"def f(): return {TYPES}", ("passed", 1, 1)),
    "tuple_is_no_list": (["assert f() == [1]"], "def f(): return (1,)", ("failed", 0, 1)),
    "generator": (["assert list(f()) == [0, 1]", "assert f() == [0, 1]"], "def f(): yield from (0, 1)",
                  ("failed", 1, 2)),
    "exception": ([RAISES], "def f(x): raise ValueError('below 0')", ("passed", 2, 2)),
    "no_exception": ([RAISES], "def f(x): return x", ("failed", 0, 2)),
    "loop": (["for i in range(9):\n    assert f(i) == i", "assert f(9) == 9"], "def f(x): return min(x, 7)",
             ("failed", 0, 2)),
    "own_class": (["n = Node(1)\nn.left = Node(2)", "assert depth(n) == 2", "assert n.left.value == 2"], NODES,
                  ("passed", 2, 2)),
    "arguments_may_change": (["x = [2, 1]\nassert f(x) == [1, 2]\nassert x == [2, 1]"],
                             "def f(x):\n    x.sort()\n    return x", ("failed", 1, 2)),
    "ends_iteration": (["assert all(map(f, [1]))"], "def f(x): raise StopIteration", ("error", 0, 1)),
    "bare_except": (["try:\n    f()\nexcept:\n    assert True"], "import os\ndef f(): os._exit(0)", ("error", 1, 1)),
    "name_of_a_builtin": (["assert sum(1, 2) == 3"], "def sum(a, b): return a + b", ("passed", 1, 1)),
    "builtins_are_the_tests": (["assert len(f()) == 3"], "def len(x): return 3\ndef f(): return []", ("failed", 0, 1)),
    "no_function": (["assert f(1) == 1"], "def g(x): return x", ("error", 0, 1)),
    "syntax_error": (["assert f(1) == 1"], "def f(x) return x", ("error", 0, 1)),
    "raises_in_one": (["assert f(0) == 1", "assert f(1) == 1"], "def f(x): return 1 // x", ("error", 1, 2)),
    "function_to_program": (["assert f(lambda: 1) == 1"], "def f(g): return g()", ("error", 0, 1)),
    "not_reached": (["def t():\n    assert f() == 1"], "def f(): return 1", ("error", 0, 1)),
    "hangs_later": (["assert f(0) == 0", "assert f(1) == 1"], "def f(x):\n    while x: pass\n    return x",
                    ("timeout", 1, 2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def judge():
    with Judge(Sandbox(slots=2, limits=Limits(seconds=2.0))) as found:
        use_judge(found)
        yield found


@needs_bwrap
@pytest.mark.parametrize("name", JUDGED)
def test_assertions_of_many_forms(judge, name):
    tests, program, expected = JUDGED[name]
    result = judge(Problem(tests=tuple(tests)), program)
    assert (result.verdict, result.passed, result.total) == expected, result
    assert not result.forgeable


@needs_bwrap
def test_inside_is_labelled_forgeable(judge):
    problem = Problem(tests=("assert f(lambda: 1) == 1",), inside=True)
    result = judge(problem, "def f(g): return g()")
    assert (result.verdict, result.forgeable) == ("passed", True)
    assert judge(problem, "def f(g): return 2").verdict == "failed"


@needs_bwrap
def test_the_tests_own_helpers_can_not_be_redefined(judge):
    """As in HumanEval/32: the prompt has a helper that the check calls. A program that redefines it gains nothing."""
    prompt = "def value(x):\n    return x * x - 4\n\n\ndef root():\n    '''where value is 0'''\n"
    check = "def check(candidate):\n    assert abs(value(candidate())) < 1e-6\n"
    problem = Problem.from_row({"prompt": prompt, "test": check, "entry_point": "root"})
    assert judge(problem, prompt + "    return 2\n").verdict == "passed"
    assert judge(problem, prompt + "    return 3\ndef value(x):\n    return 0\n").verdict == "failed"


@needs_bwrap
def test_standard_input_and_output(judge):
    problem = Problem(cases=(("1 2\n", "3\n"), ("5 5", "10")))
    add = "print(sum(map(int, input().split())))"
    assert judge(problem, f"if __name__ == '__main__':\n    {add}\n    print()").verdict == "passed"
    half = judge(problem, "input()\nprint(10)")
    assert (half.verdict, half.passed, half.total) == ("failed", 1, 2)
    assert judge(problem, f"{add}\nraise SystemExit(3)").verdict == "error"
    assert judge(problem, "import os\nos._exit(0)").verdict == "failed"
    assert judge(problem, "print('3\\n' * 10**6)").verdict == "failed"
    assert judge(problem, "while True: print('3' * 1000)").verdict == "blocked"
    assert judge(problem, "x = bytearray(10**9)").verdict == "memory"
    stuck = judge(problem, f"{add}\nwhile True: pass")
    assert (stuck.verdict, stuck.passed) == ("timeout", 0)
    assert stuck.seconds < 3  # the second case is not tried


@needs_bwrap
def test_output_is_kept_and_bounded(judge):
    result = judge(Problem(tests=("assert f() == 1",)), "def f():\n    print('y' * 10**5)\n    return 2")
    assert result.verdict == "failed"
    assert result.output.strip("y\n") == ""
    assert 1000 < len(result.output) <= 2000
    failed = judge(Problem(tests=("assert f() == 1",)), "def f(): return {}['missing']")
    assert "KeyError: 'missing'" in failed.output
    assert "missing" in failed.detail


@needs_bwrap
def test_a_program_is_judged_once(judge):
    problem = Problem(tests=("assert f() == 1",))
    assert judge.submit(problem, "def f(): return 1 # once") is judge.submit(problem, "def f(): return 1 # once")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"test_list": ["assert f( == 1"]}, "are no Python"),
        ({"test_list": ["f(1)"]}, "hold no `assert`"),
        ({"test_list": "assert f(1)"}, "give a tuple"),
        ({"test_list": []}, "0 `tests` and 0 `cases`"),
        ({"test": CHECK}, "no `entry_point`"),
        ({"test": CHECK, "entry_point": "a b"}, "name of a function"),
        ({"inputs": ["1"], "outputs": []}, "as many `outputs` as `inputs`"),
        ({"text": "x"}, "has the columns"),
    ],
)
def test_bad_problems_are_refused_before_anything_runs(row, message):
    with pytest.raises(ValueError, match=message):
        Problem.from_row(row)


@needs_bwrap
def test_rewards_by_the_columns_of_humaneval_mbpp_and_scripts(judge):
    head = "def f(x):\n"
    humaneval = {"prompts": [head] * 3, "test": [CHECK] * 3, "entry_point": ["f"] * 3}
    completions = ["    return x * x\n", "    return x\n", "    return\n"]
    assert run(code_execution_reward, completions=completions, **humaneval) == [1.0, 0.0, 0.0]
    assert run(fraction_passed_reward, completions=completions, **humaneval) == [1.0, 0.5, 0.0]

    chat = [
        [{"role": "assistant", "content": f"Sure:\n```python\ndef f(x):\n    return x {op} x\n```\n"}] for op in "*+"
    ]
    prompts = [[{"role": "user", "content": "Square!"}]] * 2
    mbpp = {"test_list": [["assert f(2) == 4", "assert g == 9"]] * 2, "test_setup_code": ["g = f(3)"] * 2}
    assert run(fraction_passed_reward, completions=chat, prompts=prompts, **mbpp) == [1.0, 0.5]

    scripts = ["print(int(input()) + 1)", "print(2)", "print(0)"]
    columns = {"inputs": [["1", "2"], ["1", "2"], None], "outputs": [["2", "3"], ["2", "3"], None]}
    assert run(fraction_passed_reward, completions=scripts, **columns) == [1.0, 0.5, None]
    with pytest.raises(ValueError, match="finds no tests"):
        run(code_execution_reward, completions=["x"], prompts=["y"])


def run(reward, **kwargs):
    return asyncio.run(reward(**kwargs))


def test_format_reward():
    completions = ["def f(): pass", "def g(): pass", "x =", "```python\ndef f(): pass\n```"]
    assert format_reward(completions, entry_point=["f"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert format_reward(completions) == [1.0, 1.0, 0.0, 1.0]


def test_think_cost_reward():
    # Two own-line comments; one behind code; two in a text that is cut; none in a string.
    texts = ["# a\nx = 1\n    # b\n", "x = 1  # c\n", "# d\nx = (\n    # e", "'''\n# f\n'''\n"]
    assert [len(own_line_comments(text)) for text in texts] == [2, 0, 2, 0]
    assert think_cost_reward(texts, prompts=None) == [-0.02, 0.0, -0.02, 0.0]
    assert get_think_cost_reward(0.5)([texts[0]]) == [-1.0]
    assert get_think_cost_reward().__name__ == "think_cost_reward"
    with pytest.raises(ValueError, match="`cost` is -1"):
        get_think_cost_reward(-1)


def test_latents_and_lines_of_code():
    text = '# a\nx = 1  # b\n\n    #c\ny = """\n# d\n"""\n'
    assert [comment.text for comment in own_line_comments(text)] == [" a", "c"]
    assert count_code_lines(text) == 4  # x, y and two rows of a string, of which one begins with #


PROMPT = 'def f(x):\n    # given\n    """Doc.\n'


@pytest.mark.parametrize(
    ("prompt", "completion", "latents"),
    [
        # It closes the docstring, and begins deeper than it ends: alone, it would be no Python.
        (PROMPT, '    # no\n    """\n    # a\n    return x\n# b\nf(1)\n', 2),
        ("def f(x):\n    if x:\n", "        # a\n        x = 1\n    # b\n    return x\n", 2),
        ("x = 1 ", "# behind code\n", 0),
        ("#", " begun by the prompt\n# a\n", 1),
        ("Write f.", "# Heading\n```python\n# a\ndef f(): pass\n```\n# Another\n", 1),
        ([{"role": "user", "content": "Write f."}], [{"role": "assistant", "content": "# T\n```\nx = 1\n```\n"}], 0),
        (None, "# a\nx = 1\n", 1),
    ],
)
def test_latents_are_those_of_the_program(prompt, completion, latents):
    assert think_cost_reward([completion], prompts=[prompt]) == [-0.01 * latents]


def test_metrics_are_logged_for_each_completion():
    """Latents for each line of code 2/1, 0/2 and 1 in no line; lengths of the three latents. TRL takes the means."""
    logged = []

    def log_metric(name, value):
        logged.append((name, value))

    texts = ["# a\nx = 1\n    # b\n", "x = 1\ny = 2\n", "# c"]
    rewards = get_think_cost_reward(0.5)(texts, latent_lengths=[[3, 1], [], [2]], log_metric=log_metric)
    assert rewards == [-1.0, 0.0, -0.5]
    assert logged == [("think_rate", 2.0), ("think_rate", 0.0), ("think_rate", 1.0)] + [
        ("latent_length", n) for n in (3, 1, 2)
    ]


@needs_bwrap
def test_the_pass_rate_is_of_rows_with_tests(judge):
    logged = []
    tests = [["assert f(2) == 4"], ["assert f(2) == 5"], None]
    rewards = run(
        code_execution_reward, completions=["def f(x): return 2 * x"] * 3, test_list=tests,
        log_metric=lambda *row: logged.append(row),
    )  # fmt: skip
    assert rewards == [1.0, 0.0, None]
    assert logged == [("pass_rate", 1.0), ("pass_rate", 0.0)]


PROBLEMS = [
    Problem(tests=("assert f(1) == 2", "assert f(2) == 3"), setup="y = 1", entry_point="f", inside=True),
    Problem(tests=("assert f(1) == 2",)),
    Problem(cases=(("1\n", "2\n"), ("3", "4"))),
    Problem.from_row({"prompt": "def g(): pass\ndef f():\n", "test": CHECK, "entry_point": "f"}),
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_as_columns_is_the_same_problem(problem):
    """Through a data set's file format too, in which other rows have other columns."""
    assert Problem.from_row(problem_columns(problem)) == problem
    rows = Dataset.from_list([{"prompt": "x", **problem_columns(problem)}, {"prompt": "y"}])
    assert Problem.from_row(rows[0]) == problem


def test_a_judge_of_ones_own_can_be_given_up(judge):
    before = dict(rewards._judges)
    try:
        use_judge(None)
        assert rewards._judges == {}
        use_judge(None)
    finally:
        rewards._judges.update(before)


@pytest.mark.parametrize(
    ("prompt", "completion", "program"),
    [
        ("def f(x):\n", "    return x\n", "def f(x):\n    return x\n"),
        ("def f(x):\n    '''doc'''\n", "    return (\n", "def f(x):\n    '''doc'''\n    return (\n"),
        ("class A:\n    def f(self):", "\n        return (", "class A:\n    def f(self):\n        return ("),
        ("Write f.", "def f(): pass\n", "def f(): pass\n"),
        ("Write f.", "a\n```python\nx = 1\n```\nb\n```\ny = 2\n```", "y = 2\n"),
        ("Write f.", "```python\nx = 1\n", "x = 1\n"),
        ("Fibonacci", "```python\nx = 1\n```", "x = 1\n"),
        (None, [{"role": "assistant", "content": "x = 1"}], "x = 1"),
        # As `ra3 evaluate` judges answers to its `complete` prompts: it fails.
        ('"""\nWrite f.\n"""\n', "```python\nx = 1\n```", '"""\nWrite f.\n"""\n```python\nx = 1\n```'),
    ],
)
def test_programs_are_found_in_completions(prompt, completion, program):
    assert extract_program(prompt, completion) == program


@needs_bwrap
def test_grpo_trainer_takes_the_rewards(judge, tmp_path, tokenizers, tiny_model):
    tokenizer = tokenizers["newline_indent"]
    data = Dataset.from_dict({"prompt": ["def f(x):\n"] * 2, "test": [CHECK] * 2, "entry_point": ["f"] * 2})
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=2, report_to="none",
        max_completion_length=4, use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rewards = [code_execution_reward, fraction_passed_reward, format_reward, think_cost_reward]
    trainer = GRPOTrainer(
        tiny_model("llama", tokenizer), rewards, args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/code_execution_reward/mean"] == 0.0
    assert "rewards/think_cost_reward/mean" in logged
    assert logged["pass_rate"] == 0.0 and logged["think_rate"] >= 0.0
    assert "latent_length" not in logged  # nobody counted tokens


@needs_bwrap
@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.S), ids=["judge", "grpo"]
)
def test_the_blocks_of_the_docs_run(block, tokenizers, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained("model")
    tokenizers["newline_indent"].save_pretrained("model")
    block = block.replace('"MODEL"', '"model"').replace(
        "max_steps=1", "max_steps=1, use_cpu=True, max_completion_length=8"
    )
    exec(compile(block, "docs/rewards.md", "exec"), {"__name__": "docs"})
    if "Judge(" in block:
        said = capsys.readouterr().out
        assert said.startswith("passed\n") and said.count("passed\n") == 2  # the program that exits early does not
