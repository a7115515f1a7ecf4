"""`dit-serve`: serve bundles over HTTP."""

from __future__ import annotations

import logging
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from dit_runtime.cli import Parser, guarded
from dit_runtime.errors import UsageError
from dit_serve.app import Service, Settings
from dit_serve.body import Limits
from dit_serve.guard import LOCAL, JsonLines
from dit_serve.models import Opening, open_models
from dit_serve.protocol import Protocol

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
CONNECTIONS = 500  # open at a time
log = logging.getLogger("dit_serve")


def main(arguments: Sequence[str] | None = None) -> int:
    return guarded("dit-serve", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    key = _read_key(options.api_key_file) if options.api_key_file else None
    if options.host not in ("127.0.0.1", "::1", "localhost") and key is None:
        raise UsageError(f"--host {options.host} is open to others: pass --api-key-file FILE too")
    named = _named(options.bundles)
    _log_as_json()
    opening = Opening(options.threads, options.provider, options.batch, not options.skip_verify, options.pin)
    models = open_models(named, opening, lambda line: log.info(line))
    limits = Limits(options.max_images, options.max_steps, options.max_pixels)
    settings = Settings(options.deadline, options.job_deadline, options.grace, limits, key, (*LOCAL, options.host))
    service = Service(models, settings)
    config = uvicorn.Config(
        service.app(),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(options.grace),
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=16 << 10,  # bytes of a request's head
    )
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port), family=family, backlog=256) as listener:
        host = f"[{options.host}]" if ":" in options.host else options.host
        log.info("listening", extra={"fields": {"url": f"http://{host}:{listener.getsockname()[1]}/"}})
        Server(config, service).run(sockets=[listener])
    return 0


class Server(uvicorn.Server):
    """Says that it is not ready from the signal on, before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order, and at a second ctrl-c at once; the exit code is 0, not the signal's."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = self._service.draining = True


def _parser() -> Parser:
    parser = Parser(prog="dit-serve", description="Serve bundles over HTTP, as OpenAI's image clients ask for it.")
    add = parser.add_argument
    add("bundles", nargs="+", metavar="[NAME=]FOLDER", help="the first is what a request without a model gets")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1; any other needs --api-key-file")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add("--api-key-file", type=Path, metavar="FILE", help="clients must send this key as a bearer token")
    add("--threads", type=int, help="of the engines; default: their own choice")
    add("--provider", help="ONNX Runtime's execution provider: cpu, cuda, cuda:N")
    add("--batch", type=int, help="most images that share a call; default: measured at the start")
    add("--deadline", type=float, default=60.0, help="seconds for a request; what cannot keep it gets 429; default: 60")
    add("--job-deadline", type=float, default=600.0, help="seconds for a job; default: 600")
    add("--grace", type=float, default=30.0, help="seconds for what is under way at SIGTERM; default: 30")
    add("--max-images", type=int, default=8, help="of a request; default: 8")
    add("--max-steps", type=int, default=250, help="default: 250")
    add("--max-pixels", type=int, default=2**24, help="of a request's images in all; default: 2**24")
    add("--pin", nargs="+", default=[], metavar="SHA256", help="serve only bundles whose manifest.json has such a sum")
    add("--skip-verify", action="store_true", help="start without a replay of the reference; a swap always replays it")
    return parser


def _named(bundles: Sequence[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in bundles:
        name, sign, folder = text.partition("=")
        if not sign:
            name, folder = Path(text).resolve().name, text
        if not NAME.fullmatch(name) or name in named:
            raise UsageError(f"bundle {text!r}: expected NAME=FOLDER, each name once, of letters, digits, and . _ -")
        named[name] = Path(folder)
    return named


def _read_key(file: Path) -> bytes:
    key = file.read_bytes().strip()
    if len(key) < 16 or not key.isascii() or len(key.split()) != 1:
        raise UsageError(f"{file}: expected one key of at least 16 characters, without spaces")
    return key


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("dit_serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger: Any = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
