"""No argument of a public door ends in a bare `TypeError`, `AttributeError` or `KeyError`: what is of a wrong type is
refused with its name, its value and what may be given."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ra3_trl
from ra3_trl import RA3Config
from ra3_trl.generation import ThinkLogitsProcessor
from ra3_trl.kinds import checked, predicate, words
from ra3_trl.policy import Policy
from ra3_trl.rollout import NoiseKey


class Odd:
    """Of no type that anything takes."""

    def __repr__(self) -> str:
        return "<odd>"


WRONG = (Odd(), 5, "text", 1.5, b"bytes", {"a": 1}, {1, 2}, [Odd()], (), None, True, Odd)
_NOT_CHECKED = ("__version__", "ACTION_FORMATS")  # no doors: a text, a dict
_APART = ("RA3Config", "RA3MidTrainer")  # have checks of their own: below, and tests/test_refusals.py


def doors() -> dict[str, Callable[..., Any]]:
    """Every public function, constructor and public method of `ra3_trl.__all__`, by name."""
    found = {}
    for name in ra3_trl.__all__:
        door = getattr(ra3_trl, name)
        if name in (*_NOT_CHECKED, *_APART):
            continue
        found[name] = door
        if isinstance(door, type):
            for method, member in vars(door).items():
                inner = member.__func__ if isinstance(member, classmethod) else member
                if inspect.isfunction(inner) and not method.startswith("_"):
                    found[f"{name}.{method}"] = inner
    return found


def parameters(door: Callable[..., Any]) -> dict[str, Any]:
    """Its arguments by name, with what they are annotated with."""
    hints = typing.get_type_hints(door) if inspect.isfunction(door) else typing.get_type_hints(door.__init__)
    if inspect.isclass(door) and not hints.keys() - {"return"}:
        hints = typing.get_type_hints(door)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(door).parameters.values()
    return {p.name: hints[p.name] for p in signature if p.name in hints and p.kind not in several}


CASES = [(name, argument) for name, door in doors().items() for argument in parameters(door)]


def test_every_argument_of_every_door_is_annotated():
    """So that the check is of all of them."""
    for name, door in doors().items():
        plain = [
            p.name
            for p in inspect.signature(door).parameters.values()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "cls")
        ]
        assert plain == list(parameters(door)), name
    assert len(CASES) > 80


@pytest.mark.parametrize(("door", "argument"), CASES)
def test_wrong_types_are_refused_by_name(door, argument):
    call, hint = doors()[door], parameters(doors()[door])[argument]
    bound = {} if inspect.isclass(call) or "self" not in inspect.signature(call).parameters else {"self": None}
    if next(iter(inspect.signature(call).parameters), None) == "cls":
        bound = {"cls": None}
    tried = [value for value in WRONG if not predicate(hint)(value)]
    assert tried or hint is typing.Any, "nothing is wrong for it"
    for value in tried:
        with pytest.raises(ValueError, match=f"^`{argument}` is .*; give ") as error:
            call(**bound, **{argument: value})
        assert "object at 0x" not in str(error.value) and len(str(error.value)) < 400
        assert argument == "model" or all(word in str(error.value) for word in words(hint))


def test_what_is_right_is_taken():
    """Lists for tuples, whole numbers for floats, numbers of other libraries, the first elements of a list."""

    @checked
    def door(a: float, b: tuple[int, ...] = (), c: Callable[[], Any] | None = None, *, d: list[str] | None = None):
        return a, b, c, d

    assert door(1, [2, 3], print, d=["x"]) == (1, [2, 3], print, ["x"])
    import numpy as np

    assert door(np.float32(1), torch.tensor([1]), d=None)[0] == 1
    with pytest.raises(ValueError, match=r"^`b` is \[1, 'x'\]; give a list \(a whole number each\)\.$"):
        door(1, [1, "x"])
    with pytest.raises(ValueError, match=r"^`a` is True; give a number\.$"):
        door(True)
    with pytest.raises(ValueError, match=r"^`c` is 'x'; give a function or `None`\.$"):
        door(1, c="x")
    with pytest.raises(TypeError, match="missing 1 required"):  # as Python has it
        door()


def test_a_policy_refuses_what_is_no_part_of_it(tmp_path):
    args = RA3Config(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="^`engine` is a Odd; give a `RolloutEngine`"):
        Policy(Odd(), args)
    with pytest.raises(ValueError, match="^`noise` is 5; give a `NoiseKey` or `None`"):
        Policy.rollout(None, ra3_trl.Document(0, 0, (1,), (), 0), noise=5)
    assert NoiseKey(0, 0, 0)
    with pytest.raises(ValueError, match="^`tokenizer` is None; give a `PreTrainedTokenizerBase`"):
        ThinkLogitsProcessor(None)


# ---- settings and trainer, whose values have meanings besides types ----


def test_every_setting_refuses_other_types(tmp_path):
    """`Odd()` is of no setting's type."""
    from dataclasses import fields

    free = {"deepspeed", "accelerator_config", "fsdp_config", "parallelism_config"}  # transformers reads files too
    for entry in fields(RA3Config):
        if not entry.init or entry.name in free:
            continue
        now = {"max_sites": "max_boundaries", "eval_max_sites": "eval_max_boundaries"}.get(entry.name, entry.name)
        with pytest.raises(ValueError, match=f"`{now}` is "):
            RA3Config(**{"output_dir": str(tmp_path), "use_cpu": True, entry.name: Odd()})


TRAINER = {
    "train": ("resume_from_checkpoint",), "evaluate": ("eval_dataset",), "predict": ("test_dataset",),
    "get_eval_dataloader": ("eval_dataset",), "get_test_dataloader": ("test_dataset",), "add_callback": ("callback",),
    "save_model": ("output_dir",), "push_annotated_dataset": ("repo_id", "dataset"),
    "create_model_card": ("model_name", "dataset_name"), "push_to_hub": ("commit_message",),
}  # fmt: skip


@pytest.fixture
def trainer(make_trainer):
    texts = [f"def f{i}(x):\n    y = x + {i}\n    return y\n" for i in range(4)]
    return make_trainer(texts, texts[:1])


@pytest.mark.parametrize("method", TRAINER)
def test_methods_of_the_trainer(trainer, method):
    for argument in TRAINER[method]:
        for value in (Odd(), 5, 1.5, b"bytes", {1, 2}):
            others = {"repo_id": "a/b"} if argument == "dataset" else {}
            with pytest.raises(ValueError, match=f"`{argument}` is "):
                getattr(trainer, method)(**{argument: value}, **others)


@pytest.mark.parametrize(
    "argument",
    ["model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers", "peft_config",
     "formatting_func", "reward_funcs", "optimizer_cls_and_kwargs", "quantization_config"],
)  # fmt: skip
def test_arguments_of_the_trainer(trainer, tmp_path, argument):
    rows, args = trainer.source_dataset, RA3Config(str(tmp_path / "x"), use_cpu=True, report_to="none")
    right = {"model": trainer.model, "args": args, "train_dataset": rows, "processing_class": trainer.processing_class}
    for value in (Odd(), 5, 1.5, b"bytes", {1, 2}):
        with pytest.raises(ValueError, match=f"`{argument}` (is|holds) "):
            ra3_trl.RA3MidTrainer(**right | {argument: value})
