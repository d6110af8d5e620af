"""Prompts in the forms of the reference harnesses, and what of a model's answer goes to samples.jsonl.

complete    HumanEval's prompt but for white space at its end, MBPP's as a docstring (BigCode's harness)
few_shot    MBPP with three solved tasks in front (Austin et al. 2021, https://huggingface.co/papers/2108.07732)
chat        an instruction with the prompt in a fence; the answer begins with a fence (EvalPlus)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..generation import cut_at_stop
from .samples import Sample
from .tasks import Task


PROMPT_FORMS = ("complete", "few_shot", "chat")
_FENCE, _DONE = "\n```", "[DONE]"
# Own-line comments are what RA3's latents are. One at the margin ends HumanEval's functions, as in the reference,
# which are indented; MBPP's programs go on behind it.
_STOPS = {
    "humaneval": ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", _FENCE),
    "mbpp": ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", _FENCE),
    "stdio": (_FENCE,),
}
_SHOT = (
    "You are an expert Python programmer, and here is your task: {description} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)
_INSTRUCTION = "Write the whole program that begins as follows, with all imports, in one fenced code block.\n"


def render_prompt(
    task: Task,
    kind: str,
    form: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shots: Sequence[Task] = (),
) -> str:
    """Writes the text that a model goes on with.

    Args:
        task ([`Task`]), kind (`str`), shots (`Sequence[Task]`, *optional*):
            The task, with its benchmark's kind and, for `"few_shot"`, examples.
        form (`str`):
            One of `PROMPT_FORMS`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            For `"chat"`: whose chat template is used. The text then has all special tokens, so tokenize it with
            `add_special_tokens=False`.

    Raises:
        `ValueError`: for an unknown kind or form, or one that the task, the tokenizer or the shots do not allow.
    """
    stop_strings(kind, form)  # checks them
    if form == "few_shot":
        return _few_shot(task, shots)
    if form == "complete":
        # Many tokenizers join a newline and the indent behind it, which a newline at the end would forbid.
        return task.prompt.rstrip() if kind == "humaneval" else task.prompt
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("`prompt_form` is 'chat' and the tokenizer has no chat template; use 'complete'.")
    message = {"role": "user", "content": f"{_INSTRUCTION}```python\n{task.prompt.strip()}\n```"}
    return f"{tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)}```python\n"


def stop_strings(kind: str, form: str) -> tuple[str, ...]:
    """Lists the texts that end answers to prompts of a form, one of `PROMPT_FORMS`, for tasks of a kind.

    The first of them in an answer, and what stands behind it, is no part of it.

    Raises:
        `ValueError`: for an unknown kind or form, or `"few_shot"` for another kind than `"mbpp"`.
    """
    if kind not in _STOPS:
        raise ValueError(f"`kind` is {kind!r}; known are {', '.join(_STOPS)}.")
    if form not in PROMPT_FORMS:
        raise ValueError(f"`prompt_form` is {form!r}; known are {', '.join(PROMPT_FORMS)}.")
    if form == "few_shot" and kind != "mbpp":
        raise ValueError(f"`prompt_form` is 'few_shot', which is for MBPP; use 'complete' for tasks of kind {kind!r}.")
    return {"complete": _STOPS[kind], "few_shot": (_DONE, _FENCE), "chat": (_FENCE,)}[form]


def sample_of(task: Task, form: str, text: str) -> Sample:
    """Cuts out what of an answer to a prompt of a form is judged: what stands before the first stop string.

    Answers to `"few_shot"` and `"chat"` are whole programs: they stand on lines of their own behind the prompt and
    define anew what it begins; but a script, which would read its input twice, stands alone.
    """
    stops = stop_strings(task.kind, form)
    if form == "complete":
        return Sample(cut_at_stop(text, stops))
    text = re.sub(r"\A\s*```[^\n`]*\n", "", text)  # a fence that the model opens once more
    text = re.sub(r"(?m)^from __future__ import .*\n", "", text)  # it may stand at a file's beginning only
    text = cut_at_stop(text, stops).rstrip() + "\n"
    return Sample(text, whole=True) if task.kind == "stdio" else Sample(_close(task.prompt) + text)


def _few_shot(task: Task, shots: Sequence[Task]) -> str:
    if len(shots) != 3 or not all(shot.solution for shot in shots):
        raise ValueError(
            f"`prompt_form` is 'few_shot' and there are {len(shots)} solved examples; it needs MBPP's tasks 2, 3 and "
            "4 with their `code`: give a file that has them too, or none, for the Hub's rows."
        )
    if task.task_id in {shot.task_id for shot in shots}:
        raise ValueError(f"Task {task.task_id!r} is an example of 'few_shot' prompts; use MBPP's test split.")
    every = (*shots, task)
    questions = [_SHOT.format(description=each.description, tests="\n".join(each.tests)) for each in every]
    answers = [f"{(shot.solution or '').removeprefix(shot.prompt).strip()}\n{_DONE}\n\n" for shot in shots]
    return "".join(map("".join, zip(questions, [*answers, ""], strict=True)))


def _close(prompt: str) -> str:
    """What must stand behind a prompt so that it is a program by itself: nothing, an end of line or a body."""
    end = "" if prompt.endswith("\n") else "\n"
    for body in ("", "pass\n", "    pass\n", "        pass\n"):
        try:
            ast.parse(prompt + end + body)
        except (SyntaxError, ValueError):
            continue
        return end + body
    return end
