"""How rows become batches, and what stands before the application, without a model."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import httpx
import pytest
import uvicorn

from loratrf_deploy.runtime.text import Written
from loratrf_deploy.serving import guard
from loratrf_deploy.serving.batcher import Batcher, Limits, Row
from loratrf_deploy.serving.errors import ApiError
from loratrf_deploy.serving.metrics import Metrics
from serving import fault


class Model:
    """Answers a row with its tokens doubled, remembers its batches, and waits to be let go on."""

    def __init__(self) -> None:
        self.batches: list[list[Row[Any]]] = []
        self.go = threading.Event()
        self.go.set()

    def run(self, rows: Sequence[Row[Any]]) -> list[Any]:
        self.batches.append(list(rows))
        assert self.go.wait(10)
        if any(row.tokens == "bad" for row in rows):
            raise ApiError(500, "it can't", "bad")
        return [row.tokens * 2 for row in rows]

    def seen(self) -> list[list[Any]]:
        return [[row.tokens for row in batch] for batch in self.batches]


def row(tokens: Any, length: int = 5, adapter: str | None = None, seconds: float = 9.0) -> Row[Any]:
    return Row(tokens, length, adapter, "embed", time.monotonic() + seconds)


def batching(
    work: Callable[[Batcher, Model], Coroutine[Any, Any, None]], *, mixed: bool = True, **limits: Any
) -> Model:
    """work(batcher, model) in a loop of its own."""
    model = Model()

    async def main() -> None:
        batcher: Batcher[Any] = Batcher(model.run, mixed, Limits(**limits), Metrics())
        batcher.start()
        await work(batcher, model)
        await batcher.close()

    asyncio.run(main())
    return model


async def held(batcher: Batcher, model: Model) -> asyncio.Task[Any]:
    """A row that runs until the model is let go on: what comes meanwhile waits."""
    model.go.clear()
    first = asyncio.ensure_future(batcher.answers([row("first")]))
    while not model.batches:
        await asyncio.sleep(0.001)
    return first


@pytest.mark.parametrize("mixed", [True, False])
def test_what_waits_is_one_batch_of_one_length_and_adapters_mix_where_they_can(mixed: bool) -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        await held(batcher, model)
        given = [row("a", 5, "x"), row("b", 16, "y"), row("c", 17, "x"), row("d", 9, "x"), row("e", 32, "x")]
        asked = [asyncio.ensure_future(batcher.answers([one])) for one in given]
        await asyncio.sleep(0)
        model.go.set()
        assert await asyncio.gather(*asked) == [["aa"], ["bb"], ["cc"], ["dd"], ["ee"]]

    seen = batching(work, mixed=mixed).seen()[1:]
    assert seen == ([["a", "b", "d"], ["c", "e"]] if mixed else [["a", "d"], ["b"], ["c", "e"]])


def test_batches_have_a_size_and_answers_their_order() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        await held(batcher, model)
        asked = asyncio.ensure_future(batcher.answers([row(number) for number in range(10)]))
        long = [asyncio.ensure_future(batcher.answers([row("l", 8000)])) for _ in range(3)]
        await asyncio.sleep(0)
        model.go.set()
        assert await asked == [2 * number for number in range(10)]
        assert await asyncio.gather(*long) == [["ll"]] * 3

    sizes = [len(batch) for batch in batching(work, batch=4).batches]
    assert sizes == [1, 4, 4, 2, 2, 1]  # of 8,192 tokens two are as many as go into memory


def test_the_window_is_for_those_who_had_company() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        begin = time.monotonic()
        await batcher.answers([row("alone")])
        await batcher.answers([row("again")])
        assert time.monotonic() - begin < 0.25
        await batcher.answers([row("a"), row("b")])
        begin = time.monotonic()
        first = asyncio.ensure_future(batcher.answers([row("c")]))
        await asyncio.sleep(0.05)
        await batcher.answers([row("d")])
        await first
        assert 0.3 <= time.monotonic() - begin < 3

    assert batching(work, window=300).seen() == [["alone"], ["again"], ["a", "b"], ["c", "d"]]


def test_one_bad_row_hurts_nobody() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        await held(batcher, model)
        asked = [asyncio.ensure_future(batcher.answers([row(text)])) for text in ("a", "bad", "b")]
        await asyncio.sleep(0)
        model.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert (found[0], found[2]) == (["aa"], ["bb"])
        assert isinstance(found[1], ApiError)

    assert batching(work).seen()[1:] == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]


def test_who_is_gone_or_late_is_not_run_and_who_is_too_many_is_told() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        await held(batcher, model)
        gone = asyncio.ensure_future(batcher.answers([row("gone")]))
        late = asyncio.ensure_future(batcher.answers([row("late", seconds=-1)]))
        stays = asyncio.ensure_future(batcher.answers([row("stays")]))
        goes = asyncio.ensure_future(batcher.answers([row("goes")]))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="4 of at most 4 wait already") as error:
            await batcher.answers([row("more")])
        assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
        with pytest.raises(ApiError, match="has 5 inputs, and at most 4 may wait"):
            await batcher.answers([row("more")] * 5)
        gone.cancel()
        await asyncio.sleep(0)
        more = asyncio.ensure_future(batcher.answers([row("more")]))  # in the place of who has gone
        await asyncio.sleep(0)
        goes.cancel()
        await asyncio.sleep(0)
        model.go.set()
        assert await stays == ["staysstays"]
        assert await more == ["moremore"]
        with pytest.raises(ApiError, match="waited for 7 s") as error:
            await late
        assert error.value.status == 504

    assert batching(work, queue=4, timeout=7).seen()[1:] == [["stays", "more"]]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_split_character_waits_for_its_end_and_what_is_none_is_shown() -> None:
    for raw in ("añ😀b".encode(), b"a\xff\xffb", b"\xf0\x9f", b"\xff" * 20 + b"a", b""):
        text = Written(Bytes())  # type: ignore[arg-type]
        pieces = [text.add(byte) for byte in raw] + [text.add(None)]
        assert "".join(pieces) == raw.decode(errors="replace")
    text = Written(Bytes())  # type: ignore[arg-type]
    assert [text.add(byte) for byte in "ñ".encode()] == ["", "ñ"]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[str]]]:
    """The port of a server with nothing but the guard, impatient after 0.3 s, and what became of its requests."""
    monkeypatch.setattr(guard, "_HEADER_SECONDS", 0.3)
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.3)
    said: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                body = (await receive())["body"]
                await asyncio.sleep(0.5 if body == b"long" else 0)
            except asyncio.CancelledError:
                said.append("cancelled")
                raise
            said.append("answered")
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(
        guard.Guard(app, Metrics()), http=guard.Impatient, lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1], said
        server.should_exit = True
        thread.join(10)


def ended(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    connection.settimeout(5)
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_slow_clients_are_left_and_others_dont_notice(guarded: tuple[int, list[str]]) -> None:
    port, said = guarded
    address = ("127.0.0.1", port)
    silent, slow, half = (socket.create_connection(address) for _ in range(3))
    with silent, slow, half:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
        half.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
        assert httpx.post(f"http://127.0.0.1:{port}/", content=b"x").text == "ok"
        for _ in range(3):  # a header now and then is no progress
            time.sleep(0.05)
            slow.sendall(b"X: y\r\n")
        assert ended(silent) == b""
        assert ended(slow) == b""
        answer = ended(half)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"3 bytes of the request's body were here" in answer
    assert said == ["answered"]


def test_a_client_that_goes_cancels_its_request(guarded: tuple[int, list[str]]) -> None:
    port, said = guarded
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nlong")
        time.sleep(0.1)
    end = time.monotonic() + 3
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    assert said == ["cancelled"]
    assert fault(httpx.post(f"http://127.0.0.1:{port}/", headers=[("x", "y")] * 101, content=b"x"), 431)
