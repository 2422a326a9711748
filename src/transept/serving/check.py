"""One real request to each endpoint through the openai client: what `transept --check` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from transept.core.errors import SourceError
from transept.serving.run import Running
from transept.serving.shelf import Settings

SENTENCE = "Paris is the capital of France."
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
LOOKS: dict[str, dict[str, Any]] = {"attention": {"input": SENTENCE, "layer": 0, "head": 0}, "rollout": {"input": SENTENCE}, "card": {}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def check(settings: Settings) -> Iterator[tuple[str, str, bool, str]]:
    """(model, request, whether it went well, what came) for each endpoint that the models serve. Errors: SourceError without the client."""
    try:
        import openai
    except ImportError:
        raise SourceError("the check speaks through the openai client, which is not installed: pip install openai") from None
    with Running(settings) as running:
        client = openai.OpenAI(base_url=f"{running.address}/v1", api_key=(settings.keys or ("none",))[0], max_retries=0, timeout=300)
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            yield _tried("server", path, lambda path=path: str(client.with_options().get(f"{running.address}{path}", cast_to=str))[:40])
        for model in client.models.list().data:
            for task in getattr(model, "tasks", ()):
                for name, call in requests(client, model.id, task):
                    yield _tried(model.id, name, call)


def _tried(model: str, name: str, call: Callable[[], str]) -> tuple[str, str, bool, str]:
    begin = time.monotonic()
    try:
        found, ok = call(), True
    except Exception as error:
        found, ok = f"{type(error).__name__}: {error}", False
    return model, f"{name} ({1000 * (time.monotonic() - begin):.0f} ms)", ok, found[:100]


def requests(client: Any, model: str, task: str) -> list[tuple[str, Callable[[], str]]]:
    """The requests of one task."""
    ask = {"model": model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 16, "temperature": 0}

    def chat(**more: Any) -> Any:
        return client.chat.completions.create(**ask, **more)

    def streamed() -> str:
        return "".join(part.choices[0].delta.content or "" for part in chat(stream=True) if part.choices)

    def formed() -> str:
        form = {"type": "json_schema", "json_schema": {"name": "ok", "schema": SCHEMA}}
        return chat(response_format=form).choices[0].message.content

    def called() -> str:
        return chat(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0].function.arguments

    def other(path: str, **body: Any) -> Callable[[], str]:
        return lambda: str(client.post(path, body={"model": model, **body}, cast_to=object))

    return {
        "chat": [("chat", lambda: chat().choices[0].message.content), ("stream", streamed), ("JSON schema", formed), ("tool", called)],
        "completions": [("completion", lambda: client.completions.create(model=model, prompt=SENTENCE, max_tokens=8).choices[0].text)],
        "embeddings": [("embedding", lambda: f"{len(client.embeddings.create(model=model, input=SENTENCE).data[0].embedding)} numbers")],
        "fill": [("fill", other("/fill", input="Paris is the [MASK] of France."))],
        "classifications": [("classification", other("/classifications", input=SENTENCE))],
        "answers": [("answer", other("/answers", question="Where?", context=SENTENCE))],
        "inspect": [(name, other(f"/inspect/{name}", **body)) for name, body in LOOKS.items()],
    }[task]
