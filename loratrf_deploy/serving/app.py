"""The application: paths, what they take and answer, and errors in OpenAI's form."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from ..version import __version__
from .batcher import Batcher, Limits
from .catalogue import Catalogue
from .encoder import Encoder, Tokens
from .encoding import encoder_paths
from .errors import ApiError
from .generating import generator_paths
from .generator import Generator
from .guard import Guard
from .metrics import Metrics
from .replies import FAILURES, Json
from .schemas import Done, Health, LoadRequest, Models, UnloadRequest

__all__ = ["Service", "build"]


@dataclass
class Service:
    """What is served: a model, its adapters, within limits."""

    model: Encoder | Generator
    catalogue: Catalogue
    limits: Limits
    metrics: Metrics
    allow_loading: bool = False


def build(service: Service) -> Guard:
    """The application, for uvicorn; batches run while it does."""
    batcher: Batcher[Tokens] | None = None
    if isinstance(service.model, Encoder):
        batcher = Batcher(service.model.run, service.model.mixed, service.limits, service.metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if batcher is not None:
            batcher.start()
        yield
        await (batcher or service.model).close()  # type: ignore[union-attr]  # a Generator where there is no batcher

    app = FastAPI(title="loratrf-serve", version=__version__, lifespan=lifespan, redoc_url=None, responses=FAILURES)
    _common_paths(app, service)
    if isinstance(service.model, Encoder):
        assert batcher is not None
        encoder_paths(app, service.model, service.catalogue, batcher, service.limits, service.metrics)
    else:
        generator_paths(app, service.model, service.catalogue)
    if service.allow_loading:
        _loading_paths(app, service.catalogue)
    _errors(app)
    _describe(app)
    service.metrics.watch(service.catalogue)
    return Guard(app, service.metrics)


def _common_paths(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        base = service.catalogue.base
        parent = None if name == base else base
        return {"id": name, "object": "model", "created": started, "owned_by": "loratrf-serve", "parent": parent}

    @app.get("/v1/models", response_model=Models)
    async def models() -> Response:
        """The base, and every adapter that a request may name."""
        names = [service.catalogue.base, *service.catalogue.names()]
        return Json({"object": "list", "data": list(map(entry, names))})

    @app.get("/v1/models/{name}", include_in_schema=False)
    async def one(name: str) -> Response:
        service.catalogue.check(name)
        return Json(entry(name))

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """That the server answers."""
        return Json({"status": "ok"})

    @app.get("/metrics", response_class=Response, include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = files(__package__).joinpath("page.html").read_text()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page)


def _loading_paths(app: FastAPI, catalogue: Catalogue) -> None:
    @app.post("/v1/load_lora_adapter", response_model=Done)
    async def load(body: LoadRequest) -> Response:
        """Takes a file of --adapters-dir as an adapter."""
        await catalogue.load(body.lora_name, body.lora_path, replace=body.load_inplace)
        return Json({"message": f"{body.lora_name} is loaded."})

    @app.post("/v1/unload_lora_adapter", response_model=Done)
    async def unload(body: UnloadRequest) -> Response:
        """Forgets an adapter; requests that use it are answered still."""
        await catalogue.unload(body.lora_name)
        return Json({"message": f"{body.lora_name} is unloaded."})


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return Json(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part != "body") or None
        about = f"{where}: " if where else "The body: "
        hint = "See /docs, and send it as Content-Type: application/json."
        return Json(ApiError(400, f"{about}{first['msg']}. {hint}", "invalid_request", param=where).body, 400)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        words = {404: f"There is no {request.url.path} here: see /docs, or this model is for other paths."}
        words[405] = f"{request.url.path} is not for {request.method}: see /docs."
        message = words.get(error.status_code, str(error.detail))
        body = ApiError(error.status_code, message, "invalid_request").body
        return Json(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        message = f"The server failed ({type(error).__name__}); its log says where."
        return Json(ApiError(500, message, "internal_error").body, 500)


def _describe(app: FastAPI) -> None:
    """The description without FastAPI's 422, which is 400 here."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
