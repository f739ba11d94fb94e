"""Answers as they are sent, and what every path may answer instead."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi.responses import Response

from .schemas import Failure

__all__ = ["FAILURES", "Json", "answer_id"]

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failure, "description": what}
    for status, what in {
        400: "The request is at fault",
        404: "No such model",
        408: "The request came too slowly",
        413: "The request is too large",
        429: "Too many requests wait",
        431: "Too many headers",
        500: "An adapter's file, or the server, is at fault",
        504: "The request waited for too long",
    }.items()
}


class Json(Response):
    """JSON in ASCII: a stranger's half surrogates are no text, and go through."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(json.dumps(content, separators=(",", ":")), status, dict(headers or {}))


def answer_id(kind: str) -> str:
    """What an answer is called: its kind, and a number that no other has."""
    return f"{kind}-{uuid.uuid4().hex}"
