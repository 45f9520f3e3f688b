"""HTTP by hand, for what no client library would send."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.service.servers import Running


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> dict:
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Wire:
    """A connection of its own to a server."""

    def __init__(self, server: Running, receive_buffer: int | None = None) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(20)
        self.socket.connect((host, int(port)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Answer:
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        return Answer(response.status, response.headers, response.read())

    def ended(self) -> bytes:
        """Everything up to the end of the connection, which must come; a reset is an end too."""
        received = b""
        try:
            while part := self.socket.recv(1 << 16):
                received += part
        except ConnectionError:
            pass
        return received

    def send_until_refused(self, parts: Iterator[bytes], at_most: int) -> int:
        """Send until the server has closed the connection; how many bytes it took."""
        sent = 0
        try:
            for part in parts:
                assert sent <= at_most, "the server takes everything"
                self.socket.sendall(part)
                sent += len(part)
        except ConnectionError:
            return sent
        raise AssertionError("the server took everything")

    def drip(self, data: bytes, pause: float) -> None:
        """Send byte by byte until all is sent or the server has had enough."""
        try:
            for index in range(len(data)):
                self.socket.sendall(data[index : index + 1])
                time.sleep(pause)
                self.socket.setblocking(False)
                try:
                    if self.socket.recv(1, socket.MSG_PEEK) is not None:
                        return
                except BlockingIOError:
                    pass
                finally:
                    self.socket.settimeout(20)
        except ConnectionError:
            pass

    def leave(self, *, reset: bool) -> None:
        """Close, in order or with a reset."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def head(length: int | str, method: str = "POST", path: str = "/v1/completions") -> bytes:
    """The head of a request with JSON of so many bytes, or chunked."""
    size = f"Content-Length: {length}" if isinstance(length, int) else f"Transfer-Encoding: {length}"
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{size}\r\n\r\n".encode()


def completion(**fields: object) -> bytes:
    """A whole request for a completion."""
    body = json.dumps({"prompt": "x", "max_tokens": 100_000, "ignore_eos": True} | fields).encode()
    return head(len(body)) + body


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)
