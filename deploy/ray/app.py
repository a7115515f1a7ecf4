"""dit-serve on Ray Serve: replicas of its HTTP API, as many as there are requests for, each with a batcher of its own.

`serve run config.yaml` in this folder starts it; it needs the extras `[ray-serve]`, `[serve]` and an engine's. A
replica refuses what it cannot draw by its deadline, as `dit-serve` does, and Serve what would wait for a replica, both
with 429 and Retry-After. Jobs and the page are left out: Serve may ask any replica, and a job lives in one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig
from starlette.types import ASGIApp

from dit_serve.app import Service, Settings
from dit_serve.cli import read_key
from dit_serve.models import Opening, open_models


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application; `args` are `bundles` by name, and `key_file`, `deadline`, `threads` and `provider`, all
    as of `dit-serve`."""
    services: list[Service] = []  # of the replica that this is

    def replica() -> ASGIApp:
        """Open and verify the bundles when a replica starts."""
        bundles = {name: Path(folder) for name, folder in args["bundles"].items()}
        key = read_key(Path(args["key_file"])) if args.get("key_file") else None
        models = open_models(bundles, Opening(args.get("threads"), args.get("provider")), print)
        services.append(Service(models, Settings(deadline=args.get("deadline", 60.0), key=key)))
        return services[0].app(replicas=True)

    @serve.deployment(
        name="images",
        autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
        max_ongoing_requests=64,  # the batcher refuses what it cannot draw in time long before
        max_queued_requests=64,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=60,
        ray_actor_options={"num_cpus": args.get("threads") or 1},
    )
    @serve.ingress(replica)
    class Images:
        def check_health(self) -> None:
            """Let Serve replace a replica whose batcher has broken down."""
            if not all(model.batcher.alive for model in services[0].models.values()):
                raise RuntimeError("a batcher has stopped")

    return Images.bind()
