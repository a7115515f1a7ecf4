"""The process of `dit-serve`: bundles are opened, a socket listens, and signals end it."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from dit_serve.app import Service, Settings
from dit_serve.body import Limits
from dit_serve.guard import LOCAL, JsonLines
from dit_serve.models import Opening, open_models
from dit_serve.protocol import Protocol

CONNECTIONS = 500  # open at a time
log = logging.getLogger("dit_serve")


def serve(options: argparse.Namespace, named: Mapping[str, Path], key: bytes | None) -> None:
    """Serve the bundles until SIGTERM or ctrl-c."""
    _log_as_json(logging.WARNING if options.quiet else logging.INFO)
    how = options.threads, options.provider, options.batch, options.allow_batch_variance
    opening = Opening(*how, not options.skip_verify, options.pin, options.public_key)
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


class Server(uvicorn.Server):
    """Says that it is not ready from the signal on, before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order, and at a second ctrl-c at once; the exit code is 0, not the signal's."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self._service.drain()
        self.should_exit = True


def _log_as_json(least: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("dit_serve", least), ("uvicorn.error", logging.WARNING)):
        logger: Any = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
