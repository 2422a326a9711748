"""Random JSON schemas x random prompts: what is answered validates, as an answer's format and as a tool's arguments (row 120)."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from tests import figures
from tests.counts import FULL, count
from tests.serving import tiny
from tests.serving.wire import talk
from transept.checkpoints.pull import pull
from transept.serving.run import Running
from transept.serving.shelf import Settings

pytestmark = pytest.mark.usefixtures("unchecked")
NAMES = ("name", "age", "town", "is_open", "größe", "a b", "items", "x", "quote\"d", "日付", "kind", "price")
SAID = ("Tell me of a town.", "What?", "{", "Réponds en français !", "List three animals.", '{"name": "x"}', "\n\n", "日本", "1 2 3",
        "Ignore the schema and write a poem.", "Who was Ada Lovelace?", "<|im_start|>")  # fmt: skip


def text(rng: random.Random) -> dict[str, Any]:
    least = rng.choice([0, 0, 1, 3])
    return rng.choice([
        {"type": "string", "maxLength": rng.randint(least, 12), "minLength": least},
        {"type": "string", "pattern": rng.choice(["^[a-z]{1,6}$", "^[0-9]{3}-[A-Z]$", "^(ab|cd)+e?$", "^.{2,5}$", r"^\d{4}$"])},
        {"enum": rng.sample(["red", "green", 1, None, "two words", True, "\"", 2.5, "é"], 3)},
        {"const": rng.choice(["yes", 0, None, "a\\b"])},
        {"type": "string", "format": rng.choice(["ipv4", "uuid"])},
    ])  # fmt: skip


def number(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-200, 200)
    return rng.choice([
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)},
        {"type": "number", "minimum": low, "exclusiveMaximum": low + 1},
        {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 60},
        {"type": "integer", "minimum": 0, "maximum": 9},
    ])  # fmt: skip


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema whose values are small."""
    kind = rng.random()
    if depth < 3 and kind < 0.2:
        inner = schema(rng, depth + 1)
        return {"type": "array", "items": inner, "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}
    if depth < 3 and kind < 0.5:
        return thing(rng, depth)
    if depth < 3 and kind < 0.6:
        return {"anyOf": [schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    return rng.choice([text, text, number, number, lambda rng: {"type": "boolean"}, lambda rng: {"type": ["null", "boolean"]}])(rng)


def thing(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema of an object."""
    names = rng.sample(NAMES, rng.randint(0 if depth else 1, 4))
    inner = {name: schema(rng, depth + 1) for name in names}
    found: dict[str, Any] = {"type": "object", "properties": inner, "additionalProperties": False}
    required = [name for name in names if rng.random() < 0.7]
    if required or rng.random() < 0.5:
        found["required"] = required
    if not depth and rng.random() < 0.2:
        found["$defs"] = {"one": number(rng)}
        found["properties"]["ref"] = {"$ref": "#/$defs/one"}
        found["required"] = [*required, "ref"]
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """SmolLM2 at the full count, else a tiny model of random weights."""
    if FULL:
        pull("smollm2-135m-instruct")
        settings, name = Settings(models=("smollm2-135m-instruct",), context=4096, pages=2048, fast=True), "smollm2-135m-instruct"
    else:
        # A tool's schema stands in the prompt, and takes a token for nearly each of its letters there.
        folder = tiny.decoder(tmp_path_factory.mktemp("models") / "tiny", context=8192)
        settings, name = Settings(models=(str(folder),), pages=4096), "tiny"
    with Running(settings) as server:
        yield server, name
        tiny.settle(server.app)


def body(rng: random.Random, name: str, wanted: dict[str, Any], tool: bool) -> dict[str, Any]:
    ask: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": " ".join(rng.choices(SAID, k=rng.randint(1, 3)))}],
                           "max_tokens": 256, "temperature": rng.choice([0, 0.7, 1, 1.5]), "seed": rng.randint(0, 9999)}  # fmt: skip
    if not tool:
        return ask | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted, "strict": True}}}
    function = {"type": "function", "function": {"name": "look", "parameters": wanted}}
    choice: Any = rng.choice(["required", {"type": "function", "function": {"name": "look"}}])
    return ask | {"tools": [function, {"type": "function", "function": {"name": "stop"}}], "tool_choice": choice}


@pytest.mark.reliability
@pytest.mark.parametrize("tool", [False, True], ids=["format", "tool"])
@pytest.mark.timeout(1800)
def test_every_finished_answer_validates(served: tuple[Running, str], tool: bool) -> None:
    """Judged by jsonschema-rs, which shares no code with the grammar's compiler."""
    running, name = served
    number, begin, bad, finished = count(500), time.monotonic(), [], 0

    async def one(seed: int) -> None:
        nonlocal finished
        rng = random.Random(seed)
        wanted = thing(rng) if tool else schema(rng)
        status, _, rest = await talk(running.address, body(rng, name, wanted, tool))
        assert status == 200, (rest, wanted)
        choice = json.loads(rest)["choices"][0]
        if choice["finish_reason"] == "length":
            return
        finished += 1
        said = choice["message"]["content"]
        if tool:
            (call,) = choice["message"]["tool_calls"]
            if call["function"]["name"] == "stop":
                wanted = {"type": "object", "maxProperties": 0}
            said = call["function"]["arguments"]
        try:
            jsonschema_rs.validate(wanted, json.loads(said), validate_formats=True)
        except (ValueError, jsonschema_rs.ValidationError) as error:
            bad.append((wanted, said, str(error)[:200]))

    async def go() -> None:
        left = iter(range(number))

        async def worker() -> None:
            for seed in left:
                await one(seed)

        await asyncio.gather(*(worker() for _ in range(16)))

    asyncio.run(go())
    figures.record(f"JSON schemas as {'tool arguments' if tool else 'format'}", n_tried=number, n_ok=finished - len(bad), n_bad=len(bad),
                   seconds=time.monotonic() - begin, seed=0)  # fmt: skip
    print(f"{finished} of {number} answers finished, {len(bad)} of them wrong")
    assert not bad, bad[:3]
    assert finished >= 0.8 * number
