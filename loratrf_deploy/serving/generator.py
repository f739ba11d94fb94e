"""A language model behind the server: each prompt is a stream of its own, a few of them at once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..errors import UserError
from ..runtime.generation_session import GenerationSession, Prompt
from ..runtime.text import Written, read_tokenizer
from .batcher import Limits, full, late
from .catalogue import broken
from .errors import ApiError
from .metrics import Metrics

__all__ = ["Generator", "Order", "Piece", "until"]

_END = object()


class Order(NamedTuple):
    """What is to be generated."""

    tokens: Sequence[int]
    adapter: str | None
    most: int
    search: dict[str, Any]
    stops: Sequence[str]


class Piece(NamedTuple):
    """What came: text, for how many tokens; at the end why it ended."""

    text: str
    tokens: int
    finish: str | None = None


class Generator:
    """A folder of onnxruntime-genai that takes adapters. `parallel` prompts run at once; so many more wait as the queue
    holds. Raises UserError where `folder` has none."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        metrics: Metrics,
        *,
        max_bytes: int | None = None,
        threads: int = 0,
        parallel: int = 2,
    ):
        self.session = GenerationSession(folder, max_bytes=max_bytes, threads=threads)
        self._tokenizer = read_tokenizer(folder)
        self._limits, self._metrics, self._parallel = limits, metrics, parallel
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="generating")
        self._orders = 0
        metrics.waiting.set_function(lambda: max(0, self._orders - parallel))

    @property
    def takes_adapters(self) -> bool:
        """Whether the folder is one of --swappable or --adapters."""
        return self.session.takes_adapters

    def tokens(self, prompt: Prompt | Sequence[int], param: str) -> list[int]:
        """The tokens of a text, of a chat, or of themselves. 400 for what can't be encoded, or leaves no room."""
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            row = cast("list[int]", list(prompt))
        else:
            try:
                row = self.session.encode(prompt)  # type: ignore[arg-type]
            except UserError as error:
                raise ApiError(400, str(error), "invalid_prompt", param=param) from error
        if not row:
            raise ApiError(
                400, "The prompt is empty: the model needs at least one token.", "invalid_prompt", param=param
            )
        if foreign := [token for token in row if not 0 <= token < self.session.vocabulary]:
            raise ApiError(
                400,
                f"The prompt has token {foreign[0]}, the model knows 0 to {self.session.vocabulary - 1}.",
                "unknown_token",
                param=param,
            )
        if len(row) >= self.session.context:
            raise ApiError(
                400,
                f"The prompt has {len(row)} tokens, and the model's context holds {self.session.context} in all, what "
                "is generated included. Shorten it.",
                "context_length_exceeded",
                param=param,
            )
        return row

    def text(self, row: Sequence[int]) -> str:
        """What tokens say."""
        return self._tokenizer.decode(row)

    def count(self, row: Sequence[int], asked: int | None, otherwise: int) -> int:
        """How many tokens may be made. 400 where more are `asked` for than there is room for."""
        room = self.session.context - len(row)
        if asked is not None and asked > room:
            raise ApiError(
                400,
                f"The prompt has {len(row)} tokens and max_tokens is {asked}; the model's context holds "
                f"{self.session.context} in all. Ask for {room} at most, or shorten the prompt.",
                "context_length_exceeded",
                param="max_tokens",
            )
        return min(room, otherwise) if asked is None else asked

    def check_room(self, orders: int) -> None:
        """429 where as many can't wait now."""
        if self._orders + orders > self._limits.queue + self._parallel:
            raise full(max(0, self._orders - self._parallel), self._limits.queue)

    async def stream(self, order: Order) -> AsyncIterator[Piece]:
        """Pieces of text as they are made. What is left behind by who stops to ask ends after the token it is at."""
        self.check_room(1)
        self._orders += 1
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Any]()
        stop, begun = threading.Event(), threading.Event()
        deadline = time.monotonic() + self._limits.timeout

        def put(piece: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                if stop.is_set():
                    return
                if time.monotonic() > deadline:
                    raise late(self._limits.timeout)
                begun.set()
                self._make(order, stop, put)
            except Exception as error:
                put(error)
            finally:
                put(_END)

        running = self._threads.submit(work)
        running.add_done_callback(lambda _: self._left(loop))
        try:
            while (piece := await pieces.get()) is not _END:
                if isinstance(piece, UserError):
                    raise broken(order.adapter, piece) from piece
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            stop.set()
            running.cancel()

    def _left(self, loop: asyncio.AbstractEventLoop) -> None:
        def less() -> None:
            self._orders -= 1

        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(less)

    def _make(self, order: Order, stop: threading.Event, put: Any) -> None:
        text, held, made = Written(self._tokenizer), "", 0
        which: dict[str, Any] = {"adapter": order.adapter} if self.takes_adapters else {}
        tokens = self.session.stream_tokens(order.tokens, max_new_tokens=order.most, **which, **order.search)
        self._metrics.prompt_tokens.inc(len(order.tokens))
        try:
            for token in tokens:
                made += 1
                self._metrics.made_tokens.inc()
                shown, held, ended = until(held + text.add(token), order.stops)
                if ended or shown:
                    put(Piece(shown, made, "stop" if ended else None))
                if ended or stop.is_set():
                    return
        finally:
            tokens.close()  # type: ignore[attr-defined]  # a generator: what it holds of the adapter goes now
        shown, held, ended = until(held + text.add(None), order.stops)
        put(Piece(shown + held, made, "length" if not ended and made == order.most else "stop"))

    async def close(self) -> None:
        """Ends when what runs is done."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)


def until(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """(what can be shown, what may yet become one of `stops`, whether one came): nothing of one is shown."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], "", True
    for size in range(max(map(len, stops), default=1) - 1, 0, -1):
        if size <= len(text) and any(stop.startswith(text[-size:]) for stop in stops if len(stop) > size):
            return text[:-size], text[-size:], False
    return text, "", False
