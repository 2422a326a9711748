"""The openai client's own calls."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import openai
import pytest
import torch

import transept
from tests.counts import count
from tests.serving import tiny
from tests.serving.tiny import ASK
from transept.checkpoints.pull import pull
from transept.core.errors import InputError
from transept.serving.run import Running
from transept.serving.shelf import Settings

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2, 3]}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
OTHER: Any = {"type": "function", "function": {"name": "stop"}}


def client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture
def ai(address: str) -> openai.OpenAI:
    return client(address)


def test_an_answer_is_what_the_model_says(running: Running, ai: openai.OpenAI) -> None:
    """The text of a chat and of a completion is that of the plain loop over the same tokens."""
    m = transept.load(running.app.state.desk.settings.models[0])
    reply = ai.chat.completions.create(**ASK)
    expected = m.generate(m.chat_ids(ASK["messages"]), max_tokens=8)
    assert reply.choices[0].message.content == expected.text and reply.choices[0].finish_reason == expected.finish_reason
    assert reply.usage is not None and reply.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens == len(m.chat_ids(ASK["messages"])) and reply.system_fingerprint
    text = ai.completions.create(model="tiny", prompt="The quick", max_tokens=8, temperature=0)
    assert text.choices[0].text == m.generate("The quick", max_tokens=8).text
    ids = ai.completions.create(model="tiny", prompt=m.encode("The quick"), max_tokens=8, temperature=0, echo=True)
    assert ids.choices[0].text == "The quick" + text.choices[0].text


def test_a_stream_joins_to_the_answer(ai: openai.OpenAI) -> None:
    for extra in ({}, {"stop": ["a", "e o"]}, {"n": 3, "temperature": 1.0, "seed": 5}):
        ask = {**ASK, "max_tokens": 30, **extra}
        whole = ai.chat.completions.create(**ask)
        parts: dict[int, str] = {}
        ends: dict[int, str] = {}
        usage = None
        for chunk in ai.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
                ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
        assert [parts[c.index] for c in whole.choices] == [c.message.content for c in whole.choices]
        assert [ends[c.index] for c in whole.choices] == [c.finish_reason for c in whole.choices]
        assert usage == whole.usage


def test_a_seed_repeats_and_another_does_not(ai: openai.OpenAI) -> None:
    def said(seed: int) -> list[Any]:
        reply = ai.chat.completions.create(**{**ASK, "temperature": 1.5, "n": 2, "max_tokens": 16}, seed=seed)
        return [choice.message.content for choice in reply.choices]

    assert said(1) == said(1) != said(2) and len(set(said(1))) == 2


def test_logprobs_are_the_models(running: Running, ai: openai.OpenAI) -> None:
    m = transept.load(running.app.state.desk.settings.models[0])
    reply = ai.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    told = reply.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 8
    ids = m.chat_ids(ASK["messages"])
    for entry, id in zip(told.content, m.generate(ids, max_tokens=8).ids, strict=True):
        with torch.no_grad():
            expected = m.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert abs(entry.logprob - expected[id].item()) < 1e-4
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        ids = [*ids, id]
    assert b"".join(bytes(entry.bytes or ()) for entry in told.content).decode("utf-8", "replace") == reply.choices[0].message.content
    old = ai.completions.create(model="tiny", prompt="The", max_tokens=5, temperature=0, logprobs=2).choices[0].logprobs
    assert old is not None and len(old.tokens or ()) == len(old.token_logprobs or ()) == len(old.top_logprobs or ()) == 5


def test_many_prompts_and_many_answers(ai: openai.OpenAI) -> None:
    reply = ai.completions.create(model="tiny", prompt=["The", "A man"], n=2, max_tokens=6, temperature=1, seed=3)
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    alone = ai.completions.create(model="tiny", prompt="A man", n=2, max_tokens=6, temperature=1, seed=3)
    assert [c.text for c in reply.choices[2:]] == [c.text for c in alone.choices]


def test_biases_and_penalties(running: Running, ai: openai.OpenAI) -> None:
    m = transept.load(running.app.state.desk.settings.models[0])
    id = m.encode("fox")[-1]
    forced = ai.completions.create(model="tiny", prompt="The", max_tokens=4, temperature=0, logit_bias={str(id): 100})
    assert forced.choices[0].text == m.tokenizer.decode([id] * 4)  # type: ignore[union-attr]
    varied = ai.completions.create(model="tiny", prompt="The", max_tokens=4, temperature=0, logit_bias={str(id): 100}, presence_penalty=2)
    assert varied.choices[0].text == forced.choices[0].text
    ask: dict[str, Any] = {"model": "tiny", "prompt": "The", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    plain = ai.completions.create(**ask).choices[0].logprobs
    fresh = ai.completions.create(**ask, frequency_penalty=2).choices[0].logprobs
    assert plain is not None and fresh is not None and len(set(fresh.tokens or ())) > len(set(plain.tokens or ()))


@pytest.mark.parametrize("choice", ["required", "named", "auto"])
def test_tool_arguments_follow_their_schema(ai: openai.OpenAI, choice: str) -> None:
    """A model of random weights, drawn at random: every finished call is JSON of its schema, and a stream's fragments join to it."""
    wanted: Any = {"type": "function", "function": {"name": "weather"}} if choice == "named" else choice
    more: dict[str, Any] = {"tools": [TOOL, OTHER], "tool_choice": wanted}
    finished = 0
    for seed in range(count(30)):
        ask = {**ASK, "max_tokens": 64, "temperature": 1.0, "seed": seed, **more}
        reply = ai.chat.completions.create(**ask).choices[0]
        if choice == "auto":
            # A random model calls by chance only; its text must come through whole.
            assert reply.message.content is not None or reply.message.tool_calls
            continue
        assert reply.message.content is None and reply.message.tool_calls
        call: Any = reply.message.tool_calls[0]
        deltas = [chunk.choices[0].delta for chunk in ai.chat.completions.create(**ask, stream=True)]
        parts = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
        assert parts[0].id and parts[0].function and parts[0].function.name == call.function.name
        assert "".join((part.function.arguments or "") if part.function else "" for part in parts) == call.function.arguments
        if reply.finish_reason == "tool_calls":
            finished += 1
            schema = TOOL["function"]["parameters"] if call.function.name == "weather" else {"type": "object", "maxProperties": 0}
            jsonschema_rs.validate(schema, json.loads(call.function.arguments))
    assert finished or choice == "auto"


