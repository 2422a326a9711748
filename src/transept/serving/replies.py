"""The replies, as the OpenAPI document shows them; an answer is a plain dict of this form, so a token costs no validation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from transept.serving.errors import ErrorReply


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class TopToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None
    usage: Usage


class ChatReply(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(Reply):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ListReply(BaseModel):
    object: Literal["list"]
    model: str
    usage: Usage


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingReply(ListReply):
    data: list[Embedding]


class Filled(BaseModel):
    token: str
    id: int
    score: float
    text: str


class FillReply(ListReply):
    data: list[list[Filled]]


class Classified(BaseModel):
    index: int
    label: str
    score: float
    scores: dict[str, float]


class ClassificationReply(ListReply):
    data: list[Classified]


class Span(BaseModel):
    text: str
    start: int
    end: int
    score: float


class AnswerReply(ListReply):
    data: list[Span]


class Token(BaseModel):
    id: int
    text: str


class Guess(BaseModel):
    id: int
    token: str
    p: float


class InspectionReply(BaseModel):
    object: str
    model: str
    usage: Usage


class AttentionMap(BaseModel):
    layer: int
    head: int
    name: str
    weights: list[list[float]]


class AttentionReply(InspectionReply):
    kind: str
    kinds: list[str]
    layers: int
    heads: int
    queries: list[Token]
    keys: list[Token]
    maps: list[AttentionMap]


class RolloutReply(InspectionReply):
    kind: str
    layers: int
    tokens: list[Token]
    rollout: list[list[float]]


class Depth(BaseModel):
    layer: int
    name: str
    guesses: list[list[Guess]]
    entropy: list[float]


class LensReply(InspectionReply):
    tokens: list[Token]
    at: list[int]
    layers: list[Depth]


class Side(BaseModel):
    guesses: list[Guess]
    at: int | None
    probabilities: list[float | None]
    text: str | None


class AblationReply(InspectionReply):
    tokens: list[Token]
    before: Side
    after: Side
    divergence: float
    similarity: float


class PositionsReply(InspectionReply):
    kind: str
    told: str
    count: int
    similarity: list[list[float]]


class Share(BaseModel):
    part: str
    seconds: float
    share: float


class LatencyReply(InspectionReply):
    runs: int
    seconds: float
    apart: float
    parts: list[Share]


class CardReply(InspectionReply):
    family: str
    parameters: int
    active: int
    groups: dict[str, int]
    context: int | None
    length: int
    flops: int
    attention_flops: int
    cache_bytes: int
    cache_bytes_per_token: int
    kinds: list[str]
    layers: dict[str, int]
    heads: dict[str, int]
    names: list[str]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    tasks: list[str]
    context: int | None
    parameters: int
    bytes: int
    loaded: bool


class ModelsReply(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


def documented(ok: type[BaseModel], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The statuses that an address answers with."""
    data = {"type": "string", "description": "a chunk as JSON; [DONE] at the end"}
    event = {"type": "object", "description": "one event of the stream", "required": ["data"], "properties": {"data": data}}
    content = {"text/event-stream": {"schema": event}} if stream else {}
    codes = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)
    errors: dict[int | str, dict[str, Any]] = {code: {"model": ErrorReply} for code in codes}
    return {200: {"model": ok, "content": content}} | errors
