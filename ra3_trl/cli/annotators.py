"""`ra3 annotate --annotator`: who proposes latents in the policy's place, and what became of the proposals."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import public_name, write_whole
from ..hub import weights_hash
from ..policy import Annotation, Policy, Tally
from ..policy.prompted import AskingSettings, ChatServer, LocalModel, ModelAnnotator, Prompt
from ..policy.prompted.prompt import DEFAULT
from ..policy.prompted.server import check_url, require_openai
from ..policy.traces import TraceAnnotator
from ..sandbox import SandboxError
from .option_groups import ASKING_FIELDS


ANNOTATORS = ("policy", "trace")  # and language models, by their names
KEEP = ("resample", "all")
# Where nothing else is said: a trace has some 40 tokens, and an untrained gate would keep none.
SETTINGS = {"max_latent_length": 96, "prior_alpha": 0.5}
_FORMATS = ("python", "python_tags")
_ASKING = tuple(f"annotator_{name}" for name in ("base_url", "prompt", *ASKING_FIELDS, "prices"))
_WIDTH = 40


def check_annotator(options: argparse.Namespace) -> None:
    """Refuses what can't work.

    Raises:
        `ValueError`: with field, value and cure.
    """
    if options.keep not in KEEP:
        raise ValueError(f"`keep` is {options.keep!r}; use one of {', '.join(map(repr, KEEP))}.")
    if options.report and not Path(options.report).resolve().parent.is_dir():
        raise ValueError(f"`report` is {options.report!r}; name a file in a folder that is there.")
    if options.annotator == "policy":
        for name in ("keep", "report"):
            if vars(options)[name] not in ("resample", None):
                raise ValueError(
                    f"`{name}` is {vars(options)[name]!r}, but the policy's own latents are chosen by `annotation`; "
                    "name an `annotator`, such as trace, or leave it out."
                )
    elif options.proposal:
        raise ValueError(
            f"`annotator` is {options.annotator!r} and `proposal` {options.proposal!r}, which is how the policy "
            "proposes; leave one of the two out."
        )
    if options.annotator not in ANNOTATORS:
        _check_model(options)
        return
    for name in _ASKING:
        if vars(options)[name] is not None:
            raise ValueError(
                f"`{name}` is {vars(options)[name]!r}, but the annotator {options.annotator!r} is no language model; "
                "name one as `annotator`, or leave it out."
            )


def _check_model(options: argparse.Namespace) -> None:
    """Refuses a language model that can't be asked, before anything is loaded."""
    _asking(options), _prompt(options)
    if any(not 0 <= price < math.inf for price in options.annotator_prices or ()):
        raise ValueError(f"`annotator_prices` is {options.annotator_prices}; give two numbers of at least 0.")
    same = _place(options.annotator) == _place(options.checkpoint)
    if options.annotator_base_url:  # of a server the name is all that is known
        same = same or public_name(options.annotator) == public_name(options.checkpoint)
    if same:
        raise _is_the_student(options)
    if options.annotator_base_url:
        with _prefixed():
            check_url(options.annotator_base_url)
            if not options.dry_run:
                require_openai("`base_url`")
        return
    try:
        LocalModel(options.annotator, model_init_kwargs={"trust_remote_code": options.trust_remote_code})
    except ValueError as error:
        raise ValueError(
            f"`annotator` is {options.annotator!r}; use one of {', '.join(map(repr, ANNOTATORS))}, or the folder "
            f"or Hub id of a language model, or set `annotator_base_url`. ({error})"
        ) from error


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def _is_the_student(options: argparse.Namespace) -> ValueError:
    return ValueError(
        f"`annotator` is {options.annotator!r}, which is the checkpoint, the student; name another model, or leave "
        "`annotator` out: the checkpoint then writes latents of its own."
    )


