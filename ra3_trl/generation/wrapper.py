"""A causal language model with its abstraction head: one object to train, generate with, save and push."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..config import RA3Config
from ..config_file import read_settings, write_settings
from ..files import written_aside
from ..kinds import checked
from ..models import (
    AbstractionConfig,
    AbstractionHead,
    end_ids,
    load_head,
    load_model,
    place_of,
    save_head,
    state_width,
)
from ..outgoing import check_upload, process_tokens
from .processor import ThinkLogitsProcessor, refuse_several_tokens


logger = logging.get_logger(__name__)
_HEAD = "abstraction_head."


@dataclass
class CausalLMOutputWithAbstraction(CausalLMOutputWithPast):
    """
    What [`AutoModelForCausalLMWithAbstractionHead`] returns: what its language model does, and the head's part.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*):
            Next-token loss (with `labels`) plus the head's (with `think_labels` or `gain_labels`).
        logits (`torch.Tensor` of shape `(batch, length, vocab_size)`):
            The language model's, as are the cache, `hidden_states` and `attentions`.
        think_logits (`torch.Tensor` of shape `(batch, length)`):
            Log-odds of beginning a latent behind each token; of use behind those that end a line.
        gain (`torch.Tensor` of shape `(batch, length)`):
            Expected rise of the next lines' log-likelihood from a latent there, in nats.
    """

    think_logits: torch.Tensor | None = None
    gain: torch.Tensor | None = None


@checked
class AutoModelForCausalLMWithAbstractionHead(nn.Module):
    """
    A causal language model with an [`~ra3_trl.models.AbstractionHead`], in the manner of TRL's former value head.

    Other attributes are the language model's: `config`, `device`, `gradient_checkpointing_enable()`, ... The head
    reads detached states, so its loss leaves the language model as it is.

    Example:

    ```python
    model = AutoModelForCausalLMWithAbstractionHead.from_pretrained("org/name")
    model.generate(**tokenizer("def area(r):\\n", return_tensors="pt"), think="auto", max_new_tokens=64)
    ```

    Args:
        pretrained_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The language model.
        abstraction_head ([`~ra3_trl.models.AbstractionHead`], *optional*):
            The head; `None` is a fresh one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            For `generate`, and saved with the model. `from_pretrained` takes the checkpoint's, or its base's.

    Raises:
        `ValueError`: for a head of another hidden size.
    """

    def __init__(
        self,
        pretrained_model: PreTrainedModel | PeftModel,
        abstraction_head: AbstractionHead | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        width = state_width(pretrained_model)
        head = AbstractionHead(AbstractionConfig(width)) if abstraction_head is None else abstraction_head
        if head.config.hidden_size != width:
            raise ValueError(
                f"`abstraction_head` is for hidden states of {head.config.hidden_size} numbers, and the model's have "
                f"{width}; pass the head of this model, or `None` for a fresh one."
            )
        self.pretrained_model = pretrained_model
        self.abstraction_head = head.to(pretrained_model.device)
        self.tokenizer = tokenizer
        self.settings: dict[str, Any] | None = None
        self.register_load_state_dict_pre_hook(_take_plain_names)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model: str | Path | PreTrainedModel | PeftModel,
        *,
        peft_config: PeftConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> AutoModelForCausalLMWithAbstractionHead:
        """Loads model, head and settings of a checkpoint; a fresh head, with a warning, where it has none.

        Args:
            pretrained_model (`str` or `Path` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                A folder, a Hub id or a model (which gets a fresh head). An adapter's folder loads with its base.
            peft_config ([`~peft.PeftConfig`], *optional*):
                Wraps the model in an adapter.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                As for the class.
            **kwargs:
                Arguments of `AutoModelForCausalLM.from_pretrained`: `revision`, `dtype`, `token`, ...

        Raises:
            `ValueError`: for files of a head that are damaged, of a newer version or of another hidden size.
            `OSError`: if there is no such checkpoint, or the Hub can't be reached.
        """
        if isinstance(pretrained_model, nn.Module):
            return cls(load_model(pretrained_model, kwargs or None, peft_config), tokenizer=tokenizer)
        name, place = str(pretrained_model), place_of(kwargs)
        model = load_model(name, kwargs, peft_config, dtype="auto")
        width, settings = state_width(model), read_settings(name, **place) or {}
        head = load_head(name, width, **place)
        if head is None:
            logger.warning("%s has no abstraction head; a fresh one is used, which has learned nothing.", name)
            of_latents = {key: settings[key] for key in ("action_format", "max_latent_length") if key in settings}
            head = AbstractionHead(AbstractionConfig(width, **of_latents))
        self = cls(model, head, tokenizer or _tokenizer_of(name, model.config._name_or_path, kwargs))
        self.settings = settings or None
        return self

    @property
    def ra3_config(self) -> RA3Config | None:
        """The settings that the checkpoint was trained with, `None` where it does not say."""
        return None if self.settings is None else RA3Config.from_settings(self.settings)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pretrained_model":
                raise
            return getattr(self.pretrained_model, name)

    # ---- forward ----

    @contextmanager
    def _states(self) -> Iterator[list[torch.Tensor]]:
        """Catches what the language-model head reads in the latest forward inside, `[batch, length, hidden_size]`; in
        generation the last state only. Forwards of other threads are theirs."""
        caught: list[torch.Tensor] = []
        caller = threading.get_ident()

        def catch(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            if threading.get_ident() == caller:
                caught[:] = args[:1]

        handle = self.pretrained_model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            yield caught
        finally:
            handle.remove()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
        think_labels: torch.Tensor | None = None,
        gain_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithAbstraction:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`), attention_mask (`torch.Tensor`, *optional*):
                As for the language model.
            labels (`torch.Tensor` of shape `(batch, length)`, *optional*):
                As for the language model; `-100` is left out.
            think_labels (`torch.Tensor` of shape `(batch, length)`, *optional*):
                Probability of thinking behind each token; below 0 is left out. Weighed by cross-entropy.
            gain_labels (`torch.Tensor` of shape `(batch, length)`, *optional*):
                Measured gain in nats; NaN is left out. Weighed by a Huber loss.
            **kwargs:
                For the language model.
        """
        with self._states() as states:
            options = {"attention_mask": attention_mask, "labels": labels}
            options = kwargs | {name: value for name, value in options.items() if value is not None}
            output = self.pretrained_model(input_ids=input_ids, **options | {"return_dict": True})
        think_logits, gain, _ = self.abstraction_head(states[0])
        # The head's outputs times 0, since DDP waits for the gradient of every parameter.
        losses = [] if labels is None else [output.loss, 0.0 * (think_logits.sum() + gain.sum())]
        if think_labels is not None:
            at = think_labels >= 0
            target = think_labels[at].to(think_logits)
            loss = nn.functional.binary_cross_entropy_with_logits(think_logits[at], target, reduction="sum")
            losses.append(loss / at.sum().clamp(min=1))
        if gain_labels is not None:
            at = ~gain_labels.isnan()
            loss = nn.functional.huber_loss(gain[at], gain_labels[at].to(gain), reduction="sum")
            losses.append(loss / at.sum().clamp(min=1))
        # By the fields' names, since transformers 5.24 calls the cache otherwise.
        kept = {entry.name: output.get(entry.name) for entry in fields(CausalLMOutputWithPast)}
        kept["loss"] = sum(losses) if losses else None
        return CausalLMOutputWithAbstraction(**kept, think_logits=think_logits, gain=gain)

    # ---- generation ----

    @torch.no_grad()
    def generate(
        self,
        *args,
        think: str = "auto",
        threshold: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_is_code: bool = True,
        **kwargs,
    ):
        """The language model's `generate`, with latents where `think` says.

        Args:
            think (`str`, *optional*, defaults to `"auto"`):
                `"auto"`: where the head's P(think) reaches `threshold`; a head that has learned nothing leaves it to
                the tokens. `"always"`: at every legal boundary. `"never"`: nowhere, which suppresses ordinary
                own-line comments too.
            threshold (`float`, *optional*, defaults to 0.5):
                Between 0 and 1, for `"auto"`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The model's, which reads where lines end; `None` is the one it was made with.
            prompt_is_code (`bool`, *optional*, defaults to `True`):
                Whether prompt and completion are one program; `False` for chats, where the completion alone is read.
            *args, **kwargs:
                For the language model's `generate`.

        Raises:
            `ValueError`: for a bad `think` or `threshold`, assisted decoding, or without a tokenizer.
        """
        # The gate reads the state of the text's last token: there must be one text, a token at a time.
        refuse_several_tokens(kwargs)
        with self.thinking(think, threshold, tokenizer, prompt_is_code) as processor:
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), processor])
            return self.pretrained_model.generate(*args, tokenizer=tokenizer or self.tokenizer, **kwargs)

    @contextmanager
    def thinking(
        self,
        think: str = "auto",
        threshold: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt_is_code: bool = True,
    ) -> Iterator[ThinkLogitsProcessor]:
        """What `generate` steers by, for a `generate` of your own inside; takes and raises what it does."""
        config, tokenizer = self.abstraction_head.config, tokenizer or self.tokenizer
        if tokenizer is None:
            raise ValueError("`tokenizer` is missing; pass the model's, which reads where lines end.")
        with self._states() as states:

            def gate() -> torch.Tensor:
                return self.abstraction_head(states[0][:, -1])[0].sigmoid()

            trained = think == "auto" and config.trained_on > 0
            yield ThinkLogitsProcessor(
                tokenizer, think, threshold=threshold, action_format=config.action_format,
                max_latent_length=config.max_latent_length, gate=gate if trained else None,
                prompt_is_code=prompt_is_code, eos_token_ids=end_ids(self.pretrained_model),
            )  # fmt: skip

    # ---- files ----

    def state_dict(self, *, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict:
        """The language model's, and the head's under `abstraction_head.`."""
        values = self.pretrained_model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.abstraction_head.state_dict(destination=values, prefix=prefix + _HEAD, keep_vars=keep_vars)

    def save_pretrained(
        self,
        save_directory: str | Path,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        is_main_process: bool = True,
        **kwargs,
    ) -> None:
        """Writes a plain checkpoint (of an adapter: the adapter) with the head's two files and, where they are known,
        `ra3_config.json` and the tokenizer beside it; see [`~ra3_trl.files.written_aside`].

        Args:
            save_directory (`str`):
                The folder.
            state_dict (`dict[str, torch.Tensor]`, *optional*):
                What to save in the place of `self.state_dict()`: sharded weights, gathered.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Push it too, as `repo_id=` (the folder's name if left out).
            is_main_process (`bool`, *optional*, defaults to `True`):
                Nothing is written or pushed by another.
            **kwargs:
                For the language model's `save_pretrained`, and with `push_to_hub` for that method.
        """
        if not is_main_process:
            # It takes part in the gathering of sharded weights, and what it writes is dropped.
            with tempfile.TemporaryDirectory() as nowhere:
                self.pretrained_model.save_pretrained(nowhere, is_main_process=False, **kwargs)
            return
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            names = ("private", "token", "revision", "commit_message", "create_pr")
            hub = {name: kwargs.pop(name) for name in names if name in kwargs}
            self.push_to_hub(repo_id, **hub, state_dict=state_dict, **kwargs)
        head = self.abstraction_head
        if state_dict is not None:
            of_head = {name.removeprefix(_HEAD): value for name, value in state_dict.items() if name.startswith(_HEAD)}
            kwargs["state_dict"] = {n: value for n, value in state_dict.items() if not n.startswith(_HEAD)}
            head = AbstractionHead(head.config)
            head.load_state_dict(of_head)
        with written_aside(save_directory) as folder:
            self.pretrained_model.save_pretrained(folder, **kwargs)
            save_head(head, folder)
            if self.settings is not None:
                write_settings(self.settings, folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model with abstraction head",
        create_pr: bool = False,
        **kwargs,
    ) -> CommitInfo:
        """Uploads what `save_pretrained` writes, in one commit.

        Args:
            repo_id (`str`):
                `org/name`, made if it is not there.
            private, token, revision, commit_message, create_pr, **kwargs:
                As in `PreTrainedModel.push_to_hub` (a `revision` that is not there is made as a branch) and, the rest,
                in `save_pretrained`.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder, "model"), **kwargs)
            check_upload(Path(folder, "model"), process_tokens(token=token))
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            # One commit: nobody pulls the weights of one training with the head of another.
            return api.upload_folder(
                repo_id=repo_id, folder_path=Path(folder, "model"), revision=revision,
                commit_message=commit_message, create_pr=create_pr,
            )  # fmt: skip


def _take_plain_names(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """Lets `load_state_dict` take what `state_dict` gives, where the language model's names have no prefix."""
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(prefix + _HEAD)]:
        state_dict[f"{prefix}pretrained_model.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def _tokenizer_of(name: str, base: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer at its very revision, of an adapter without one its base's; `None` without either."""
    # Without a word on it, code in the repository would be a question at the terminal.
    trust = {"trust_remote_code": bool(options.get("trust_remote_code"))}
    for source, where in ((name, place_of(options)), (base, {})):
        try:
            return AutoTokenizer.from_pretrained(source, **where, **trust)
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return None
