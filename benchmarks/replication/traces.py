"""Programs whose last line states what the lines before it compute, for a real checkpoint.

    def mix(x, y):
        x = x - 4
        y = y + x
        x = x * 2
        return x

    result = mix(7, 4)
    # x = 3, y = 7, x = 6
    assert result == 6

The comment is the trace: the value of each assignment in turn. A small language model states the last line right
behind the trace and hardly ever without it. The corpus of the preparation has it before most assertions, mostly right,
and useless comments at the first assignment of some programs; the expert's programs have no comments. A wrong trace
has random values, and the line behind it is true all the same.

Programs of other kinds are in `kinds.py`. All is drawn from `random.Random(seed)`; hashes of the texts are frozen in
`tests/test_traces.py`.
"""

from __future__ import annotations

import operator
import random

from datasets import Dataset

from .kinds import FUNCTIONS, kind_task, stated
from .records import KindCorpus, PreparedRecipe, TraceCorpus, TraceTask


PREPARATION = PreparedRecipe().corpus
EXPERT = TraceCorpus()
USELESS = ("update the values", "do the work", "simple step", "compute the result")
ASSERTION = "assert result =="
_VARIABLES = ("a", "b", "n", "x", "y", "total", "count", "step", "size", "k")
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "%": operator.mod}
_BY_VARIABLE, _BY_CONSTANT = ("+", "-"), ("*", "+", "-", "%")
_MOST = 99  # of the values, which are none of them negative


def assignments(rng: random.Random, names: tuple[str, str]) -> tuple[dict[str, int], list[str], list[tuple[str, int]]]:
    """Arguments, three assignments, and the name and value of each; drawn anew until all values are small enough."""
    first, second = names
    while True:
        arguments = {first: rng.randint(2, 19), second: rng.randint(2, 9)}
        values, lines, trace = dict(arguments), [], []
        for target, other in ((first, second), (second, first), (first, second)):
            # The constant is drawn in any case: the order of the draws is what the frozen texts hang on.
            kind, constant = rng.randrange(len(_BY_VARIABLE + _BY_CONSTANT)), rng.randint(2, 9)
            symbol = (_BY_VARIABLE + _BY_CONSTANT)[kind]
            by_variable = kind < len(_BY_VARIABLE)
            operand = values[other] if by_variable else constant
            values[target] = _OPERATIONS[symbol](values[target], operand)
            if not 0 <= values[target] <= _MOST:
                break
            lines.append(f"    {target} = {target} {symbol} {other if by_variable else constant}")
            trace.append((target, values[target]))
        else:
            return arguments, lines, trace


def task(rng: random.Random, right: bool = True) -> TraceTask:
    """A program up to its assertion; the trace has random values where it is not to be `right`."""
    names = first, second = tuple(rng.sample(_VARIABLES, 2))
    function = rng.choice(FUNCTIONS)
    arguments, lines, trace = assignments(rng, names)
    values = arguments | dict(trace)
    both = rng.random() < 0.5 or values[second] == 0
    prompt = [
        f"def {function}({first}, {second}):",
        *lines,
        f"    return {first} + {second}" if both else f"    return {first}",
        "",
        f"result = {function}({arguments[first]}, {arguments[second]})",
    ]
    if not right:
        trace = [(name, rng.randint(0, 60)) for name, _ in trace]
    value = values[first] + (values[second] if both else 0)
    return TraceTask("\n".join(prompt) + "\n", stated(trace), value)


def any_task(rng: random.Random, corpus: TraceCorpus, right: bool = True) -> TraceTask:
    """A program of one of the corpus' kinds up to its assertion."""
    kind = rng.choice(corpus.kinds) if isinstance(corpus, KindCorpus) else "integers"
    return task(rng, right) if kind == "integers" else kind_task(rng, kind, right)


def program(rng: random.Random, corpus: TraceCorpus) -> str:
    """A whole program of the corpus."""
    traced = rng.random() < corpus.traced
    found = any_task(rng, corpus, right=not traced or rng.random() < corpus.right)
    head, *rest = found.prompt.splitlines()
    if corpus.useless and rng.random() < corpus.useless:
        rest.insert(0, f"    # {rng.choice(USELESS)}")
    return "\n".join([head, *rest, *([found.trace] if traced else []), answer(found)]) + "\n"


def answer(asked: TraceTask) -> str:
    """The only right line: `assert result == 6`."""
    return f"{ASSERTION} {asked.value!r}"


def programs(corpus: TraceCorpus, seed: int, count: int) -> Dataset:
    """A data set with a column `text`, one program a row."""
    rng = random.Random(seed)
    return Dataset.from_dict({"text": [program(rng, corpus) for _ in range(count)]})


def tasks(seed: int, count: int, corpus: TraceCorpus = EXPERT) -> list[TraceTask]:
    """Programs of the expert, of the corpus' kinds, cut before their assertion."""
    rng = random.Random(seed)
    return [any_task(rng, corpus) for _ in range(count)]
