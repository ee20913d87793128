"""The HTTP side of the service: routes, limits and error shape around handles to the replicas.

Holds no model: it reads requests and writes answers, so it stays quick while others compute. Deployed by `app`.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve_apps.bodies import BodyLimit
from serve_apps.chat_routes import chat_routes
from serve_apps.faults import ErrorShape, Faults
from serve_apps.settings import ServiceSettings
from serve_apps.stream_routes import stream_routes


class Ingress:
    """`student` and `streams` are Serve handles. Serve asks for the HTTP application once, in the replica."""

    def __init__(self, settings: ServiceSettings, created: int, student: Any, streams: Any) -> None:
        self._settings = settings
        self._created = created
        self._student = student.options(stream=True)
        self._streams = streams

    def __serve_build_asgi_app__(self) -> BodyLimit:
        return http_app(self._settings, self._created, self._student, self._streams)


def http_app(settings: ServiceSettings, created: int, student: Any, streams: Any) -> BodyLimit:
    """The whole HTTP application over two handles: `student` streams its events, `streams` answers in one piece."""
    faults = Faults(logging.getLogger("ray.serve"))
    app = FastAPI(title="sparsight", docs_url=None, redoc_url=None, openapi_url=None)

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        refusal = faults.refusal_of(error)
        return JSONResponse(refusal.body, refusal.status, headers=getattr(error, "headers", None))

    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": settings.name}

    app.add_exception_handler(HTTPException, unknown)
    app.add_api_route("/healthz", healthz, methods=["GET"])
    app.include_router(chat_routes(student, settings.name, created, faults))
    app.include_router(stream_routes(streams, settings.name))
    app.add_middleware(ErrorShape, faults=faults)
    # Outermost, also because Serve gives handlers of its own, in another shape, to anything that is a FastAPI.
    return BodyLimit(app, settings.serve.max_body_bytes)
