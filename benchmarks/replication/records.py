"""What passes between the files of the replication: corpora, recipes, and what is measured.

A recipe is a frozen record of all that shapes a result, the recipe it starts from included; its hash is the name under
which the result is kept (`store.py`). `version` is raised by hand when code changes what the same settings give.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ra3_trl.testbed import Corpus


@dataclass(frozen=True)
class BaseRecipe:
    """Pre-training from scratch, AdamW with a cosine schedule: first on careful programs, with a right comment before
    each hard line, from which calculating is learned; then on the corpus.

    Comments copy operands from some ten tokens before, for which rotary angles must tell near positions apart: with a
    `rope_theta` of 10,000 this is learned much later. See benchmarks/LOG.md for the recipes that failed. With `start`
    the weights of that base are gone on with, and the corpus' further tokens are added.
    """

    seed: int
    careful_steps: int = 500
    steps: int = 1200
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    initializer_range: float = 0.08
    rope_theta: float = 100.0
    layers: int = 3
    width: int = 96
    careful: Corpus = field(default_factory=lambda: Corpus(stanzas=4, hard_rate=1.0, easy_rate=0.1))
    corpus: Corpus = field(default_factory=lambda: Corpus(hard_rate=0.4, easy_rate=0.1, right=0.75))
    start: BaseRecipe | None = None
    version: int = 1


@dataclass(frozen=True)
class MidRecipe:
    """Mid-training of a base on the expert's programs; without E-steps it is next-token prediction.

    The E-phase is short: it has converged after 15 updates, and at twice the rate, after 20, code suffers. RA3's
    annotation has the gate as its prior, which here is trained. `annotation_think_prob`: prior P(think) of annotation,
    -1 for the gate (`None`: the default; without E-steps no annotation). `settings`: further fields of
    [`HindsightConfig`] with their values. `base` may be mid-trained itself.
    """

    base: BaseRecipe | MidRecipe
    seed: int
    e_steps: int = 0
    m_steps: int = 60
    e_learning_rate: float = 5e-4
    learning_rate: float = 1e-3
    batch_size: int = 8
    num_latents: int = 8
    horizon: int = 1
    penalty: float = 0.2
    kl_coef: float = 0.0
    annotation_think_prob: float | None = None
    programs: int = 2000
    settings: tuple[tuple[str, Any], ...] = ()
    corpus: Corpus = field(default_factory=Corpus)
    version: int = 3  # 2: before the multi-sample bound


@dataclass(frozen=True)
class RlvrRecipe:
    """GRPO from a checkpoint on the tasks; `forced` puts the think prefix behind each prompt."""

    start: BaseRecipe | MidRecipe
    seed: int
    forced: bool = False
    steps: int = 40
    prompts: int = 16
    generations: int = 8
    learning_rate: float = 3e-4
    completion_tokens: int = 24
    corpus: Corpus = field(default_factory=lambda: Corpus(stanzas=2))
    version: int = 1


@dataclass(frozen=True)
class MeasureRecipe:
    """What is measured of a checkpoint, all of it on held-out programs, the same for all arms and seeds."""

    start: BaseRecipe | MidRecipe
    programs: int = 48
    tasks: int = 512
    num_latents: int = 8
    seed: int = 1_000_000
    corpus: Corpus = field(default_factory=Corpus)
    version: int = 1


@dataclass(frozen=True)
class Measures:
    """A checkpoint on held-out programs.

    Args:
        think_hard, think_easy (`float`):
            Mean P(think) before hard and before easy lines.
        comment_right (`float`):
            Share of comments, forced before hard lines and sampled, whose steps are all right.
        ce, elbo, bound_multi (`float`):
            Of `trainer.evaluate()`: cross-entropy and negative bounds in nats per token of code.
        accuracy, accuracy_forced, accuracy_never (`float`):
            Share of hard lines that are right when sampled: as the model likes, with a comment, without.
    """

    think_hard: float
    think_easy: float
    comment_right: float
    ce: float
    elbo: float
    bound_multi: float
    accuracy: float
    accuracy_forced: float
    accuracy_never: float


@dataclass(frozen=True)
class UseRecipe:
    """What is measured of how a checkpoint uses latents; the policy annotates left to right, with this horizon."""

    start: BaseRecipe | MidRecipe
    programs: int = 48
    tasks: int = 512
    horizon: int = 3
    seed: int = 1_000_000
    corpus: Corpus = field(default_factory=lambda: Corpus(predicates=True))
    version: int = 1


# Measures that lie between 0 and 1, so that their intervals do.
SHARES = frozenset({
    "think_hard", "think_easy", "comment_right", "accuracy", "accuracy_forced", "accuracy_never", "think_first",
    "think_second", "think_third", "rlvr_last",
    "comment_greedy", "thinks", "distinct", "transfer_accuracy", "transfer_forced", "transfer_never",
    "transfer_comment_right", "transfer_thinks", "mbpp_right", "mbpp_told_to_think", "mbpp_told_not_to",
    "mbpp_thinks", "mbpp_best_pays", "mbpp_think_there", "mbpp_think_elsewhere", "rlvr_best",
})  # fmt: skip


@dataclass(frozen=True)
class LatentUse:
    """How a checkpoint uses latents where several lines can share one.

    Args:
        think_first, think_second, think_third (`float`):
            Mean P(think) before a stanza's hard lines, on programs without comments.
        ce_policy (`float`):
            Of `trainer.evaluate()`: cross-entropy per token of code of programs that the policy has annotated.
        program_latents (`float`):
            Latents of such a program.
        task_latents, task_latent_tokens (`float`):
            Comments, and their tokens with `#` and newline, that are sampled with a stanza's hard lines.
    """

    think_first: float
    think_second: float
    think_third: float
    ce_policy: float
    program_latents: float
    task_latents: float
    task_latent_tokens: float


@dataclass(frozen=True)
class FillRecipe:
    """What is measured of a checkpoint that can fill in the middle."""

    start: BaseRecipe | MidRecipe
    tasks: int = 256
    seed: int = 1_000_000
    corpus: Corpus = field(default_factory=Corpus)
    version: int = 2


@dataclass(frozen=True)
class Fills:
    """What a checkpoint could learn from filling in.

    Args:
        filled_right (`float`):
            Share of comments before hard lines that it fills in right, knowing the line.
        right_logp (`float`):
            Mean log-probability of the right comment behind the code so far and `#`, in nats.
        right_gain (`float`):
            Mean of what that comment adds to the log-probability of the hard lines, in nats.
    """

    filled_right: float
    right_logp: float
    right_gain: float


@dataclass(frozen=True)
class Curve:
    """Accuracy before each update of RLVR (`accuracy[k]` is after `k` updates), of an update's samples."""

    accuracy: tuple[float, ...]
    samples: int

    def steps_to(self, level: float) -> int | None:
        """Updates done when the accuracy, averaged over that update and the next, reached `level` first."""
        pairs = zip(self.accuracy, self.accuracy[1:], strict=False)
        return next((k for k, pair in enumerate(pairs) if sum(pair) / 2 >= level), None)

    @property
    def last(self) -> float:
        """Mean of the last tenth."""
        tail = self.accuracy[-max(1, len(self.accuracy) // 10) :]
        return sum(tail) / len(tail)


# ---- a real checkpoint ----


class TrainingRecipe(Protocol):
    """What any training of a real checkpoint sets."""

    @property
    def seed(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...


@dataclass(frozen=True)
class TraceCorpus:
    """How programs of `traces.py` are written.

    Args:
        traced (`float`, *optional*, defaults to `0`):
            Share of the programs with a trace before the assertion; 0 is the expert.
        right (`float`, *optional*, defaults to `1`):
            Share of the traces that are right.
        useless (`float`, *optional*, defaults to `0`):
            Share of the programs with a comment that says nothing before their first assignment.
    """

    traced: float = 0.0
    right: float = 1.0
    useless: float = 0.0
    version: int = 1


KINDS = ("integers", "strings", "conditionals", "lists")


@dataclass(frozen=True)
class KindCorpus(TraceCorpus):
    """The same with programs of several kinds, each as often. The other half of `KINDS` is kept for the transfer."""

    kinds: tuple[str, ...] = KINDS[:2]


@dataclass(frozen=True)
class TraceTask:
    """A program up to its last line `assert result == 6`; the right comment, `# x = 3, y = 7, x = 6`; the value."""

    prompt: str
    trace: str
    value: int | str | list[int]


@dataclass(frozen=True)
class PreparedRecipe:
    """A real checkpoint trained on programs with traces, by next-token prediction with a cosine schedule.

    `model` is a folder; `None` is the demo's SmolLM2-135M-Instruct.
    """

    model: str | None = None
    seed: int = 0
    data_seed: int = 1
    steps: int = 800
    batch_size: int = 8
    learning_rate: float = 2e-4
    warmup_steps: int = 5
    corpus: TraceCorpus = field(default_factory=lambda: TraceCorpus(traced=0.6, right=0.95, useless=0.15))
    version: int = 1


@dataclass(frozen=True)
class TraceMidRecipe:
    """Mid-training of a prepared checkpoint on the expert's programs, by the package's defaults; without E-steps it is
    next-token prediction.

    `settings`: further fields of [`RA3Config`] with their values. `defaults`: what the fields not set here had as
    defaults, which shape the result as much: with other defaults it is another run (`real.on_base` fills them in).
    """

    base: PreparedRecipe
    seed: int
    e_steps: int = 0
    m_steps: int = 100
    learning_rate: float = 5e-5
    batch_size: int = 8
    warmup_steps: int = 5
    programs: int = 2000
    max_latent_length: int = 24
    settings: tuple[tuple[str, Any], ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    corpus: TraceCorpus = field(default_factory=TraceCorpus)
    version: int = 1


@dataclass(frozen=True)
class TraceMeasureRecipe:
    """What is measured of a checkpoint on held-out programs, the same for all arms and seeds; `drawn` programs are
    others, with `draws` comments each: one, since four of a program that gets it right are one and the same. Of
    `corpus` only the kinds matter; `comment_tokens` of a drawn comment, `tokens` of a comment and the assertion, if
    other than those of integers."""

    start: PreparedRecipe | TraceMidRecipe
    tasks: int = 200
    drawn: int = 160
    draws: int = 1
    task_seed: int = 99
    drawn_seed: int = 123
    corpus: TraceCorpus = field(default_factory=TraceCorpus)
    comment_tokens: int | None = None
    tokens: int | None = None
    version: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its programs."""
        return self.corpus.kinds if isinstance(self.corpus, KindCorpus) else KINDS[:1]


@dataclass(frozen=True)
class TraceMeasures:
    """A checkpoint on held-out programs. Shares are of all programs, greedy unless drawn.

    Args:
        right, told_to_think, told_not_to (`float`):
            Assertions right: left to itself, with `#` forced, with the assertion forced.
        thinks, comment_right (`float`):
            Programs that go on with a comment, and with the right trace.
        distinct, drawn_right (`float`):
            Different ones among the comments drawn at temperature 1 behind a forced `#`, and right ones.
        think_there, think_elsewhere (`float`):
            Mean P(think) before the assertion and before the other lines.
        most_frequent (`dict[str, Any]`):
            `text` and `share` of the commonest of the drawn comments.
        samples (`list[dict[str, str]]`):
            Drawn comments to be read, `text` beside the right `trace`.
    """

    right: float
    thinks: float
    comment_right: float
    told_to_think: float
    told_not_to: float
    distinct: float
    drawn_right: float
    think_there: float
    think_elsewhere: float
    most_frequent: dict[str, Any]
    samples: list[dict[str, str]]
