"""An encoder's paths: embeddings and classes."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import Response
from numpy.typing import NDArray

from .batcher import Batcher, Limits, Row
from .catalogue import UNUSABLE, Catalogue
from .encoder import CLASSIFY, EMBED, Encoder, Tokens
from .errors import ApiError
from .metrics import Metrics
from .replies import Json, answer_id
from .schemas import Classification, ClassifyRequest, EmbeddingRequest, Embeddings

__all__ = ["encoder_paths", "rows_of"]

_SHORT = 4096
"""Characters that are made tokens here and now; more would hold up others, and go to a thread."""


def encoder_paths(
    app: FastAPI,
    encoder: Encoder,
    catalogue: Catalogue,
    batcher: Batcher[Tokens],
    limits: Limits,
    metrics: Metrics,
) -> None:
    """Adds /v1/embeddings and /classify to `app`."""

    async def answers(body: EmbeddingRequest | ClassifyRequest, wanted: str) -> tuple[list[Any], int]:
        """What each text is answered, and how many tokens were read."""
        encoder.check(wanted)
        catalogue.check(body.model)
        deadline = time.monotonic() + limits.timeout
        texts = rows_of(body.input)
        batcher.check_room(len(texts))
        if sum(map(len, texts)) > _SHORT:
            tokens = await asyncio.to_thread(lambda: list(map(encoder.tokens, texts)))
        else:
            tokens = list(map(encoder.tokens, texts))
        adapter = await catalogue.ready(body.model)
        if adapter is None and encoder.session.default == "required":
            raise ApiError(
                400, "This model needs an adapter: name one of /v1/models.", "adapter_required", param="model"
            )
        rows = [Row(own, len(own.ids), adapter, wanted, deadline) for own in tokens]
        try:
            found = await batcher.answers(rows)
        except ApiError as error:
            if error.code == UNUSABLE:
                catalogue.check(body.model)  # it was unloaded while the request waited: 404
            raise
        count = sum(row.length for row in rows)
        metrics.prompt_tokens.inc(count)
        return found, count

    @app.post("/v1/embeddings", response_model=Embeddings)
    async def embeddings(body: EmbeddingRequest) -> Response:
        """The embedding of each text, under the adapter that `model` names."""
        found, count = await answers(body, EMBED)
        if body.dimensions is not None:
            found = [cut(value, body.dimensions, encoder) for value in found]
        if body.encoding_format == "base64":
            shown = [base64.b64encode(value.astype("<f4").tobytes()).decode() for value in found]
        else:
            shown = [value.tolist() for value in found]
        data = [{"object": "embedding", "index": at, "embedding": value} for at, value in enumerate(shown)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return Json({"object": "list", "data": data, "model": body.model, "usage": usage})

    @app.post("/classify", response_model=Classification)
    async def classify(body: ClassifyRequest) -> Response:
        """The likeliest label of each text, and what all are likely, under the adapter that `model` names."""
        found, count = await answers(body, CLASSIFY)
        data = [
            {
                "index": at,
                "label": classes.labels[int(np.argmax(classes.probabilities))],
                "probs": classes.probabilities,
                "num_classes": len(classes.labels),
                "labels": list(classes.labels),
            }
            for at, classes in enumerate(found)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        made = {"id": answer_id("classify"), "object": "list", "created": int(time.time()), "model": body.model}
        return Json({**made, "data": data, "usage": usage})


def rows_of(given: str | Sequence[Any]) -> list[str | list[int]]:
    """One text or several, as text or as tokens, as a list of them."""
    if isinstance(given, str):
        return [given]
    rows: list[Any] = list(given)
    return [rows] if isinstance(rows[0], int) else rows


def cut(value: NDArray[np.float32], count: int, encoder: Encoder) -> NDArray[np.float32]:
    """The first `count` dimensions, of length 1 where the model's are. 400 where it has fewer."""
    if count > len(value):
        raise ApiError(
            400,
            f"dimensions is {count}, and the model's embeddings have {len(value)}. Ask for 1 to {len(value)}.",
            "invalid_dimensions",
            param="dimensions",
        )
    value = value[:count]
    if encoder.embedding is not None and encoder.embedding.normalize:
        value = value / max(float(np.linalg.norm(value)), 1e-12)
    return value
