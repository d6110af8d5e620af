"""pass@k as a metric of `evaluate`: `evaluate.load(ra3_trl.evaluation.PASS_AT_K)` loads it offline, from its folder.

`evaluate` imports a copy of this file from its cache, so that imports are absolute here.
"""

import datasets
import evaluate

from ra3_trl.evaluation import estimate
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox


_DESCRIPTION = "Share of problems that at least one of k programs solves, without bias (arXiv:2107.03374)."
_INPUTS = """
Args:
    predictions: for each problem, a list of programs.
    references: for each problem, Python source with `assert`s on the programs' functions, or for all problems
        {"inputs": [...], "outputs": [...]}: standard inputs, and the outputs that they must give.
    k: numbers of programs to draw, none above the programs of any problem. Defaults to [1].
    timeout: seconds that a program may take for all its tests. Defaults to 3.0.
    num_workers: programs that run at a time. Defaults to the number of CPUs.
Returns:
    "pass@1" and so on for each k; "verdicts", for each problem those of its programs: "passed", "failed", "error",
    "timeout", "memory" or "blocked".
"""
_TEXTS = datasets.Sequence(datasets.Value("string"))


class PassAtK(evaluate.Metric):
    def _info(self):
        references = (datasets.Value("string"), {"inputs": _TEXTS, "outputs": _TEXTS})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://huggingface.co/papers/2107.03374",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": _TEXTS, "references": kind}) for kind in references],
        )

    def compute(self, *, predictions=None, references=None, **kwargs):
        """As of any metric; what does not fit is refused here, where nothing is stored yet."""
        if predictions is not None and references is not None:
            _problems(predictions, references, kwargs.get("k", (1,)))
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references, k=(1,), timeout=3.0, num_workers=None):
        problems = _problems(predictions, references, k)
        with Judge(Sandbox(num_workers, Limits(seconds=timeout))) as judge:
            pairs = zip(problems, predictions, strict=True)
            # All are submitted before any is waited for, so that they run side by side.
            futures = [[judge.submit(problem, program) for program in programs] for problem, programs in pairs]
            verdicts = [[future.result().verdict for future in row] for row in futures]
        counts = [(len(row), row.count("passed")) for row in verdicts]
        return {**{f"pass@{number}": estimate(counts, number) for number in _numbers(k)}, "verdicts": verdicts}


def _numbers(k):
    return [k] if isinstance(k, int) else list(k)


def _problems(predictions, references, k):
    """The problems of the references, if all can be judged and there are programs enough."""
    if not predictions or len(predictions) != len(references) or not _numbers(k):
        raise ValueError(
            f"`predictions` has {len(predictions)} rows, `references` {len(references)} and `k` {len(_numbers(k))} "
            "numbers; give a row of each for each problem, and at least one k."
        )
    for position, programs in enumerate(predictions):
        if isinstance(programs, str) or not all(isinstance(program, str) for program in programs):
            raise ValueError(f"Prediction {position} is {str(programs)[:60]!r}; give a list of programs.")
        for number in _numbers(k):
            estimate([(len(programs), 0)], number)
    if len({isinstance(reference, str) for reference in references}) > 1:
        raise ValueError("`references` are of both forms; give texts for all problems, or inputs and outputs for all.")
    return [_problem(reference, position) for position, reference in enumerate(references)]


def _problem(reference, position):
    if not isinstance(reference, str) and set(reference) != {"inputs", "outputs"}:
        raise ValueError(
            f"Reference {position} has {sorted(reference)}; give `inputs` and `outputs`, or the tests as one text (of "
            "HumanEval's columns `test` and a line `check(NAME)`)."
        )
    try:
        return Problem((reference,)) if isinstance(reference, str) else Problem.from_row(reference)
    except ValueError as error:
        raise ValueError(f"Reference {position}: {error}") from error
