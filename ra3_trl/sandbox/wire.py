"""Messages over a socket: the only thing that program, tests and host exchange, JSON behind its length.

Imports nothing of this package by its name, since it runs inside the sandbox too, where only this folder is.
"""

from __future__ import annotations

import importlib
import json
import socket
import struct
from typing import Any


values = importlib.import_module(".values" if __package__ else "values", __package__)
WireError = values.WireError
MAX_FRAME = 8 * 2**20  # bytes
BROKEN = "sandbox: "  # begins what a player writes instead of outcomes where it could not begin
_HEADER = struct.Struct("!I")


def send(connection: socket.socket, message: Any, descriptors: tuple[int, ...] = ()) -> None:
    """Sends one message, and open file descriptors along with it; a `WireError` if it is longer than `MAX_FRAME`."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise WireError(f"a message of {len(body)} bytes, more than {MAX_FRAME}")
    header = _HEADER.pack(len(body))
    if descriptors:
        socket.send_fds(connection, [header], descriptors)
        header = b""
    connection.sendall(header + body)


def receive(connection: socket.socket, descriptors: list[int] | None = None) -> Any:
    """Waits for the next message; descriptors that came with it are appended to `descriptors`.

    Raises:
        `EOFError`: if the other side has closed.
        `WireError`: if it is too long or no JSON.
    """
    if descriptors is None:
        begun = connection.recv(2**16)  # all of most messages, since nobody sends two in a row
    else:
        begun, received, _, _ = socket.recv_fds(connection, _HEADER.size, 4)
        descriptors += received
    if not begun:
        raise EOFError
    begun += _exactly(connection, _HEADER.size - len(begun))
    (size,) = _HEADER.unpack_from(begun)
    if size > MAX_FRAME:
        raise WireError(f"a message of {size} bytes, more than {MAX_FRAME}")
    left = size - (len(begun) - _HEADER.size)
    if left < 0:
        raise WireError("more than one message")
    body = begun[_HEADER.size :] + _exactly(connection, left)
    try:
        return json.loads(str(body, "ascii"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {str(error)[:200]}") from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    chunks = []
    while size > 0:
        chunk = connection.recv(min(size, 2**16))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
