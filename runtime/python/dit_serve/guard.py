"""Check every request before its body is read, and log it after its answer."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dit_serve.faults import Fault

OPEN = ("/", "/healthz", "/readyz")  # paths that need no key
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NO_FORMS: Mapping[str, int] = {}
LOCAL = ("localhost", "127.0.0.1", "[::1]")

log = logging.getLogger("dit_serve")


class Guard:
    """Checks host, key, and the length and type of a body; gives each request an id, and logs it.

    This is plain ASGI: behind Starlette's own middleware a handler does not see that its client has left.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: bytes | None,
        hosts: Collection[str],
        most: int,
        busy: Callable[[Scope], Fault | None] = lambda _: None,
        forms: Mapping[str, int] = NO_FORMS,
    ) -> None:
        """Serve only `hosts` where there is no key, so that no page of another origin reaches a server on this machine.

        `busy` refuses a request before its body is read, where no model has room. Bodies are JSON of at most `most`
        bytes; those of the paths in `forms` are forms, each with its own limit.
        """
        self._forms = forms
        self._app, self._key, self._hosts, self._most, self._busy = app, key, hosts, most, busy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        own = headers.get("x-request-id", "")
        fields: dict[str, Any] = {"id": own if ID.fullmatch(own) else secrets.token_hex(8)}
        scope["fields"], status = fields, 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = fields["id"]
                answered.setdefault("cache-control", "no-store")
                answered["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            if refused := self._refuse(scope, headers) or self._busy(scope):
                await refused.response()(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            spent = round(1e3 * (time.monotonic() - began), 1)
            line = {"method": scope["method"], "path": scope["path"][:200], "status": status, "ms": spent}
            level = logging.DEBUG if scope["path"] in ("/healthz", "/readyz", "/metrics") else logging.INFO
            log.log(level, "request", extra={"fields": fields | line})

    def _refuse(self, scope: Scope, headers: Headers) -> Fault | None:
        host = _host(headers.get("host", ""))
        if self._key is None and host not in self._hosts:
            return Fault(403, "this server has no API key, so it answers only to its own host name")
        if self._key is not None and scope["path"] not in OPEN:
            sent = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(sent, b"Bearer " + self._key):
                return Fault(401, "no API key, or a wrong one", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            if self._key is None and _host(headers.get("origin", host).rpartition("/")[2]) not in self._hosts:
                return Fault(403, "this server has no API key, so it takes nothing from pages of other origins")
            length = headers.get("content-length", "")  # of a chunked body it would say nothing
            if "transfer-encoding" in headers or not (length.isascii() and length.isdecimal()):
                return Fault(411, "a body needs its length, Content-Length")
            most = self._forms.get(scope["path"], self._most)
            if len(length) > 12 or int(length) > most:
                return Fault(413, f"the body has more than {most} bytes")
            kind = "multipart/form-data" if scope["path"] in self._forms else "application/json"
            if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
                return Fault(415, f"the body must have the type {kind}")
        return None


def _host(name: str) -> str:
    """Return a host's name without its port."""
    return re.sub(r":\d*$", "", name)


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