def test_json_follows_its_schema(ai: openai.OpenAI) -> None:
    schema = TOOL["function"]["parameters"]
    for seed in range(count(30)):
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        ask = {**ASK, "max_tokens": 64, "temperature": 1.0, "seed": seed, "response_format": form}
        reply = ai.chat.completions.create(**ask).choices[0]
        assert reply.finish_reason == "stop"
        jsonschema_rs.validate(schema, json.loads(reply.message.content or ""))
    free = ai.chat.completions.create(**{**ASK, "max_tokens": 64}, response_format={"type": "json_object"}).choices[0]
    assert (free.message.content or "").startswith("{")


def test_the_encoders_tasks(running: Running, address: str, ai: openai.OpenAI) -> None:
    folders = {name: transept.load(path) for name, path in zip(tiny.HEADS, running.app.state.desk.settings.models[1:], strict=True)}
    vectors = ai.embeddings.create(model="fill", input=["a fox", "the dog"])
    assert torch.allclose(torch.tensor([row.embedding for row in vectors.data]), folders["fill"].embed(["a fox", "the dog"]), atol=1e-6)
    as_floats = ai.embeddings.create(model="fill", input="a fox", encoding_format="float").data[0].embedding
    assert as_floats == pytest.approx(vectors.data[0].embedding, abs=1e-6)
    filled = tiny.post(address, "/v1/fill", {"model": "fill", "input": "a [MASK] fox", "top": 3}).json()["data"]
    assert [one["id"] for one in filled[0]] == [one.id for one in folders["fill"].fill_mask("a [MASK] fox", top=3)[0]]
    classes = tiny.post(address, "/v1/classifications", {"model": "classify", "input": ["a", ["b", "c"]]}).json()["data"]
    assert [row["label"] for row in classes] == [label.label for label in folders["classify"].classify(["a", ("b", "c")])]
    found = tiny.post(address, "/v1/answers", {"model": "answer", "question": "who", "context": "the fox jumps"}).json()["data"][0]
    assert found["text"] == "the fox jumps"[found["start"] : found["end"]] == folders["answer"].answer("who", "the fox jumps").text


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "tinny"}, 404, ("'tinny'", "nearest: 'tiny'")),
        ({"model": "fill"}, 400, ("'fill'", "chat", "embeddings")),
        ({"messages": []}, 400, ("messages", "at least 1")),
        ({"extra_body": {"temprature": 1}}, 400, ("temprature", "'temperature'")),
        ({"n": 9}, 400, ("n: ", "8", "9")),
        ({"extra_body": {"n": True}}, 400, ("n: ", "integer", "true")),
        ({"top_logprobs": 2}, 400, ("top_logprobs", "logprobs")),
        ({"messages": [{"role": "user", "content": "x" * 1200}]}, 400, ("tokens", "1024")),
        ({"messages": [{"role": "user", "content": "x" * 20000}]}, 400, ("20000 characters", "1024")),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, ("image_url", "'tiny'")),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, 400, ("input_audio", "text only")),
        ({"tool_choice": "required"}, 400, ("tool_choice", "no tools")),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "wether"}}}, 400, ("'wether'", "'weather'")),
        ({"stop": ["a"] * 5}, 400, ("stop", "4", "5")),
        ({"logit_bias": {"9999": 1}}, 400, ("logit_bias", "9999", "320")),
        ({"stream_options": {"include_usage": True}}, 400, ("stream_options", "stream")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objet"}}}}, 400, ("grammar",)),
        ({"response_format": {"type": "json_schema"}}, 400, ("json_schema", "missing")),
    ],
)
def test_errors_say_what_to_do(ai: openai.OpenAI, change: dict[str, Any], status: int, words: tuple[str, ...]) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ai.chat.completions.create(**{**ASK, **change})
    body: Any = caught.value.body
    assert caught.value.status_code == status and set(body) == {"message", "type", "param", "code"}
    assert all(word in body["message"] for word in words), body["message"]


