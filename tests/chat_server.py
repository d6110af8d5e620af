"""A server of OpenAI's chat interface on loopback, whose answers a test says: what the client meets, and worse."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


Reply = tuple[int, str]  # status and body


def completion(text: Any, finish: str = "stop", **more: Any) -> str:
    """The body of an answer."""
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage} | more)


class ChatServer:
    """`reply(request, number)` gives the response to the request of this number, from 0; `None` cuts the line."""

    def __init__(self):
        self.reply: Callable[[dict[str, Any], int], Reply | None] = lambda request, number: (200, completion(""))
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self._running = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.keys.append(handler.headers["Authorization"])
            self._running += 1
            self.at_once = max(self.at_once, self._running)
        try:
            reply = self.reply(request, number)
        finally:
            with self._lock:
                self._running -= 1
        if reply is None:
            handler.close_connection = True
            handler.connection.close()
            return
        status, body = reply
        data = body.encode("utf-8", "surrogatepass")
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json" if body.startswith("{") else "text/html")
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("retry-after-ms", "1")
        handler.end_headers()
        handler.wfile.write(data)

    def texts(self) -> list[str]:
        """What was asked."""
        return [request["messages"][0]["content"] for request in self.requests]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def chat_server(monkeypatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ChatServer()
    yield server
    server.close()


def slowly(seconds: float, reply: Reply) -> Reply:
    time.sleep(seconds)
    return reply
