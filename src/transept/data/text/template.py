"""Chat templates: a conversation becomes the exact text that a model was trained on. Lecture row 119 (the system prompt)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from threading import local
from types import CodeType
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.exceptions import TemplateSyntaxError

from transept.core.errors import InputError, TemplateError, TranseptError, nearest
from transept.data.text.meter import DEPTH, Budget, Meter
from transept.data.text.sandbox import Sandbox

SOURCE = 1 << 17
_OWN = local()
EXTRAS = frozenset(
    """bos_token eos_token unk_token pad_token sep_token cls_token mask_token documents date_string today_date enable_thinking
    thinking reasoning_effort builtin_tools custom_tools tools_in_user_message model_identity keep_reasoning xml_tools
    python_tools tool_choice preserve_thinking thinking_budget guideline controls citations""".split()
)

Message = dict[str, Any]


def messages(prompt: str, system: str | None = None, history: Iterable[tuple[str, str]] = ()) -> list[Message]:
    """A conversation from its parts: the system prompt (the lectures: "we call that the system prompt"), earlier turns, the question.

    `history` holds (question, answer) pairs. Example: `messages("Hi", system="Answer in rhyme.")` gives
    `[{"role": "system", "content": "Answer in rhyme."}, {"role": "user", "content": "Hi"}]`.
    """
    told = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in history:
        told += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*told, {"role": "user", "content": prompt}]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    budget: Budget | None = None,
    **extras: Any,
) -> str:
    """The text of a conversation under a checkpoint's chat template.

    `extras` is a closed set: the tokens' texts (`bos_token="<s>"` ...) and the switches that published templates read
    (`EXTRAS`). Templates are code from strangers: they run in jinja2's immutable sandbox, may read only plain data, and are
    stopped by `budget`. Errors: TemplateError (damaged, forbidden, refused or over its budget), InputError (a message that is
    no mapping, an unknown extra).
    """
    unknown = sorted(set(extras) - EXTRAS)
    if unknown:
        raise InputError(f"chat template: unknown argument {unknown[0]!r}{nearest(unknown[0], EXTRAS)}")
    values: dict[str, Any] = {"tools": None, "documents": None, **{k: v for k, v in extras.items() if v is not None}}
    values |= {"messages": list(messages), "add_generation_prompt": bool(add_generation_prompt)}
    if tools is not None:
        values["tools"] = list(tools)
    values = {name: plain(value) for name, value in values.items()}
    for n, message in enumerate(values["messages"]):
        if not isinstance(message, dict):
            raise InputError(f"messages[{n}] is a {type(message).__name__}; a mapping with role and content was expected")
    code = compiled(template)
    meter = Meter(budget or Budget())
    meter.allow(values)
    return run(code, _sandbox().under(meter), values)


def _sandbox() -> Sandbox:
    """This thread's: it takes longer to make than a short conversation to render."""
    found: Sandbox | None = getattr(_OWN, "sandbox", None)
    if found is None:
        found = _OWN.sandbox = Sandbox()
    return found


def run(code: CodeType, sandbox: Sandbox, values: dict[str, Any]) -> str:
    """Execute a compiled template; whatever it raises becomes a TemplateError."""
    try:
        names: dict[str, Any] = {**sandbox.globals}
        made = Template.from_code(sandbox, code, names)
        return "".join(made.root_render_func(made.new_context(values)))
    except TranseptError:
        raise
    except RecursionError:
        raise TemplateError("chat template: calls itself without end") from None
    except JinjaError as error:
        raise TemplateError(f"chat template: {str(error)[:300]}") from error
    except Exception as error:
        raise TemplateError(f"chat template: {type(error).__name__}: {str(error)[:300]}") from error


@lru_cache(maxsize=16)
def compiled(template: str) -> CodeType:
    """The template's code object; the source's length, tokens and nesting are bounded before anything is compiled."""
    if not isinstance(template, str):
        raise TemplateError(f"chat template: a {type(template).__name__} was found where a text was expected")
    if len(template) > SOURCE:
        raise TemplateError(f"chat template: {len(template)} characters of source; at most {SOURCE} are allowed")
    sandbox = _sandbox().under(Meter(Budget()))
    try:
        tree = sandbox.parse(template)
        sandbox.check(tree)
        return sandbox.compile(tree)
    except TranseptError:
        raise
    except TemplateSyntaxError as error:
        raise TemplateError(f"chat template, line {error.lineno}: {str(error.message)[:300]}") from None
    except (RecursionError, MemoryError):
        raise TemplateError("chat template: nested too deeply to be read") from None
    except Exception as error:
        raise TemplateError(f"chat template: {type(error).__name__}: {str(error)[:300]}") from None


def plain(value: Any, depth: int = 0) -> Any:
    """A copy made of plain data only, so that a template never meets an object with methods of its own."""
    if depth > DEPTH - 4:
        raise InputError(f"messages nest more than {DEPTH - 4} levels deep")
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, str):
        return value if type(value) is str else str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(k, depth + 1): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    raise InputError(f"messages hold a {type(value).__name__}; only text, numbers, lists and mappings can be rendered")