def test_models_are_listed(ai: openai.OpenAI) -> None:
    assert [m.id for m in ai.models.list()] == ["tiny", *tiny.HEADS]
    assert ai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("nobody")


def test_models_share_a_budget(tmp_path: Any) -> None:
    """Two models and memory for one: the second makes room, and one that is in use is not closed."""
    made = tiny.settings(tmp_path)
    both = (*made.models, str(tiny.decoder(tmp_path / "other", seed=1)))
    with Running(Settings(models=both, pages=64)) as probe:
        cost = max(book.cost for book in probe.app.state.desk.shelf.books.values())
    with Running(Settings(models=both, pages=64, memory=int(cost * 1.5))) as server:
        books = server.app.state.desk.shelf.books
        assert [book.served is not None for book in books.values()] == [True, False]
        first = tiny.post(server.address).json()
        assert tiny.post(server.address, body={**ASK, "model": "other"}).status_code == 200
        assert [book.served is not None for book in books.values()] == [False, True]
        assert tiny.post(server.address).json()["choices"] == first["choices"]
        books["tiny"].users += 1
        refused = tiny.post(server.address, body={**ASK, "model": "other"})
        books["tiny"].users -= 1
        assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
        tiny.settle(server.app)
    with pytest.raises(InputError, match="budget"):
        Running(Settings(models=both, memory=1000))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_published_models_answer() -> None:
    """The client's calls against SmolLM2 and MiniLM."""
    pull("smollm2-135m-instruct")
    pull("minilm")
    with Running(Settings(models=("smollm2-135m-instruct", "minilm"), context=512)) as server:
        ai = client(server.address)
        ask: dict[str, Any] = {"model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": 20,
                               "messages": [{"role": "user", "content": "What is the capital of France?"}]}
        reply = ai.chat.completions.create(**ask)
        assert "Paris" in (reply.choices[0].message.content or "")
        brief = {**ask, "max_tokens": 6}
        streamed = "".join(c.choices[0].delta.content or "" for c in ai.chat.completions.create(**brief, stream=True) if c.choices)
        assert (reply.choices[0].message.content or "").startswith(streamed) and streamed
        call: Any = ai.chat.completions.create(**ask, tools=[TOOL], tool_choice="required").choices[0]
        assert call.finish_reason == "tool_calls"
        schema = TOOL["function"]["parameters"]
        jsonschema_rs.validate(schema, json.loads(call.message.tool_calls[0].function.arguments))
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        formed = ai.chat.completions.create(**ask, response_format=form).choices[0].message.content
        jsonschema_rs.validate(schema, json.loads(formed or ""))
        rows = ai.embeddings.create(model="minilm", input=["A cat sits.", "A kitten is sitting.", "Stocks fell."]).data
        a, b, c = (torch.tensor(row.embedding) for row in rows)
        assert a @ b > a @ c and abs(a.norm().item() - 1) < 1e-5
        with pytest.raises(openai.BadRequestError, match="embeddings"):
            ai.chat.completions.create(**{**ask, "model": "minilm"})
        with pytest.raises(openai.BadRequestError, match="512"):
            ai.completions.create(model="smollm2-135m-instruct", prompt="word " * 600)
