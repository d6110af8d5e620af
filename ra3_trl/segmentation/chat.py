"""Conversations -> tokens, which of them are trained, and where the assistant speaks.

Tokens and labels are those of TRL's `SFTTrainer`: a chat template that marks the assistant's turns by
`{% generation %}` says which are its own, or TRL's version for training of a template that does not. Where there is
neither, turns are told by rendering the conversation up to each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from .documents import Encoding, Tokens, common_prefix


Message = dict[str, Any]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatReader:
    """
    Renders conversations.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A fast one with a chat template.
        assistant_only (`bool`, *optional*):
            Whether only the assistant's turns are trained. Left out: of `messages` only these, of `prompt` and
            `completion` the completion.
        strip (`Callable`, *optional*):
            Changes what the assistant says before it is rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        assistant_only: bool | None = None,
        strip: Callable[..., str] | None = None,
    ):
        self.tokenizer, self.assistant_only, self.strip = tokenizer, assistant_only, strip
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self._own_is_marked = bool(_MARKED.search(template or ""))
        self._marked: str | None = None  # the template for training, where it is another
        if not self._own_is_marked:
            try:
                self._marked = get_training_chat_template(tokenizer)
            except ValueError:  # a template that TRL does not have
                self._marked = None

    def messages(
        self, messages: Sequence[Message], tools: Any = None, options: dict[str, Any] | None = None
    ) -> Tokens:
        """The tokens of a conversation."""
        return self._tokens((), messages, tools, options or {}, self.assistant_only is not False)

    def completion(
        self, prompt: Sequence[Message], completion: Sequence[Message], tools: Any = None,
        options: dict[str, Any] | None = None, completion_only: bool = True,
    ) -> Tokens:  # fmt: skip
        """The tokens of a conversation that goes on with a completion, which alone is trained if `completion_only`."""
        options = options or {}
        tokens = self._tokens(prompt, completion, tools, options, bool(self.assistant_only))
        if not completion_only:
            return tokens
        template = self._marked if self.assistant_only else None
        ids = self._render(prompt, tools, options, template, add_generation_prompt=True)["input_ids"]
        begin = common_prefix(ids, tokens.encoding.ids)
        return tokens._replace(trained=tuple(flag and i >= begin for i, flag in enumerate(tokens.trained)))

    def _tokens(
        self, prompt: Sequence[Message], completion: Sequence[Message], tools: Any, options: dict[str, Any], only: bool
    ) -> Tokens:
        if self.strip is not None:
            completion = [
                message | {"content": self.strip(message["content"])}
                if message.get("role") == "assistant" and isinstance(message.get("content"), str)
                else message
                for message in completion
            ]
        messages = [*prompt, *completion]
        template = self._marked if only else None
        marked = template is not None or self._own_is_marked
        whole = self._render(messages, tools, options, template, return_assistant_tokens_mask=marked)
        text = self._text(messages, tools, options, template)
        ids, offsets = whole["input_ids"], whole["offset_mapping"]
        encoding = Encoding(tuple(ids), tuple(a for a, _ in offsets), tuple(b for _, b in offsets), 0)
        if marked:
            own = [bool(flag) for flag in whole["assistant_masks"]]
            spans = [(encoding.starts[first], encoding.ends[last - 1]) for first, last in _runs(own)]
        else:
            spans = self._turns(messages, tools, options, text, strict=only)
            own = [any(a <= start and end <= b for a, b in spans) for start, end in offsets]
        if only and not any(own):
            raise ValueError(
                "no token is the assistant's; give the conversation a turn of it, or set `assistant_only_loss` to "
                "False."
            )
        return Tokens(text, encoding, tuple(own) if only else (True,) * len(ids), tuple(spans))

    def _render(
        self, messages: Sequence[Message], tools: Any, options: dict[str, Any], template: str | None, **more: Any
    ) -> Any:
        more |= {"return_dict": True, "tokenizer_kwargs": {"return_offsets_mapping": True}}
        return self._apply(messages, tools, options, template, more)

    def _text(
        self, messages: Sequence[Message], tools: Any, options: dict[str, Any], template: str | None, **more: Any
    ) -> str:
        return cast(str, self._apply(messages, tools, options, template, more | {"tokenize": False}))

    def _apply(
        self, messages: Sequence[Message], tools: Any, options: dict[str, Any], template: str | None, more: Any
    ) -> Any:
        settings = {"tools": tools, "chat_template": template} | options | more
        try:
            return self.tokenizer.apply_chat_template(list(messages), **settings)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:  # a template is a program of its own
            raise ValueError(f"the chat template does not take the conversation ({error}).") from error

    def _turns(
        self, messages: Sequence[Message], tools: Any, options: dict[str, Any], text: str, strict: bool
    ) -> list[tuple[int, int]]:
        """Characters of `text` between the generation prompt and the end of each of the assistant's turns.

        Raises:
            `ValueError`: if `strict` and the template does not say where a turn stands.
        """
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            try:
                before = self._text(messages[:i], tools, options, None, add_generation_prompt=True) if i else ""
                until = self._text(messages[: i + 1], tools, options, None)
            except ValueError:
                before = until = "\0"
            if i and len(before) <= len(until) and text.startswith(until) and until.startswith(before):
                spans.append((len(before), len(until)))
            elif strict:
                raise ValueError(
                    f"`messages[{i}]` is the assistant's, and the chat template has no `{{% generation %}}` to say "
                    "where it stands; add it to the template, or set `assistant_only_loss` to False."
                )
        return spans


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last (exclusive) of the runs of `True`.

    >>> _runs([True, False, True, True])
    [(0, 1), (2, 4)]
    """
    edges = [i for i in range(len(flags) + 1) if (i < len(flags) and flags[i]) != (i > 0 and flags[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
