"""`Policy`: a checkpoint that is ready to think, for notebooks, commands and the trainer alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import RA3Config
from ..config_fields import beside_trainers, blaming, own_fields
from ..config_file import RA3_CONFIG, read_settings
from ..generation import AutoModelForCausalLMWithAbstractionHead
from ..kinds import checked
from ..models import (
    AbstractionConfig,
    AbstractionHead,
    check_vocabulary,
    context_length,
    end_ids,
    load_head,
    load_model,
    load_tokenizer,
    place_of,
    state_width,
)
from ..records import AnnotatedExample, Document, Latent, RolloutGroup
from ..rollout import Backbone, Boundaries, NoiseKey, RolloutEngine, SamplingParams, build_engine, evaluating
from ..segmentation import Segmenter, build_token_table, find_format, prompt_ids, readable_bytes, require_tags
from .annotate import MARKUP, annotate
from .bounds import evaluate_documents, finish_metrics
from .decisions import HeadDecisions
from .propose import OWN_LATENTS, Proposer
from .text import token_text


logger = logging.getLogger(__name__)
_REPLACED = (
    "`attn_implementation` is %r, which the branch engine replaces in E-phases, annotation and evaluation by "
    "PyTorch's fused attention with a mask of branches. The M-step keeps %r; with `engine='expand'` everything does."
)
# Of the settings that a checkpoint was trained with: those that say how it thinks and how thoughts are valued.
THINKING = (
    "action_format", "existing_comments", "max_length", "num_latents", "max_latent_length", "temperature", "top_k",
    "top_p", "gate", "boundary_selection", "boundary_budget", "annotation_skip", "horizon", "discount",
    "line_reduction", "penalty", "exploration", "annotation", "prior_alpha",
)  # fmt: skip


@runtime_checkable
class Draws(Protocol):
    """What draws and scores latents as a [`~ra3_trl.rollout.RolloutEngine`] does, whatever its class."""

    def rollout(self, *args: Any) -> RolloutGroup: ...

    def score(self, *args: Any) -> RolloutGroup: ...


@checked
class Policy:
    """
    A language model with all that latents need: tokenizer, action format, segmenter, rollout engine, abstraction head
    and settings. It writes latents, scores them, annotates and evaluates; it does not learn.

    Example:

    ```python
    from ra3_trl import Policy

    policy = Policy.open("qwen-ra3", num_latents=8)
    (document,) = policy.segment("def area(r):\\n    return 3.14 * r * r\\n")
    group = policy.rollout(document)  # 8 latents at each boundary, and the next lines' log-probs under each
    print(policy.text(policy.annotate(document)))  # the code with the latents that pay
    print(policy.evaluate([document])["elbo"], policy.generate("def area(r):\\n", max_new_tokens=32))
    ```

    Args:
        engine ([`~ra3_trl.rollout.RolloutEngine`]):
            The model with its vocabulary and sampling settings.
        args ([`RA3Config`]):
            `num_latents`, `horizon`, `discount`, ..., `seed`.
        segmenter ([`~ra3_trl.segmentation.Segmenter`], *optional*):
            Tokenizer and action format; only `segment`, `text` and `generate` need it.
        head ([`HeadDecisions`], *optional*):
            An abstraction head, with what it decides.
        proposer ([`Proposer`], *optional*):
            Where the latents of annotation and bounds come from; the policy itself by default.
    """

    def __init__(
        self,
        engine: RolloutEngine | Draws,
        args: RA3Config,
        segmenter: Segmenter | None = None,
        head: HeadDecisions | None = None,
        proposer: Proposer = OWN_LATENTS,
    ):
        self.engine = cast(RolloutEngine, engine)
        self.args = args
        self._segmenter = segmenter
        self.head = head
        self.proposer = proposer
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # the trainer's mixed precision

    # ---- opening ----

    @classmethod
    def open(
        cls,
        model: str | Path | PreTrainedModel | PeftModel | AutoModelForCausalLMWithAbstractionHead,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Policy:
        """Opens a checkpoint with its abstraction head and the settings it was trained with.

        Args:
            model (`str` or `Path` or model):
                A folder, a Hub id (an adapter's loads with its base), a model, or one with an abstraction head.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                A fast tokenizer; `None` is the checkpoint's.
            model_init_kwargs (`dict[str, Any]`, *optional*):
                Arguments of `from_pretrained`: `revision`, `dtype` (float32 by default), `token`, ...
            **changes:
                Fields of [`RA3Config`] to set otherwise than in training; `use_cpu=True` stays off an accelerator.

        Raises:
            `ValueError`: for a checkpoint or settings that can't work together, with the cure.
            `OSError`: if there is no such checkpoint, or the Hub can't be reached.
        """
        head: AbstractionHead | None = None
        saved: dict[str, Any] = {}
        place = place_of(model_init_kwargs)
        if isinstance(model, AutoModelForCausalLMWithAbstractionHead):
            tokenizer, head, saved = tokenizer or model.tokenizer, model.abstraction_head, model.settings or {}
            model = model.pretrained_model
        name = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
        tokenizer = tokenizer or load_tokenizer(name, model_init_kwargs)  # says best that there is no such checkpoint
        if isinstance(model, (str, Path)):
            saved = read_settings(name, **place) or {}
            model = name
        args = open_settings(saved, changes, name)
        action_format = find_format(args.action_format)
        require_tags(tokenizer, action_format)  # untrained tags would say nothing
        loaded = load_model(model, model_init_kwargs, None)
        if head is None and isinstance(model, str):
            head = load_head(name, state_width(loaded), **place)
        check_vocabulary(loaded, tokenizer)
        if not loaded.config.to_dict().get("quantization_config"):
            loaded.to(args.device)  # type: ignore[arg-type]  # its decorator hides the signature
        loaded.eval()
        if head is not None and (not head.config.trained_on or head.config.action_format != args.action_format):
            head = None  # it knows nothing of such boundaries
        if head is None or not args.abstraction_head:
            for field, other in (("gate", "token"), ("boundary_selection", "gate")):
                if changes.get(field) == "head":
                    raise ValueError(
                        f"`{field}` is 'head', but {name!r} has no trained abstraction head for "
                        f"{args.action_format!r}; set `{field}` to {other!r}."
                    )
                setattr(args, field, other)
            head = None
        decisions = None if head is None else HeadDecisions(head.to(args.device), args)
        policy = cls.of_model(loaded, tokenizer, args, decisions)
        if args.bf16 or args.fp16:  # nothing wraps this model's forward, as accelerate does a trainer's
            policy.autocast = partial(torch.autocast, args.device.type, torch.bfloat16 if args.bf16 else torch.float16)
        return policy

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        args: RA3Config,
        head: HeadDecisions | None = None,
        room_for_latents: bool = True,
    ) -> Policy:
        """Makes a policy of a model that is at hand; the engine is checked on it.

        Args:
            room_for_latents (`bool`, *optional*, defaults to `True`):
                Whether chunks of text leave a fifth of `max_length` free.

        Raises:
            `ValueError`: for an engine that is not exact on this model, and a `max_length` that can't be kept.
        """
        backbone = Backbone(model, args.router_aux_loss_coef)
        longest = chunk_length(args, context_length(backbone.causal_lm), room_for_latents)
        action_format = find_format(args.action_format)
        table = build_token_table(tokenizer, backbone.vocab_size, end_ids(backbone.causal_lm), action_format)
        params = SamplingParams(args.max_latent_length, args.temperature, args.top_k, args.top_p)
        with backbone.gathered():
            engine = build_engine(args.engine, backbone, table, params, args.max_branch_tokens)
        attention = backbone.causal_lm.config._attn_implementation or ""
        if engine.name == "branch" and "flash" in attention:
            logger.warning(_REPLACED, attention, attention)
        return cls(engine, args, Segmenter(tokenizer, action_format, longest, args.existing_comments, True), head)

    # ---- parts ----

    @property
    def backbone(self) -> Backbone:
        return self.engine.backbone

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        return self.backbone.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.segmenter.tokenizer

    @property
    def segmenter(self) -> Segmenter:
        if self._segmenter is None:
            raise ValueError("`segmenter` is missing; make the policy by `Policy.open` or give it one.")
        return self._segmenter

    def changed(self, **parts: Any) -> Policy:
        """A copy with other `args`, `head` or `proposer`; model and engine are shared."""
        other = copy(self)
        for name, value in parts.items():
            setattr(other, name, value)
        return other

    @contextmanager
    def inference(self, whole: bool = True) -> Iterator[None]:
        """No gradients, no dropout, the run's mixed precision and, of sharded weights, all of them inside.

        Who puts other weights in their place gathers anew: not `whole` then.
        """
        gathered = self.backbone.gathered if whole else nullcontext
        with torch.no_grad(), evaluating(self.model), self.autocast(), gathered():
            yield

    # ---- thinking ----

    def segment(self, text: str, doc_id: int = 0, prompt_chars: int = 0) -> list[Document]:
        """Cuts a text into chunks with their boundaries; the first `prompt_chars` characters get none. `doc_id` keys
        the noise of its latents."""
        return self.segmenter(doc_id, text, prompt_chars)

    def decide(self, group: RolloutGroup) -> RolloutGroup:
        """The group with the gate in use: the head's where `args.gate` says so, else the tokens'."""
        return group if self.head is None else self.head.decide(group)

    def trunk(self, document: Document) -> RolloutGroup:
        """Scores a document as it stands: log-probs of its lines and gates, and no latents."""
        with self.inference(whole=False):
            return self.decide(self.engine.trunk(document))

    def rollout(
        self,
        document: Document,
        boundaries: Boundaries | None = None,
        num_latents: int | None = None,
        noise: NoiseKey | None = None,
    ) -> RolloutGroup:
        """Draws latents at `boundaries` (all by default) and scores the next `args.horizon` lines under each.

        Returns:
            [`~ra3_trl.records.RolloutGroup`], log-probs in nats; `losses.compute_returns` turns them into gains.
        """
        where = document.boundaries if boundaries is None else boundaries
        count = self.args.num_latents if num_latents is None else num_latents
        if count < 1:
            raise ValueError(f"`num_latents` is {count}; it must be at least 1.")
        if not callable(where) and (wrong := sorted(set(where) - set(document.boundaries))):
            raise ValueError(f"`boundaries` holds {wrong[0]}, where no latent may stand; see `document.boundaries`.")
        with self.inference(whole=False):
            return self.decide(self.engine.rollout(document, where, count, self.args.horizon, noise or self._noise))

    def score(
        self, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]]
    ) -> RolloutGroup:
        """Scores the next `args.horizon` lines under given latents, as many at each boundary."""
        with self.inference(whole=False):
            return self.decide(self.engine.score(document, boundaries, latents, self.args.horizon))

    def propose(
        self, documents: Sequence[Document], boundaries: Sequence[Boundaries], num_latents: int, noise: NoiseKey
    ) -> list[RolloutGroup]:
        """As `rollout` of each document, with latents of the `proposer`."""
        engine, horizon = self.engine, self.args.horizon
        with self.inference(whole=False):
            groups = self.proposer.propose(engine, documents, boundaries, num_latents, horizon, noise)
        return [self.decide(group) for group in groups]

    def annotate(self, document: Document, noise: NoiseKey | None = None, way: str | None = None) -> AnnotatedExample:
        """Splices latents into a document, see [`annotate`]; `text` reads the result."""
        if way not in (None, "policy", "resample"):
            raise ValueError(f"`way` is {way!r}; use 'policy' or 'resample', or leave it out for `args.annotation`.")
        with self.inference():
            return annotate(self, document, noise or self._noise, way)

    def evaluate(self, documents: Sequence[Document]) -> dict[str, float]:
        """Held-out numbers, those of `trainer.evaluate()` without their prefix: `ce`, `elbo`, `bound_multi`, ... in
        nats per code token, `think_rate`, `gain`, ..."""
        with self.inference(), tqdm(total=len(documents), desc="Evaluating", unit="document", disable=None) as bar:
            return finish_metrics(evaluate_documents(self, documents, bar.update))

    def generate(self, prompt: str, think: str = "auto", threshold: float | None = None, **kwargs: Any) -> str:
        """Completes a prompt, with latents where `think` says, see
        [`~ra3_trl.AutoModelForCausalLMWithAbstractionHead.generate`]; gives the new text."""
        if kwargs.get("num_return_sequences", 1) != 1:
            raise ValueError(
                "`num_return_sequences` is above 1; ask once for each text, or use the wrapper's `generate`."
            )
        model = AutoModelForCausalLMWithAbstractionHead(self.model, self._generating_head(), self.tokenizer)
        ids = torch.tensor([prompt_ids(self.tokenizer, prompt)], dtype=torch.long, device=self.backbone.device)
        if not ids.numel():
            raise ValueError("`prompt` has no tokens; give some text, such as a newline.")
        output = model.generate(ids, attention_mask=torch.ones_like(ids), think=think, threshold=threshold, **kwargs)
        return self._decode(output[0, ids.shape[1] :].tolist())

    def _generating_head(self) -> AbstractionHead:
        """The head, or a fresh one, that says of the format and the latents' length what the settings do."""
        if self.head is None:
            head = AbstractionHead(AbstractionConfig(state_width(self.model)))
        else:
            head = copy(self.head.head)
        args = self.args
        head.config = replace(head.config, action_format=args.action_format, max_latent_length=args.max_latent_length)
        return head

    def text(self, source: Document | AnnotatedExample) -> str:
        """Decodes a document or an annotated one, without special tokens but for the action format's tags."""
        return self._decode(source.input_ids)

    def _decode(self, ids: Sequence[int]) -> str:
        readable = readable_bytes(self.tokenizer, self.segmenter.format)
        # A model may have more ids than its tokenizer, and write them.
        return token_text(self.tokenizer, [i for i in ids if i < len(readable) and readable[i] is not None])

    @property
    def _noise(self) -> NoiseKey:
        return NoiseKey(self.args.seed, 1, 0)


def open_settings(saved: dict[str, Any], changes: dict[str, Any], name: str = "the checkpoint") -> RA3Config:
    """The settings of a policy: how the checkpoint `name` was trained to think, with `changes`; nothing of its
    training.

    Raises:
        `ValueError`: for a field that there is none of, or a bad value, with the file's name if it is the file's.
    """
    thinking = {field: saved[field] for field in THINKING if field in saved}
    settings = thinking | changes
    if "penalty" not in changes and settings.get("penalty") == math.inf:
        del settings["penalty"]  # how one trains without latents; asked for some, the policy places what pays
    unknown = sorted(set(changes) - set(own_fields(RA3Config)) - {"use_cpu", "seed", "bf16", "fp16", "output_dir"})
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no setting of a policy; see `RA3Config`.")
    if settings.get("annotation") is None:
        settings["annotation"] = "resample"
    # Of the trainer's checks only those of an E-phase could refuse what a policy can do, such as with one latent.
    fixed: dict[str, Any] = {"e_steps": 0, "report_to": "none"}
    with beside_trainers(), blaming(f"{RA3_CONFIG} of {name!r}", lambda: RA3Config(**fixed | thinking)):
        return RA3Config(**fixed | settings)


def chunk_length(args: RA3Config, context: int | None, latents: bool) -> int:
    """Longest chunk of a text in tokens: `max_length`, less room for latents (a fifth) where there will be any.

    Raises:
        `ValueError`: if the model's `context` is shorter than `max_length`, or latents leave no room for text.
    """
    if args.max_length is None:
        if context is None:
            raise ValueError("`max_length` is None, and the model has no longest text; give a number.")
        args.max_length, args.packing = context, False  # nothing bounds a packed row
    if args.max_length > (context or args.max_length):
        raise ValueError(
            f"`max_length` is {args.max_length}, but the model's context holds {context} tokens; lower it."
        )
    room = max(args.max_length // 5, args.max_latent_length + MARKUP) if latents else 0
    if args.max_length - room < 8:
        raise ValueError(
            f"`max_length` is {args.max_length}: latents of max_latent_length={args.max_latent_length} tokens "
            "leave no room for text; raise `max_length`."
        )
    return args.max_length - room
