"""A server of OpenAI's chat interface as annotator: vLLM's, `transformers serve`, llama.cpp's, or a company's."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from ...files import one_line
from .annotator import TOO_LONG, Answer
from .settings import AskingSettings


# Why there is no answer about a text, though it was asked.
TIMEOUT, BROKEN = "the annotator took too long", "the annotator's server failed"
REFUSED, NO_COMPLETION = "the annotator's server refused", "what the server sent is no completion"
_MOST_FAILURES = 4  # in a row
_AHEAD = 2  # times `batch_size`: requests that are under way or whose answers wait
# What ends a turn in the templates of today's models; a server does not say which it has.
_SPECIAL = re.compile(r"<\|[^|\n]{1,40}\|>|<\uff5c[^\uff5c\n]{1,40}\uff5c>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
_LENGTH = re.compile(r"context|too long|too large|maximum.{0,20}length", re.IGNORECASE)


class AnnotatorError(OSError):
    """The annotator is gone, refuses, or answers nothing that can be used. What was finished before is kept."""


def require_openai(setting: str) -> ModuleType:
    """Imports the client for a `setting` that asks for it.

    Raises:
        `ValueError`: where it is missing.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ValueError(f"{setting} needs the client: `pip install 'ra3-trl[openai]'` ({error}).") from error


class ChatServer:
    """
    A model behind an address. The key is the environment variable `OPENAI_API_KEY`, which local servers do not need.

    Args:
        name (`str`):
            What the server calls the model.
        base_url (`str`):
            Its address, such as `http://localhost:8000/v1`.
        settings ([`AskingSettings`], *optional*):
            How it is asked; `batch_size` requests at a time.
        seed (`int`, *optional*, defaults to 42):
            Of the draws, at a temperature above 0, for servers that heed it.
        count (`Callable[[str], int]`, *optional*):
            Counts tokens, since the server's tokenizer is not here; `None` takes one for three characters.

    Raises:
        `ValueError`: for an address that is none or holds a password.
    """

    special = _SPECIAL

    def __init__(
        self,
        name: str,
        base_url: str,
        settings: AskingSettings | None = None,
        seed: int = 42,
        count: Callable[[str], int] | None = None,
    ):
        self.name, self.seed, self.settings = name, seed, settings or AskingSettings()
        self.base_url = check_url(base_url)
        self.max_tokens = self.settings.max_tokens
        self._count = count or (lambda prompt: -(-len(prompt) // 3))
        self._answered, self._failures = False, 0  # whether there was an answer yet; failures since the last one

    @cached_property
    def _openai(self) -> ModuleType:
        return require_openai("`base_url`")

    @cached_property
    def _client(self) -> Any:
        key = os.environ.get("OPENAI_API_KEY") or "none"
        how = {"timeout": self.settings.timeout, "max_retries": self.settings.max_retries}
        return self._openai.OpenAI(base_url=self.base_url, api_key=key, **how)

    def count(self, prompt: str) -> int:
        return self._count(prompt)

    def write(self, prompts: Iterable[str]) -> Iterator[Answer]:
        """Answers in the prompts' order, with requests of later ones under way meanwhile.

        Raises:
            `ValueError`: if the client is missing.
            `AnnotatorError`: if the server is not there, knows no such model or lets nobody in; if the first request
                has no answer, or four in a row have none.
        """
        waiting = iter(prompts)
        self._client.chat  # made here, and not by several threads  # noqa: B018
        pool = ThreadPoolExecutor(self.settings.batch_size, thread_name_prefix="annotator")
        ahead: deque[Future[tuple[Answer, str]]] = deque()
        try:
            while True:
                room = _AHEAD * self.settings.batch_size - len(ahead)
                ahead.extend(pool.submit(self._ask, prompt) for prompt in islice(waiting, room))
                if not ahead:
                    return
                answer, failure = ahead.popleft().result()
                self._failures = self._failures + 1 if failure else 0
                if failure and (not self._answered or self._failures >= _MOST_FAILURES):
                    times = f"{self._failures} requests in a row" if self._answered else "the first request"
                    raise self._error(f"has not answered {times}: {failure}")
                self._answered = self._answered or not failure
                yield answer
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, prompt: str) -> tuple[Answer, str]:
        """Sends one request. Returns the answer and, where there is none, what the server or the client said.

        What is wrong with a text is its own affair; what is wrong with the server may pass, so the caller counts it.
        What no further request can mend ends the run.
        """
        openai = self._openai
        draws = {"seed": self.seed} if self.settings.temperature else {}
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.name, messages=[{"role": "user", "content": prompt}], max_tokens=self.max_tokens,
                temperature=self.settings.temperature, **draws,
            )  # fmt: skip
        except openai.APITimeoutError as error:
            return Answer(none=TIMEOUT), one_line(error)
        except openai.APIConnectionError as error:
            raise self._error(f"can't be reached: {one_line(error.__cause__ or error)}") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._error(f"refuses: {one_line(error)}") from error
        except openai.APIStatusError as error:
            if error.status_code not in (400, 413, 422):
                return Answer(none=BROKEN), one_line(error)
            if _LENGTH.search(str(error)):
                return Answer(none=TOO_LONG), ""  # another text may be shorter
            return Answer(none=REFUSED), one_line(error)
        except openai.OpenAIError as error:
            return Answer(none=BROKEN), one_line(error)
        answer = read_completion(raw.text)
        return answer, "" if answer.none is None else f"{NO_COMPLETION}: {one_line(raw.text, 100)!r}"

    def _error(self, what: str) -> AnnotatorError:
        return AnnotatorError(f"the annotator {self.name!r} at {self.base_url} {what}.")

    def close(self) -> None:
        """Ends the connections; what is under way ends with them."""
        if "_client" in vars(self):
            self._client.close()


def check_url(url: str) -> str:
    """Returns an address as it may be shown.

    Raises:
        `ValueError`: for one that is none, or holds a password.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        valid = False
    if not valid:
        raise ValueError(f"`base_url` is {url!r}; give an address, such as http://localhost:8000/v1.")
    if "@" in parts.netloc or parts.query:
        raise ValueError("`base_url` holds a password or a query; give the key in OPENAI_API_KEY.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def read_completion(body: str) -> Answer:
    """Reads the body of a response: whatever a server sends, it is an answer or none.

    >>> read_completion('{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}').text
    'hi'
    >>> read_completion("<html>").none
    'what the server sent is no completion'
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    choices = _at(content, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = _at(_at(choice, "message"), "content")
    if not isinstance(text, str):
        return Answer(none=NO_COMPLETION)
    usage = _at(content, "usage")
    tokens = [_at(usage, name) for name in ("prompt_tokens", "completion_tokens")]
    counts = [n if type(n) is int and 0 <= n < 2**31 else 0 for n in tokens]
    return Answer(text, _at(choice, "finish_reason") == "length", None, *counts)


def _at(value: Any, key: str) -> Any:
    """What a mapping has at a key, `None` where it is none or has it not."""
    return value.get(key) if isinstance(value, dict) else None
