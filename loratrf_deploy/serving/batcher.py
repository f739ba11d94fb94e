"""Rows of many requests become batches, whatever adapters they name."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import ApiError
from .metrics import Metrics

__all__ = ["Batcher", "Limits", "Row", "full", "late"]

T = TypeVar("T")

_SHORTEST = 16
"""Rows of up to as many tokens are of one length to us."""
_TOKENS = 16_384
"""In a batch, padding included: what is computed between two layers of a large encoder stays below some 200 MB."""


@dataclass(frozen=True)
class Limits:
    """Of a server: rows in a batch, milliseconds that the first of them waits for others, rows that may wait, seconds
    until a request has waited too long."""

    batch: int = 32
    window: float = 2.0
    queue: int = 1024
    timeout: float = 60.0


@dataclass(eq=False)
class Row(Generic[T]):
    """A text of a request: its tokens, its adapter, what is wanted of it, until when, and where its answer goes."""

    tokens: T
    length: int
    adapter: str | None
    wanted: str
    deadline: float
    answer: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


def full(waiting: int, limit: int) -> ApiError:
    """429, with when to try again."""
    return ApiError(
        429,
        f"{waiting} of at most {limit} wait already. Send it again in a second, or start the server with a larger "
        "--queue.",
        "queue_full",
        headers={"Retry-After": "1"},
    )


class Batcher(Generic[T]):
    """One batch at a time, in a thread: `run` gives an answer for each of its rows, or raises.

    1. The row that has waited longest is in the next batch, with those that go with it: of as many tokens, rounded up
       to a power of two, and with `mixed` of any adapter, else of its own.
    2. A row that comes when nothing waits is run with those that come within the window. It doesn't wait where the last
       batch was of one row: who is alone pays nothing for company that isn't there.
    3. A row whose request is gone, or late, is dropped before it is run.
    4. Where a batch fails, its rows run again one by one: the fault of one is no other's.
    """

    def __init__(self, run: Callable[[Sequence[Row[T]]], Sequence[Any]], mixed: bool, limits: Limits, metrics: Metrics):
        self._run, self._mixed, self._limits, self._metrics = run, mixed, limits, metrics
        self._waiting: deque[Row[T]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._last = 1
        self._task: asyncio.Task[None] | None = None
        metrics.waiting.set_function(lambda: len(self._waiting))

    def start(self) -> None:
        """Begins to run batches, in this event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Ends when the batch that runs is done; what still waits isn't answered."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await asyncio.to_thread(self._thread.shutdown)

    def check_room(self, rows: int) -> None:
        """429 where as many don't go into the queue now, 400 where they never do."""
        if rows > self._limits.queue:
            raise ApiError(
                400,
                f"The request has {rows} inputs, and at most {self._limits.queue} may wait here. Send fewer at once.",
                "too_many_inputs",
                param="input",
            )
        if len(self._waiting) + rows > self._limits.queue:
            self._waiting = deque(row for row in self._waiting if not row.answer.done())
            if len(self._waiting) + rows > self._limits.queue:
                raise full(len(self._waiting), self._limits.queue)

    async def answers(self, rows: Sequence[Row[T]]) -> list[Any]:
        """Of every row what `run` gave, in their order. Raises what `run` raised for the first that it failed on."""
        self.check_room(len(rows))
        self._waiting.extend(rows)
        self._arrived.set()
        try:
            return [await row.answer for row in rows]
        finally:
            for row in rows:  # of a request that is gone, or failed: asyncio complains of errors that nobody looks at
                if not row.answer.cancel() and not row.answer.cancelled():
                    row.answer.exception()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                await self._company()
            rows = self._take()
            if not rows:
                continue
            self._last = len(rows)
            self._metrics.batch_rows.observe(len(rows))
            for row, answer in zip(rows, await loop.run_in_executor(self._thread, self._tried, rows), strict=True):
                if row.answer.done():
                    continue
                if isinstance(answer, Exception):
                    row.answer.set_exception(answer)
                else:
                    row.answer.set_result(answer)

    async def _company(self) -> None:
        """Waits for a row, and then for others."""
        self._arrived.clear()
        await self._arrived.wait()
        if self._last == 1 and len(self._waiting) == 1:
            return
        end = time.monotonic() + self._limits.window / 1e3
        while len(self._waiting) < self._limits.batch and (left := end - time.monotonic()) > 0:
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _take(self) -> list[Row[T]]:
        """The next batch, which is no longer in the queue."""
        now = time.monotonic()
        batch: list[Row[T]] = []
        rest: deque[Row[T]] = deque()
        key: Hashable = None
        for row in self._waiting:
            if row.answer.done():
                continue
            if row.deadline < now:
                row.answer.set_exception(late(self._limits.timeout))
                continue
            key = key if batch else self._key(row)
            most = min(self._limits.batch, max(1, _TOKENS // _rounded(row.length)))
            if len(batch) < most and self._key(row) == key:
                batch.append(row)
            else:
                rest.append(row)
        self._waiting = rest
        return batch

    def _key(self, row: Row[T]) -> Hashable:
        return _rounded(row.length), None if self._mixed else row.adapter

    def _tried(self, rows: Sequence[Row[T]]) -> Sequence[Any]:
        try:
            return self._run(rows)
        except Exception as error:
            if len(rows) == 1:
                return [error]
        return [answer for row in rows for answer in self._tried([row])]


def late(seconds: float) -> ApiError:
    """504: it waited for longer than it may."""
    return ApiError(
        504,
        f"The request waited for {seconds:g} s, which is as long as it may (--timeout). Send it again when there is "
        "less to do.",
        "timeout",
    )


def _rounded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())
