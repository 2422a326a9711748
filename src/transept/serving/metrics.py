"""What /metrics tells Prometheus: counts and sizes, never a text, a key or a name that a sender chose."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The figures of one server; a registry of its own, so that several servers fit in one process."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter("transept_requests", "Requests by address and status", ("path", "status"), registry=r)
        self.tokens = Counter("transept_tokens", "Tokens by model and kind", ("model", "kind"), registry=r)
        self.first = Histogram("transept_first_token_seconds", "Time to the first token", ("model",), buckets=SECONDS, registry=r)
        self.whole = Histogram("transept_request_seconds", "Time of a request in the server", buckets=SECONDS, registry=r)
        self.live = Gauge("transept_live", "Requests, tokens, pages and bytes in use", ("what",), registry=r)

    def observe(self, scope: Scope, status: int) -> None:
        """A request is over."""
        route = scope.get("route")
        self.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def text(self, sizes: Callable[[], dict[str, int]]) -> bytes:
        """All figures in Prometheus's text format."""
        for what, value in sizes().items():
            self.live.labels(what).set(value)
        return generate_latest(self.registry)

    def answered(self, model: str, prompt: int, completion: int, begin: float) -> None:
        """An answer is over."""
        self.tokens.labels(model, "prompt").inc(prompt)
        self.tokens.labels(model, "completion").inc(completion)
        self.whole.observe(time.monotonic() - begin)
