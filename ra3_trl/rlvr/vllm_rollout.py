"""Completions of TRL's `GRPOTrainer` by its vLLM, in its process or a server, with stops and latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ..generation.requests import RequestThinking
from ..generation.sampling import Completion, CompletionSettings
from ..generation.vllm_engine import RowReader, request_words


if TYPE_CHECKING:
    from trl import GRPOTrainer


def draw_by_vllm(
    trainer: GRPOTrainer,
    prompt_ids: list[list[int]],
    settings: CompletionSettings,
    thinking: RequestThinking | None,
    ends: tuple[int, ...],
) -> tuple[list[Completion], list[list[float | None]]]:
    """Draws one completion of each prompt, whose neighbours are the same prompt again, as TRL repeats it.

    Temperature and the like are the trainer's, which has brought vLLM's weights up to date before it asks.

    Returns:
        `tuple[list[Completion], list[list[float | None]]]`: completions, and the log-probs that their tokens were
        drawn with, behind the think knob and temperature: TRL's importance weight is the model's by these. What was
        forced has 0.

    Raises:
        `ValueError`: where the server does not think as it is asked to.
        `ConnectionError`: where the server does not answer.
    """
    args, generation = trainer.args, trainer.vllm_generation
    server = args.vllm_mode == "server"
    generation.generation_kwargs = request_words(settings, thinking, ends, server)
    count = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    with server_answers(generation) if server else nullcontext():
        _, rows, logps, _ = generation.generate(prompts=prompt_ids, images=None, num_generations=count)
    reader = RowReader(trainer.processing_class, thinking, ends, settings.stop)
    drawn = [reader(prompt, list(row)) for prompt, row in zip(prompt_ids, rows, strict=True)]
    return drawn, [_chosen(of_row, len(completion.token_ids)) for completion, of_row in zip(drawn, logps, strict=True)]


@contextmanager
def server_answers(generation: Any) -> Iterator[None]:
    """Inside, a server that has gone away is a `ConnectionError` that says what to do; TRL has tried for a minute."""
    try:
        yield
    except OSError as error:
        raise ConnectionError(
            f"the vLLM server at {generation.server_base_url or f'{generation.server_host}:{generation.server_port}'} "
            f"does not answer ({type(error).__name__}). Start it again and go on with `resume_from_checkpoint`."
        ) from error


def watch_server(trainer: GRPOTrainer) -> None:
    """Has a server named that goes away between two rollouts: TRL brings its weights up to date before each."""
    generation: Any = trainer.vllm_generation
    sync = generation.sync_weights

    def sync_weights() -> None:
        with server_answers(generation):
            sync()

    generation.sync_weights = sync_weights


def _chosen(logps: Sequence[Sequence[float | None]], count: int) -> list[float | None]:
    """Of the first `count` tokens the log-prob of each; those of others that were asked for are left out."""
    return [of_token[0] for of_token in logps[:count]]
