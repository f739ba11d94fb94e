"""What a client is told: a status, and an error as OpenAI's API words it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import cut, one_line, some

__all__ = ["ApiError", "unknown_model"]

_TYPES = {403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request can't be answered: what was wrong, what was expected, what to do, on one printable line.

    `code` is a word for programs, `param` the field of the body that is at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(cut(one_line(message)))
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def unknown_model(name: str, known: Collection[str]) -> ApiError:
    """404, with the names that there are."""
    return ApiError(
        404,
        f"There is no model {name!r} here. There are: {some(known, limit=20)}. GET /v1/models lists all of them.",
        "model_not_found",
        param="model",
    )
