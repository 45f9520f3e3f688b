"""HTTP/1.1 connections with the limits that uvicorn does not have.

uvicorn waits without end for the head of a request and for a client to read, takes any number of connections, and
closes a connection in a way that can destroy the answer which explains why. :class:`LimitedProtocol` mends these.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from service.api.errors import error_body
from service.engine.engine_thread import EngineThread
from service.settings import Settings

logger = logging.getLogger(__name__)

_LEAVE_SECONDS = 5
"""How long the answers of requests that were ended because the server stops may take to leave."""


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration for an app with ``settings``."""

    def __init__(self, app: Callable[..., Any], settings: Settings) -> None:
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            http=LimitedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=settings.max_header_bytes,
            timeout_keep_alive=settings.keep_alive_seconds,
            timeout_graceful_shutdown=settings.shutdown_seconds + _LEAVE_SECONDS,
        )
        self.settings = settings


class Server(uvicorn.Server):
    """uvicorn's server, with an end that every client understands.

    Once told to stop it takes no new requests and lets the open ones finish. Those that have not when their time is
    over get an error, and some seconds for it to leave: uvicorn would cut them off without one.
    """

    def __init__(self, config: ServerConfig, engine: EngineThread) -> None:
        super().__init__(config)
        self._engine = engine
        self._patience = config.settings.shutdown_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop."""
        self._engine.drain()
        asyncio.get_running_loop().call_later(self._patience, self._engine.abort_all)
        await super().shutdown(sockets)


class LingeringTransport:
    """A transport that closes in two steps: it stops sending, and reads on until the client closes too.

    Closing at once while the client still sends makes the kernel reset the connection, and the client may lose the
    answer that it was just sent. What is read is thrown away, for ``LINGER`` seconds after the answer has left; it has
    ``patience`` seconds to leave.
    """

    LINGER = 2.0

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, patience: float) -> None:
        self._transport = transport
        self._loop = loop
        self._patience = patience
        self._lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def gone(self) -> bool:
        """Nothing is sent or read any more."""
        return self._transport.is_closing()

    def is_closing(self) -> bool:
        """Nothing more may be written."""
        return self._lingering or self.gone

    def write(self, data: bytes) -> None:
        """Send ``data``, unless this is closing."""
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Send what was written, then linger, then close."""
        if self.is_closing():
            return
        self._lingering = True
        self._transport.resume_reading()
        self._transport.write_eof()
        self._linger(self._loop.time() + self._patience)

    def _linger(self, deadline: float) -> None:
        sent = not self._transport.get_write_buffer_size()
        if sent or self._loop.time() >= deadline:
            self._loop.call_later(self.LINGER, self._transport.abort)
        else:
            self._loop.call_later(self.LINGER, self._linger, deadline)


class Timer:
    """Calls ``act`` some time after :meth:`start`, unless it is stopped before. Starting it again changes nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, act: Callable[[], None]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._act = act
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start, if it does not run."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._act)

    def stop(self) -> None:
        """Stop, if it runs."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class LimitedProtocol(H11Protocol):
    """One connection. Its errors have the API's shape; the limits are in :class:`service.settings.Settings`."""

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._settings = config.settings
        self._head_timer = Timer(self.loop, config.settings.header_seconds, self._head_is_late)
        self._write_timer = Timer(self.loop, config.settings.write_seconds, self._give_up)
        self._idle_since = self.loop.time()

    @property
    def lingering(self) -> LingeringTransport:
        """The transport."""
        return cast(LingeringTransport, self.transport)

    @property
    def idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and start the clock for its first request."""
        lingering = LingeringTransport(transport, self.loop, self._settings.write_seconds)
        super().connection_made(cast(asyncio.Transport, lingering))
        if len(self.connections) > self._settings.max_connections and not self._make_room():
            self._answer(503, "too many connections are open; try again later", "too_many_connections")
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request; whatever comes after the end is thrown away."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._await_head()

    def on_response_complete(self) -> None:
        """Get ready for the next request, or close where the client still sends the body of this one."""
        self._idle_since = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as the server writes: start the clock."""
        super().pause_writing()
        self._write_timer.start()

    def resume_writing(self) -> None:
        """The client has read most of what was written."""
        super().resume_writing()
        self._write_timer.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._head_timer.stop()
        self._write_timer.stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; called by uvicorn while it handles h11's error."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            msg = f"request line and headers must not be longer than {self._settings.max_header_bytes} bytes"
        self._answer(status, msg, "headers_too_large" if status == 431 else "invalid_http")

    def _await_head(self) -> None:
        """Keep the clock running while, and only while, the head of a request is awaited."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._head_timer.stop()
        else:
            self._head_timer.start()

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0]:
            self._answer(408, "the request's headers did not arrive in time", "request_timeout")
        else:
            self.transport.close()

    def _give_up(self) -> None:
        logger.warning("a client does not read its answer; the connection is cut off")
        self.transport.abort()

    def _make_room(self) -> bool:
        """Cut off the connection that has been idle longest; false if none is idle."""
        others = [other for other in self.connections if other is not self and isinstance(other, LimitedProtocol)]
        present = [other for other in others if not other.lingering.gone]
        if len(present) < self._settings.max_connections:
            return True
        longest = min((other for other in present if other.idle), key=lambda other: other._idle_since, default=None)
        if longest is not None:
            longest.transport.abort()
        return longest is not None

    def _answer(self, status: int, message: str, code: str) -> None:
        """Answer without the app, and close. If the app has begun an answer, only close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(status, message, code=code)).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            if status == 503:
                headers.append(("Retry-After", "1"))
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
