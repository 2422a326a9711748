"""The requests: closed, strictly typed records; a field that is not here is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from transept.serving.limits import CEILING

Name = Annotated[str, Field(min_length=1, max_length=512)]
Text = Annotated[str, Field(max_length=CEILING["body"])]
Schema = dict[str, Any]
SEED = 2**63 - 1


class Closed(BaseModel):
    """Takes only the fields it declares, of exactly their types: no number is a string, no boolean a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Asked(Closed):
    """What every request has; the last few fields are taken for the sake of clients that send them, and change nothing."""

    model: Name
    user: Annotated[str, Field(max_length=512)] | None = None


class StreamOptions(Closed):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Asked):
    """How an answer is drawn; top_k, min_p and repetition_penalty are beyond the OpenAI API."""

    max_tokens: int | None = Field(None, ge=1, le=CEILING["max_tokens"])
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=CEILING["logit_bias"])
    seed: int | None = Field(None, ge=-SEED - 1, le=SEED)
    n: int | None = Field(None, ge=1, le=CEILING["n"])
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None


class Part(Closed):
    """A part of a message's content; kinds that the model does not take are refused by name."""

    type: Literal["text", "refusal", "image_url", "input_audio", "file"]
    text: Text | None = None
    refusal: Text | None = None
    image_url: dict[str, Any] | None = None
    input_audio: dict[str, Any] | None = None
    file: dict[str, Any] | None = None


class CalledFunction(Closed):
    name: Name
    arguments: Text


class Called(Closed):
    """A tool call of an earlier answer."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Closed):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=CEILING["parts"])] | None = None
    name: Name | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = Field(None, max_length=64)
    tool_calls: list[Called] | None = Field(None, max_length=CEILING["tools"])
    tool_call_id: Name | None = None


class Function(Closed):
    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Closed):
    type: Literal["function"]
    function: Function


class NamedFunction(Closed):
    name: Name


class NamedTool(Closed):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Closed):
    name: Name
    schema_: Schema | None = Field(None, alias="schema")
    description: Text | None = None
    strict: bool | None = None


class Format(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampled):
    """A conversation; with continue_final_message, beyond the OpenAI API, the answer goes on from the assistant's last message."""

    messages: list[Message] = Field(min_length=1, max_length=CEILING["messages"])
    continue_final_message: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=CEILING["max_tokens"])
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=CEILING["top_logprobs"])
    response_format: Format | None = None
    tools: list[Tool] | None = Field(None, min_length=1, max_length=CEILING["tools"])
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=1 << 20)]


class CompletionRequest(Sampled):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=CEILING["prompts"])] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=CEILING["prompts"])
    ]
    logprobs: int | None = Field(None, ge=0, le=CEILING["top_logprobs"])
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=CEILING["n"])
    suffix: Text | None = None


Inputs = Annotated[list[Text], Field(min_length=1, max_length=CEILING["inputs"])]
Pair = Annotated[list[Text], Field(min_length=2, max_length=2)]


class EmbeddingRequest(Asked):
    input: Text | Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=65536)


class FillRequest(Asked):
    """A text with the model's mask where words are wanted."""

    input: Text
    top: int = Field(5, ge=1, le=100)


class ClassificationRequest(Asked):
    """Texts, or pairs of texts, to be put into the model's classes."""

    input: Text | Annotated[list[Text | Pair], Field(min_length=1, max_length=CEILING["inputs"])]


class AnswerRequest(Asked):
    """A question and the text that holds its answer."""

    question: Text
    context: Text


Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Kind = Literal["self", "encoder", "cross"]


class Inspected(Asked):
    """What is looked into: a text, or a conversation in its template; an encoder-decoder reads it and writes `target`, or its answer."""

    input: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=CEILING["messages"])
    target: Text | None = None


class AttentionRequest(Inspected):
    """Which maps; all layers, or all heads, where none is named."""

    kind: Kind | None = None
    layer: Index | None = None
    head: Index | None = None


class RolloutRequest(Inspected):
    """`layer` is the last that is counted in."""

    kind: Literal["self", "encoder"] | None = None
    layer: Index | None = None


class LensRequest(Inspected):
    """The `top` guesses after each layer, at the `last` positions."""

    top: int = Field(5, ge=1, le=20)
    last: int = Field(16, ge=1, le=64)


class HeadOff(Closed):
    """One head."""

    layer: Index
    head: Index
    kind: Kind | None = None


class AblationRequest(Inspected):
    """Heads to take out, and how much of the answer to show with and without them."""

    heads: list[HeadOff] = Field([], max_length=1024)
    top: int = Field(5, ge=1, le=20)
    max_tokens: int = Field(16, ge=0, le=64)


class PositionsRequest(Asked):
    count: int = Field(64, ge=2, le=256)


class LatencyRequest(Inspected):
    runs: int = Field(3, ge=1, le=20)


class CardRequest(Asked):
    """The costs of `length` tokens."""

    length: int | None = Field(None, ge=1, le=1 << 20)


INSPECTIONS = (AttentionRequest, RolloutRequest, LensRequest, AblationRequest, PositionsRequest, LatencyRequest, CardRequest)
BODIES = (ChatRequest, CompletionRequest, EmbeddingRequest, FillRequest, ClassificationRequest, AnswerRequest, *INSPECTIONS)
NAMES = frozenset(
    name for kind in (*BODIES, Message, Part, Tool, Function, Format, StreamOptions, HeadOff) for name in kind.model_fields
) | {"schema"}
