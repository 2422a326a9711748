"""Tool calls (row 120): how tools are shown to a model, the grammar that its call must follow, and the call's fragments in a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transept.core.errors import InputError, nearest
from transept.data.text.tokenizer import Tokenizer
from transept.inference.engine import Grammar, GrammarCompiler
from transept.serving.requests import ChatRequest, Function, Message, NamedTool, Part

OPEN, CLOSE = "<tool_call>\n", "\n</tool_call>"
HEAD, MIDDLE = '{"name": "', '", "arguments": '
SHOWN = """You may call a function. These are the functions, as JSON schemas:
<tools>
{tools}
</tools>
To call one, answer with nothing but
<tool_call>
{{"name": "its name", "arguments": {{its arguments as a JSON object}}}}
</tool_call>"""
COMPACT = {"whitespace_flexible": False}
Delta = dict[str, Any]


class Plain:
    """An answer that is text."""

    called = False

    def feed(self, text: str) -> list[Delta]:
        """What the stream's reader is told of new text."""
        return [{"content": text}] if text else []

    def end(self) -> list[Delta]:
        """What was held back."""
        return []


class Calling:
    """An answer that is a call, or that becomes one where it begins with `open`: header, arguments, and a tail that is not shown.

    With `name` the whole answer is the arguments of this function.
    """

    def __init__(self, name: str | None = None, open: str = "", close: str = ""):
        self.name, self.open, self.tail = name, open, "" if name else "}" + close
        self.held, self.plain, self.started, self.called = "", False, False, name is not None
        self.id = f"call_{uuid.uuid4().hex[:24]}"

    def feed(self, text: str) -> list[Delta]:
        """Plain text, or the call's fragments, whose `arguments` joined are the arguments."""
        self.held += text
        if self.plain or (not self.called and self.held and not self.open.startswith(self.held[: len(self.open)])):
            self.plain, out, self.held = True, self.held, ""
            return [{"content": out}] if out else []
        if not self.called:
            rest = self.held[len(self.open + HEAD) :]
            if MIDDLE not in rest:
                return []
            self.name, _, self.held = rest.partition(MIDDLE)
            self.called = True
        shown, self.held = self.held[: max(0, len(self.held) - len(self.tail))], self.held[max(0, len(self.held) - len(self.tail)) :]
        return self._fragments(shown)

    def end(self) -> list[Delta]:
        """What was held back, unless it is the tail."""
        out, self.held = self.held, ""
        if not self.called:
            return [{"content": out}] if out else []
        return self._fragments("" if out == self.tail else out)

    def _fragments(self, shown: str) -> list[Delta]:
        if not self.started:
            self.started = True
            function = {"name": self.name, "arguments": shown}
            return [{"tool_calls": [{"index": 0, "id": self.id, "type": "function", "function": function}]}]
        return [{"tool_calls": [{"index": 0, "function": {"arguments": shown}}]}] if shown else []


Shaper = Plain | Calling


def chosen(body: ChatRequest) -> list[Function]:
    """The functions that the answer may call. Errors: InputError where the choice does not fit the tools."""
    functions = [tool.function for tool in body.tools or []]
    names = [f.name for f in functions]
    if len(set(names)) < len(names):
        raise InputError("tools: two of them have the same name")
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return [] if choice == "none" else functions
    if not functions:
        raise InputError("tool_choice: a call is asked for, but there are no tools")
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        if wanted not in names:
            raise InputError(f"tool_choice.function.name: no tool is called {wanted[:80]!r}{nearest(wanted, names)}")
        return [f for f in functions if f.name == wanted]
    return functions


