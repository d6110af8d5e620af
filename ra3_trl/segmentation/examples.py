"""Rows of a data set -> texts or tokens to cut: the forms that TRL's `SFTTrainer` takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..config import RA3Config
from .chat import ChatReader
from .documents import Segmenter, Tokens
from .tokenized import TokenReader


_SUPPORTED = (
    "a text column (`dataset_text_field`), 'prompt' and 'completion', 'messages', 'input_ids', or any columns with a "
    "`formatting_func` that returns a string"
)
_MASKS = ("completion_mask", "assistant_masks")


class Text(NamedTuple):
    """Holds a text whose first `prompt_chars` characters are conditioned on and not trained."""

    text: str
    prompt_chars: int = 0


@dataclass(frozen=True)
class RowForms:
    """
    Says how rows are read; the fields are those of [`RA3Config`] but for the first and the last.

    Args:
        formatting_func (`Callable`, *optional*):
            Makes the text of a row.
        tokens_only (`bool`, *optional*, defaults to `False`):
            Whether rows must be tokens, with `labels` if not all are trained (TRL's `skip_prepare_dataset`).
    """

    formatting_func: Callable[[dict], str] | None = None
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None
    tokens_only: bool = False

    @classmethod
    def of(cls, args: RA3Config, formatting_func: Callable[[dict], str] | None = None) -> RowForms:
        """Those of a configuration.

        Raises:
            `ValueError`: for a `formatting_func`, whose text has no completion, with `completion_only_loss`; and for
            a key of `dataset_kwargs` that there is none of.
        """
        kwargs = args.dataset_kwargs or {}
        assert isinstance(kwargs, dict)  # `TrainingArguments` has read the JSON
        if unknown := set(kwargs) - {"skip_prepare_dataset"}:
            raise ValueError(
                f"`dataset_kwargs` has {min(unknown)!r}; the one key there is, is `skip_prepare_dataset`."
            )
        if formatting_func is not None and args.completion_only_loss:
            raise ValueError(
                "`completion_only_loss` is True, and `formatting_func` makes one text, in which no completion is told "
                "from its prompt; leave one of the two out."
            )
        losses = args.completion_only_loss, args.assistant_only_loss
        return cls(
            formatting_func, args.dataset_text_field, *losses, tokens_only=bool(kwargs.get("skip_prepare_dataset"))
        )


class RowReader:
    """
    Reads rows for a segmenter.

    Args:
        segmenter ([`Segmenter`]):
            Its tokenizer and format.
        forms ([`RowForms`]):
            How.
    """

    def __init__(self, segmenter: Segmenter, forms: RowForms):
        self.segmenter, self.forms = segmenter, forms

    @cached_property
    def _chat(self) -> ChatReader:
        if not self.segmenter.tokenizer.chat_template:
            raise ValueError(
                "`messages` (or `prompt` and `completion`) is a conversation, and `processing_class` has no chat "
                "template: set `chat_template_path` or `tokenizer.chat_template`. Else what can be read is "
                f"{_SUPPORTED}."
            )
        strip = self.segmenter.format.strip if self.segmenter.existing_comments == "strip" else None
        return ChatReader(self.segmenter.tokenizer, self.forms.assistant_only_loss, strip)

    @cached_property
    def _tokens(self) -> TokenReader:
        return TokenReader(self.segmenter.tokenizer)

    def __call__(self, row: Mapping[str, Any]) -> Text | Tokens:
        """Reads one row.

        Raises:
            `ValueError`: naming the column that can't be read, and why.
        """
        forms = self.forms
        if "input_ids" in row:
            return self._given(row)
        if forms.tokens_only:
            raise ValueError(
                f"`dataset_kwargs` has `skip_prepare_dataset`, and the columns {sorted(row)} lack `input_ids`; "
                "tokenize the rows, or leave it out."
            )
        if forms.formatting_func is not None:
            return Text(_string("`formatting_func`", self._formatted(row), "returns", "return"))
        row = _with_messages(row)
        if "prompt" in row and "completion" in row and forms.dataset_text_field not in row:
            return self._completion(row)
        if _is_conversation(row.get("messages")):
            return self._chat.messages(row["messages"], *_options(row))
        self._refuse_assistant_only(row)
        if forms.dataset_text_field in row:
            return Text(_string(f"`{forms.dataset_text_field}`", row[forms.dataset_text_field]))
        if "messages" in row:
            raise ValueError(f"`messages` is {_short(row['messages'])}; give a list of messages with a role each.")
        raise ValueError(
            f"`dataset_text_field` is {forms.dataset_text_field!r}, and the data has the columns {sorted(row)}; what "
            f"can be read is {_SUPPORTED}."
        )

    def _formatted(self, row: Mapping[str, Any]) -> Any:
        assert self.forms.formatting_func is not None
        try:
            return self.forms.formatting_func(dict(row))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`formatting_func` raised {type(error).__name__} ({error}); it is given one row, with the columns "
                f"{sorted(row)}."
            ) from error

    def _completion(self, row: Mapping[str, Any]) -> Text | Tokens:
        prompt, completion = row["prompt"], row["completion"]
        only = self.forms.completion_only_loss is not False
        talks = [_is_conversation(column) for column in (prompt, completion)]
        if all(talks):
            return self._chat.completion(prompt, completion, *_options(row), only)
        for name, other in (("prompt", "completion"), ("completion", "prompt")):
            if talks[name == "completion"]:
                raise ValueError(
                    f"`{name}` is a conversation, a list, and `{other}` is {_short(row[other])}; give two of a kind. "
                    f"Else what can be read is {_SUPPORTED}."
                )
        self._refuse_assistant_only(row)
        texts = [_string(f"`{name}`", row[name]) for name in ("prompt", "completion")]
        return Text("".join(texts), len(texts[0]) if only else 0)

    def _refuse_assistant_only(self, row: Mapping[str, Any]) -> None:
        if self.forms.assistant_only_loss:
            raise ValueError(
                f"`assistant_only_loss` is True, and the columns {sorted(row)} are no conversation; leave it out."
            )

    def _given(self, row: Mapping[str, Any]) -> Tokens:
        """Reads tokens with their labels, or masks as TRL makes them."""
        if self.segmenter.existing_comments == "strip":
            raise ValueError(
                "`input_ids` are tokens, of which no comment can be stripped; set `existing_comments` to 'keep'."
            )
        ids = _integers("input_ids", row["input_ids"])
        trained = [True] * len(ids)
        if row.get("labels") is not None:
            labels = _integers("labels", row["labels"], len(ids))
            odd = next((i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, -100)), None)
            if odd is not None:
                raise ValueError(
                    f"`labels[{odd}]` is {labels[odd]}; a label is its token, {ids[odd]}, or -100 (it is not shifted)."
                )
            trained = [label != -100 for label in labels]
        else:
            unread = [name for name in _MASKS if self.forms.tokens_only and name in row]
            if unread:
                raise ValueError(
                    f"`{unread[0]}` is there without `labels`, and with `skip_prepare_dataset` in `dataset_kwargs` no "
                    "mask is read; add `labels`, or leave it out."
                )
            for name in _MASKS:
                if row.get(name) is not None and (
                    name != "completion_mask" or self.forms.completion_only_loss is not False
                ):
                    mask = _integers(name, row[name], len(ids))
                    trained = [a and bool(b) for a, b in zip(trained, mask, strict=True)]
        try:
            return self._tokens(ids, trained)
        except ValueError as error:
            raise ValueError(f"`input_ids` {error}") from None


def _with_messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads conversations of the older form, `from` and `value`, as `role` and `content`."""

    def converted(value: Any) -> Any:
        if not isinstance(value, list) or not all(
            isinstance(message, dict) and "from" in message for message in value
        ):
            return value
        names = {"from": "role", "value": "content"}
        return [{names.get(key, key): part for key, part in message.items()} for message in value]

    row = {name: converted(value) for name, value in row.items()}
    if "conversations" in row and "messages" not in row:
        row["messages"] = row.pop("conversations")
    return row


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _options(row: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Tools, which may be JSON, and what a row has for the template."""
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is {_short(tools)}, which is no JSON ({error}); give a list.") from None
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"`chat_template_kwargs` is {_short(options)}; give a dict.")
    return tools, None if options is None else dict(options)


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:37] + '...'} ({type(value).__name__})"


def _string(name: str, value: Any, verb: str = "is", cure: str = "hold") -> str:
    if value is None:
        raise ValueError(f"{name} {verb} None; it must {cure} a string: fill it, or leave the row out by `filter`.")
    if not isinstance(value, str):
        raise ValueError(f"{name} {verb} {_short(value)}; it must {cure} a string; what can be read is {_SUPPORTED}.")
    return str(value)


def _integers(name: str, value: Any, length: int | None = None) -> list[int]:
    """The numbers of a column."""
    if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
        raise ValueError(f"`{name}` is {_short(value)}; it must be a list of integers.")
    if length is not None and len(value) != length:
        raise ValueError(f"`{name}` has {len(value)} entries and `input_ids` {length}; give one for each.")
    return list(value)