@contextmanager
def _prefixed() -> Iterator[None]:
    """Calls the settings by their flags."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`annotator_{str(error).removeprefix('`')}") from error


def _asking(options: argparse.Namespace) -> AskingSettings:
    values = {name: vars(options)[f"annotator_{name}"] for name in ASKING_FIELDS}
    with _prefixed():
        return AskingSettings(**{name: value for name, value in values.items() if value is not None})


def _prompt(options: argparse.Namespace) -> Prompt:
    with _prefixed():
        return Prompt.read(options.annotator_prompt or DEFAULT)


def check_format(options: argparse.Namespace, action_format: str) -> None:
    """
    Raises:
        `ValueError`: if an annotator can't read texts of a format.
    """
    if options.annotator == "trace" and action_format not in _FORMATS:
        raise ValueError(
            f"`action_format` is {action_format!r}, but the annotator {options.annotator!r} runs Python; use one of "
            f"{', '.join(map(repr, _FORMATS))}."
        )


@contextmanager
def opened_annotation(options: argparse.Namespace, policy: Policy) -> Iterator[Annotation | None]:
    """Opens the annotator, for a policy that is its student, and closes it; `None` where the policy proposes.

    Raises:
        `ValueError`: if there is no sandbox.
    """
    if options.annotator == "policy":
        yield None
        return
    annotator: ModelAnnotator | TraceAnnotator
    if options.annotator == "trace":
        try:
            annotator = TraceAnnotator()
        except SandboxError as error:
            raise ValueError(f"`annotator` is 'trace', which runs programs: {error}") from error
    else:
        annotator = ModelAnnotator(_open_model(options, policy), _prompt(options))
    try:
        yield Annotation(annotator, keep_all=options.keep == "all")
    finally:
        annotator.close()


def _open_model(options: argparse.Namespace, policy: Policy) -> LocalModel | ChatServer:
    settings, seed = _asking(options), policy.args.seed
    if options.annotator_base_url:

        def count(prompt: str) -> int:  # by the student's tokenizer, since the server's is not here
            return len(policy.tokenizer(prompt).input_ids)

        return ChatServer(options.annotator, options.annotator_base_url, settings, seed, count)
    kwargs = {"trust_remote_code": options.trust_remote_code}
    return LocalModel(options.annotator, settings, kwargs, policy.args.device, seed)


def origin_of(options: argparse.Namespace, policy: Policy, annotation: Annotation | None) -> dict[str, Any]:
    """What shapes the result, where it is not the policy that proposes.

    Raises:
        `ValueError`: if the annotator has the student's weights.
    """
    if annotation is None:
        return {}
    origin = {"annotator": public_name(options.annotator), "keep": options.keep}
    annotator = annotation.annotator
    if not isinstance(annotator, ModelAnnotator):
        return origin
    model = annotator.model
    origin |= {"annotator_prompt": annotator.prompt.digest}
    origin |= {f"annotator_{name}": value for name, value in _asking(options).shaping.items()}
    if isinstance(model, ChatServer):
        return origin | {"annotator_base_url": model.base_url}
    if _same_weights(model.model, policy.model):
        raise _is_the_student(options)
    return origin | {"annotator_weights": weights_hash((model.model,), model.tokenizer)}


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights, be it as other dtypes; ends at the first difference."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.shape == theirs[name].shape and torch.equal(tensor, theirs[name].to(tensor.device, tensor.dtype))
        for name, tensor in ours.items()
    )


@contextmanager
def telling(annotation: Annotation | None, report: str | None) -> Iterator[None]:
    """Lets an annotator work inside; at the end, of whatever kind, it tells what became of the proposals."""
    if annotation is None:
        yield
        return
    annotator = annotation.annotator
    try:
        yield
    finally:
        spent = dict(annotator.spent) if isinstance(annotator, ModelAnnotator) else {}
        if spent:
            print(
                f"{spent['requests']:,} answers, of {spent['prompt_tokens']:,} prompt tokens and "
                f"{spent['answer_tokens']:,} answer tokens."
            )
        print("\n".join(said(annotation.tally)))
        if report:
            content = annotation.tally.report() | ({"spent": spent} if spent else {})
            write_whole(report, (json.dumps(content, indent=1) + "\n").encode())


def said(tally: Tally) -> list[str]:
    """Lines that tell a tally."""
    report = tally.report()
    lines = [f"{report['texts']:,} texts, {report['proposed']:,} proposals, {report['kept']:,} kept."]
    for title, counts in (("Not kept", report["dropped"]), ("No proposal", report["none"])):
        lines += (
            [f"{title}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items())] if counts else []
        )
    if report["mean_gain"] is not None:
        lines.append(f"Nats that they bring the student, {report['mean_gain']:+.2f} on average:")
        edges, most = report["gains"]["edges"], max(report["gains"]["counts"])
        names = [f"below {edges[0]:g}", *(f"from {edge:g}" for edge in edges)]
        for name, count in zip(names, report["gains"]["counts"], strict=True):
            lines.append(f"{name:>10} {count:>7,} {'#' * -(-_WIDTH * count // most)}")
    for title in ("best", "worst"):
        for example in report[title]:
            comment, line = (
                example[part].strip()[:70].encode("ascii", "backslashreplace").decode() for part in ("comment", "line")
            )
            lines.append(f"{title} {example['gain']:+.2f}: # {comment}  |  {line}")
    return lines
