"""What stands before the application: limits on what clients send, what becomes of those who go, and counting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeAlias

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .metrics import Metrics

__all__ = ["Guard", "Impatient"]

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]

_BODY = 4 << 20
_HEADERS, _HEADER_BYTES = 100, 32 << 10
_HEADER_SECONDS, _BODY_SECONDS = 10.0, 30.0
_DRAIN_SECONDS = 5.0
"""For which the rest of what is too long is read and thrown away: who still sends doesn't see an answer."""


class Guard:
    """Answers for `app` what is too large (413, 431) or too slow (408), and cancels it where the client has gone."""

    def __init__(self, app: App, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.running.track_inprogress():
            try:
                body = await _body(scope, receive)
            except ApiError as error:
                await _refuse(error, receive, counted)
            except _Gone:
                pass
            else:
                await self._run(scope, receive, counted, body)
        path = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(path, str(status or 499)).inc()  # 499: the client didn't wait for its answer
        self._metrics.seconds.labels(path).observe(time.perf_counter() - begin)

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """The application, until it ends or the client has gone."""
        given = False

        async def own() -> MutableMapping[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # that the client goes is seen below
            raise AssertionError

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        loop = asyncio.get_running_loop()
        answer, watch = loop.create_task(self._app(scope, own, send)), loop.create_task(gone())
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not answer.done():
                answer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answer


class _Gone(Exception):
    """The client went while it sent its request."""


async def _body(scope: Scope, receive: Receive) -> bytes:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > _HEADERS or size > _HEADER_BYTES:
        raise ApiError(
            431,
            f"The request has {len(headers)} headers of {size} bytes, and at most {_HEADERS} of {_HEADER_BYTES} are "
            "read.",
            "headers_too_large",
        )
    declared = next((value for name, value in headers if name == b"content-length"), b"0")
    if declared.isdigit() and int(declared) > _BODY:
        raise _too_large(int(declared))
    parts: list[bytes] = []
    try:
        await asyncio.wait_for(_read(receive, parts), _BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise ApiError(
            408,
            f"After {_BODY_SECONDS:g} s {sum(map(len, parts))} bytes of the request's body were here, not all of it. "
            "Send it faster.",
            "too_slow",
            headers={"Connection": "close"},
        ) from error
    return b"".join(parts)


async def _read(receive: Receive, parts: list[bytes]) -> None:
    total = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        total += len(parts[-1])
        if total > _BODY:
            raise _too_large(total)
        if not message.get("more_body", False):
            return


def _too_large(size: int) -> ApiError:
    return ApiError(
        413,
        f"The request's body has {size} bytes or more, and at most {_BODY} are read. Send fewer texts at once.",
        "body_too_large",
        headers={"Connection": "close"},
    )


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), _DRAIN_SECONDS if error.status == 413 else 0.1)
    raw = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": raw})


async def _drain(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


class Impatient(H11Protocol):
    """HTTP as uvicorn speaks it, but a connection whose headers take longer than 10 s is closed."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection: its first headers are awaited."""
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        """Bytes: of headers that are not all here, or of what follows them."""
        super().data_received(data)
        unfinished = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not unfinished:
            self._stop()
        elif self._timer is None:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of a connection."""
        self._stop()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._close)

    def _close(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
