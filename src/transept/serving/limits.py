"""Every limit of the server in one table: what is checked before work is done, and what the operator may raise it to (RELIABILITY H-3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transept.core.errors import InputError, nearest


@dataclass(frozen=True)
class Limit:
    """One limit: its value unless the operator sets another, and the most that he may set."""

    name: str
    default: int
    ceiling: int
    unit: str
    what: str


TABLE = (
    Limit("body", 4 << 20, 64 << 20, "bytes", "body of a request"),
    Limit("depth", 64, 64, "levels", "nesting of a request's JSON"),
    Limit("messages", 512, 4096, "messages", "messages of a conversation"),
    Limit("parts", 64, 512, "parts", "content parts of a message"),
    Limit("text", 16, 64, "characters", "text of a prompt for each token of the model's context"),
    Limit("prompts", 16, 128, "prompts", "prompts of one completion request"),
    Limit("inputs", 256, 2048, "texts", "texts to embed or classify in one request"),
    Limit("inspected", 512, 4096, "tokens", "text that is looked into"),
    Limit("weights", 1 << 20, 1 << 24, "numbers", "attention maps of one reply"),
    Limit("n", 8, 64, "choices", "answers to one prompt"),
    Limit("top_logprobs", 20, 20, "tokens", "alternatives of a token"),
    Limit("max_tokens", 65536, 1 << 20, "tokens", "length of an answer"),
    Limit("answer", 1024, 65536, "tokens", "length of an answer where the request names none"),
    Limit("stop", 4, 16, "strings", "stop strings"),
    Limit("stop_length", 256, 1024, "characters", "one stop string"),
    Limit("logit_bias", 300, 1024, "tokens", "biased tokens"),
    Limit("tools", 64, 128, "tools", "tools of a request"),
    Limit("schema", 65536, 65536, "characters", "one JSON schema"),
    Limit("queue", 256, 8192, "requests", "requests under way"),
    Limit("tokens", 1 << 20, 1 << 27, "tokens", "prompts and answers of all requests under way"),
    Limit("share", 75, 100, "percent", "part of the queue that one key may hold where there are several"),
    Limit("connections", 1024, 65536, "connections", "open connections"),
    Limit("header", 32 << 10, 64 << 10, "bytes", "request line and headers"),
    Limit("header_seconds", 10, 600, "seconds", "time to send the headers, and to begin the next request"),
    Limit("body_seconds", 30, 3600, "seconds", "time to send the body"),
    Limit("send_seconds", 30, 3600, "seconds", "time that a reader may make the server wait"),
    Limit("request_seconds", 600, 86400, "seconds", "time that one request may take"),
    Limit("drain_seconds", 30, 3600, "seconds", "time that running requests get when the server is told to stop"),
)
CEILING = {limit.name: limit.ceiling for limit in TABLE}
_BY_NAME = {limit.name: limit for limit in TABLE}


class Limits:
    """The values in force: `limits["n"]`; `changes` replace the defaults. Errors: InputError for an unknown name or too high a value."""

    def __init__(self, changes: Mapping[str, int] | None = None):
        self.values = {limit.name: limit.default for limit in TABLE}
        for name, value in (changes or {}).items():
            if name not in _BY_NAME:
                raise InputError(f"there is no limit {name!r}{nearest(name, _BY_NAME)}; the limits are {', '.join(_BY_NAME)}")
            if not 1 <= value <= CEILING[name]:
                raise InputError(f"the limit {name} should be between 1 and {CEILING[name]} {_BY_NAME[name].unit}, found {value}")
            self.values[name] = value

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    def check(self, name: str, value: int | None, param: str) -> None:
        """Refuses a value over the limit, with both numbers."""
        if value is not None and value > self.values[name]:
            limit = _BY_NAME[name]
            raise InputError(f"{param}: the {limit.what} may have at most {self.values[name]} {limit.unit}, found {value}")
