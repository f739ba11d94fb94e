"""A language model's paths: completions and chats, whole or as they are made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from .catalogue import UNUSABLE, Catalogue
from .encoding import rows_of
from .errors import ApiError
from .generator import Generator, Order, Piece
from .replies import Json, answer_id
from .schemas import ChatCompletion, ChatRequest, Completion, CompletionRequest

__all__ = ["generator_paths"]

_COMPLETION, _CHAT = 16, 512
"""Tokens that are made where a request doesn't say: OpenAI's number, and one of ours."""


def generator_paths(app: FastAPI, generator: Generator, catalogue: Catalogue) -> None:
    """Adds /v1/completions and /v1/chat/completions to `app`."""

    async def ready(name: str) -> str | None:
        catalogue.check(name)
        adapter = await catalogue.ready(name)
        if adapter is None and generator.takes_adapters and generator.session.default == "required":
            raise ApiError(
                400, "This model needs an adapter: name one of /v1/models.", "adapter_required", param="model"
            )
        return adapter

    def order(body: CompletionRequest | ChatRequest, row: list[int], adapter: str | None, count: int) -> Order:
        return Order(row, adapter, count, body.search, body.stops)

    async def pieces(asked: Order, name: str) -> AsyncIterator[Piece]:
        try:
            async with contextlib.aclosing(generator.stream(asked)) as stream:  # type: ignore[type-var]
                async for piece in stream:
                    yield piece
        except ApiError as error:
            if error.code == UNUSABLE:
                catalogue.check(name)  # it was unloaded while the request waited: 404
            raise

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest) -> Response:
        """What follows each prompt, under the adapter that `model` names."""
        prompts = rows_of(body.prompt)
        if body.stream and len(prompts) > 1:
            message = f"stream is of one prompt, and {len(prompts)} are given. Send each by itself, or without stream."
            raise ApiError(400, message, "invalid_request", param="stream")
        generator.check_room(len(prompts))
        rows = [generator.tokens(prompt, "prompt") for prompt in prompts]
        counts = [generator.count(row, body.max_tokens, _COMPLETION) for row in rows]
        adapter = await ready(body.model)
        orders = [order(body, row, adapter, count) for row, count in zip(rows, counts, strict=True)]
        echoes = [generator.text(row) if body.echo else "" for row in rows]
        head = {"id": answer_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": body.model}

        def choice(at: int, text: str, finish: str | None) -> dict[str, Any]:
            return {"index": at, "text": text, "finish_reason": finish, "logprobs": None}

        streams = [pieces(asked, body.model) for asked in orders]
        if body.stream:
            before = [choice(0, echoes[0], None)] if body.echo else []
            chunks = _Chunks(head, before, lambda piece: choice(0, piece.text, piece.finish), body.with_usage)
            return await chunks.response(streams[0], len(rows[0]))
        made = await _all(streams)
        choices = [choice(at, echoes[at] + own.text, own.finish) for at, own in enumerate(made)]
        return Json({**head, "choices": choices, "usage": _usage(rows, made)})

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chats(body: ChatRequest) -> Response:
        """The next turn of a chat, under the adapter that `model` names."""
        generator.check_room(1)
        row = generator.tokens(
            [{"role": message.role, "content": message.text} for message in body.messages], "messages"
        )
        count = generator.count(row, body.max_completion_tokens or body.max_tokens, _CHAT)
        stream = pieces(order(body, row, await ready(body.model), count), body.model)
        head = {"id": answer_id("chatcmpl"), "created": int(time.time()), "model": body.model}

        def delta(finish: str | None, **said: str) -> dict[str, Any]:
            return {"index": 0, "delta": said, "finish_reason": finish, "logprobs": None}

        def shown(piece: Piece) -> dict[str, Any]:
            return delta(piece.finish, content=piece.text) if piece.text else delta(piece.finish)

        if body.stream:
            head["object"] = "chat.completion.chunk"
            before = [delta(None, role="assistant", content="")]
            return await _Chunks(head, before, shown, body.with_usage).response(stream, len(row))
        (made,) = await _all([stream])
        said = {"role": "assistant", "content": made.text}
        choice = {"index": 0, "message": said, "finish_reason": made.finish, "logprobs": None}
        return Json({**head, "object": "chat.completion", "choices": [choice], "usage": _usage([row], [made])})


class _Chunks:
    """Server-sent events, each `head` with one choice: those of `before`, then what `shown` makes of each piece."""

    def __init__(
        self,
        head: dict[str, Any],
        before: Sequence[dict[str, Any]],
        shown: Callable[[Piece], dict[str, Any]],
        with_usage: bool,
    ):
        self._head, self._before, self._shown, self._with_usage = head, before, shown, with_usage

    async def response(self, stream: AsyncIterator[Piece], prompt: int) -> Response:
        """Begins when the first piece is there: what fails before that has a status of its own."""
        first = await anext(stream)
        return StreamingResponse(self._events(first, stream, prompt), media_type="text/event-stream")

    async def _events(self, first: Piece, stream: AsyncIterator[Piece], prompt: int) -> AsyncIterator[str]:
        piece = first
        async with contextlib.aclosing(stream):  # type: ignore[type-var]
            for choice in self._before:
                yield self._event([choice])
            yield self._event([self._shown(first)])
            try:
                async for piece in stream:
                    yield self._event([self._shown(piece)])
            except ApiError as error:
                yield _data(error.body)
                return
        if self._with_usage:
            yield self._event([], _counted(prompt, piece.tokens))
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        return _data({**self._head, "choices": choices, **({"usage": usage} if self._with_usage else {})})


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def _all(streams: Sequence[AsyncIterator[Piece]]) -> list[Piece]:
    """Each stream as one piece. The first that fails ends the others."""

    async def whole(stream: AsyncIterator[Piece]) -> Piece:
        made = Piece("", 0)
        async with contextlib.aclosing(stream):  # type: ignore[type-var]
            async for piece in stream:
                made = Piece(made.text + piece.text, piece.tokens, piece.finish)
        return made

    tasks = [asyncio.ensure_future(whole(stream)) for stream in streams]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _usage(rows: Sequence[Sequence[int]], made: Sequence[Piece]) -> dict[str, int]:
    return _counted(sum(map(len, rows)), sum(piece.tokens for piece in made))


def _counted(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
