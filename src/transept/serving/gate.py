"""Admission: how many requests and tokens may be under way, in all and by one key; the rest are refused at once (RELIABILITY E-4)."""

from __future__ import annotations

import math
import time
from collections import Counter

from transept.inference.engine import Stream
from transept.serving.errors import Refusal
from transept.serving.limits import Limits


class Ticket:
    """One request's place, and what it has in the engine; given back exactly once, however it ends."""

    def __init__(self, gate: Gate, tenant: str):
        self.gate, self.tenant, self.tokens, self.open = gate, tenant, 0, True
        self.streams: list[Stream] = []

    def claim(self, tokens: int) -> None:
        """The request may reach so many tokens. Raises Refusal (429) where too many are under way."""
        if self.gate.tokens and self.gate.tokens + tokens > self.gate.limits["tokens"]:
            raise self.gate.full(f"{self.gate.tokens} tokens are under way and the request may need {tokens}")
        self.tokens += tokens
        self.gate.tokens += tokens

    def close(self) -> None:
        """Gives the place back."""
        if self.open:
            self.open = False
            for stream in self.streams:
                if stream.left:
                    stream.cancel()
            self.gate.leave(self)


class Gate:
    """Counts what is under way; used on the event loop only."""

    def __init__(self, limits: Limits, keys: int):
        self.limits, self.requests, self.tokens = limits, 0, 0
        self.by_tenant: Counter[str] = Counter()
        self.share = limits["queue"] * (limits["share"] if keys > 1 else 100) // 100 or 1
        self.pace, self.last = 0.1, time.monotonic()

    def check(self, tenant: str) -> None:
        """Raises Refusal (429), with the seconds after which another attempt makes sense, where there is no place."""
        if self.requests >= self.limits["queue"]:
            raise self.full(f"{self.requests} requests are under way, which is all that this server takes")
        if self.by_tenant[tenant] >= self.share:
            raise self.full(f"this key has {self.by_tenant[tenant]} requests under way, which is its share")

    def enter(self, tenant: str) -> Ticket:
        """A place for one request. Raises Refusal (429)."""
        self.check(tenant)
        self.requests += 1
        self.by_tenant[tenant] += 1
        return Ticket(self, tenant)

    def leave(self, ticket: Ticket) -> None:
        """A request is over; how long that took since the one before is the server's pace."""
        self.requests -= 1
        self.tokens -= ticket.tokens
        self.by_tenant[ticket.tenant] -= 1
        if not self.by_tenant[ticket.tenant]:
            del self.by_tenant[ticket.tenant]
        now = time.monotonic()
        self.pace, self.last = 0.9 * self.pace + 0.1 * min(now - self.last, 10.0), now

    def full(self, why: str) -> Refusal:
        """The refusal: half of what is under way should be done by then."""
        seconds = min(60, max(1, math.ceil(self.pace * self.requests / 2)))
        return Refusal(429, f"{why}; try again in {seconds} seconds", code="queue_full", headers={"Retry-After": str(seconds)})
