"""Several replicas of the server behind one address, as a Ray Serve application; needs the extra `[cluster]`."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp

from transept.core.errors import InputError, SourceError
from transept.serving.shelf import Settings


def application(settings: Settings, *, replicas: int = 2, cores: float = 1) -> Any:
    """A Ray Serve application of so many replicas, each a whole server with its own models: `ray.serve.run(application(...))`.

    `cores` are the processor cores that Ray sets aside for one replica. The keys, limits and places of `settings` hold for each replica
    by itself; Ray's proxy stands before them, so the Host header is checked against `settings.hosts` as it passes it on.
    Errors: InputError for fewer than one replica, SourceError without ray.
    """
    if replicas < 1 or cores <= 0:
        raise InputError(f"a cluster has one replica or more with some cores for each, found {replicas} with {cores}")
    try:
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError("a cluster is run by Ray Serve, which is not installed: pip install 'transept[cluster]'") from None

    def build() -> ASGIApp:
        from transept.serving.app import create

        return create(settings)

    deployment: Any = serve.deployment(serve.ingress(build)())
    queue = settings.limits["queue"]
    return deployment.options(
        name="transept", num_replicas=replicas, ray_actor_options={"num_cpus": cores}, max_ongoing_requests=queue
    ).bind()
