"""Answers that are errors, in the form that OpenAI's clients read."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dit_runtime.console import line
from dit_runtime.errors import UsageError

log = logging.getLogger("dit_serve")
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Fault(Exception):
    """An error that the client gets to read."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    @property
    def body(self) -> dict[str, object]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def refusal(error: UsageError, param: str | None = None) -> Fault:
    """Turn the runtime's error into a response 400 with a message of one line, which is cut if it is too long."""
    return Fault(400, line(str(error)), param)


def retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


async def answer_fault(request: Request, error: Fault) -> Response:
    if error.status == 500:
        log.error("failed", extra={"fields": request.scope["fields"]}, exc_info=error.__cause__ or error)
    return error.response()


async def answer_http(request: Request, error: HTTPException) -> Response:
    return Fault(error.status_code, error.detail, headers=error.headers).response()


async def answer_bug(request: Request, error: Exception) -> Response:
    log.error("internal error", extra={"fields": request.scope["fields"]}, exc_info=error)
    return Fault(500, "internal error; the server's log says more under this request's id").response()