def constraint(body: ChatRequest, compiler: Callable[[], GrammarCompiler]) -> tuple[Callable[[], Grammar] | None, Callable[[], Shaper]]:
    """What an answer must look like, and how it is read; compiles, so not on the event loop. Errors: InputError."""
    functions, form = chosen(body), body.response_format
    if form is not None and form.type != "text":
        if functions and body.tool_choice != "auto" and body.tool_choice is not None:
            raise InputError("response_format: an answer cannot be a tool call and follow a format as well")
        if form.type == "json_object":
            return compiler().json(), Plain
        if form.json_schema is None:
            raise InputError("response_format.json_schema: it is missing, and the type is json_schema")
        return compiler().schema(form.json_schema.schema_ if form.json_schema.schema_ is not None else {"type": "object"}), Plain
    if not functions:
        return None, Plain
    if isinstance(body.tool_choice, NamedTool):
        return compiler().schema(arguments(functions[0])), lambda: Calling(functions[0].name)
    auto = body.tool_choice != "required"
    before, after = (OPEN, CLOSE) if auto else ("", "")
    rules = [f"call{i}: {literal(before + HEAD + f.name + MIDDLE)} args{i} {literal('}' + after)}" for i, f in enumerate(functions)]
    rules += [f"args{i}: %json {json.dumps({**arguments(f), 'x-guidance': COMPACT})}" for i, f in enumerate(functions)]
    choices = " | ".join(f"call{i}" for i in range(len(functions)))
    text = "TEXT: /([^<](.|\\n)*)?/\n" if auto else ""
    grammar = compiler().lark(f"start: {choices}{' | TEXT' if auto else ''}\n{text}" + "\n".join(rules))
    return grammar, lambda: Calling(open=before, close=after)


def schemas(body: ChatRequest) -> list[Mapping[str, Any]]:
    """Every JSON schema of a request."""
    form = body.response_format
    own = [] if form is None or form.json_schema is None else [form.json_schema.schema_ or {}]
    return [*own, *(tool.function.parameters or {} for tool in body.tools or ())]


def arguments(f: Function) -> Mapping[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    return f.parameters if f.parameters else {"type": "object", "properties": {}, "additionalProperties": False}


def literal(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text)


def shown(
    messages: Sequence[Message], functions: Sequence[Function], tokenizer: Tokenizer, model: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and options for the chat template; where it knows no tools they are told in words. Errors: InputError for other content."""
    knows = "tools" in (tokenizer.chat_template or "")
    turns = [turn(message, i, model, knows) for i, message in enumerate(messages)]
    if not functions:
        return turns, {}
    told = [{"type": "function", "function": f.model_dump(exclude_none=True, exclude={"strict"})} for f in functions]
    if knows:
        return turns, {"tools": told}
    words = SHOWN.format(tools="\n".join(json.dumps(tool) for tool in told))
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{words}"}, *turns[1:]], {}
    return [{"role": "system", "content": words}, *turns], {}


def turn(message: Message, index: int, model: str, knows: bool) -> dict[str, Any]:
    """One message as templates read it."""
    parts = message.content if isinstance(message.content, list) else [Part(type="text", text=message.content or "")]
    for k, part in enumerate(parts):
        if part.type not in ("text", "refusal"):
            raise InputError(f"messages.{index}.content.{k}: this is {part.type}, and the model {model!r} takes text only")
        if (part.text if part.type == "text" else part.refusal) is None:
            raise InputError(f"messages.{index}.content.{k}: the part has no {part.type}")
    text = "".join((part.text if part.type == "text" else part.refusal) or "" for part in parts)
    role = "system" if message.role == "developer" else message.role
    calls = [{"name": call.function.name, "arguments": parsed(call.function.arguments)} for call in message.tool_calls or []]
    if role == "tool" and not knows:
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    if calls and not knows:
        text = "\n".join([text] * bool(text) + [OPEN + json.dumps(call) + CLOSE for call in calls])
    out: dict[str, Any] = {"role": role, "content": text}
    if calls and knows:
        out["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return out | ({"name": message.name} if message.name else {}) | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})


def parsed(text: str) -> Any:
    """Arguments as templates expect them: an object where they are JSON, else as they are written."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
