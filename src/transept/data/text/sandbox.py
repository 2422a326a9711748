"""jinja2's immutable sandbox with an allow-list in place of its deny-list, and a meter on everything that grows or repeats."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.lexer import TokenStream
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace, _PassArg, pass_context

from transept.core.errors import TemplateError
from transept.data.text.meter import Budget, Meter

TOKENS = 8_000
NESTING = 120
WIDEST = 4096
TEXT_FILTERS = frozenset("trim upper lower title capitalize replace indent center format string escape e safe truncate tojson".split())
LIST_FILTERS = frozenset(
    """abs batch count d default dictsort first float int items join last length list map max min reject rejectattr reverse round
    select selectattr slice sort sum unique""".split()
)
STR = frozenset(
    """strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith replace upper lower title capitalize
    swapcase find rfind index rindex count join isdigit isalpha isalnum isnumeric isdecimal isspace isupper islower istitle
    removeprefix removesuffix center ljust rjust zfill""".split()
)
ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (str, STR),
    (dict, frozenset(("get", "items", "keys", "values", "copy"))),
    (list, frozenset(("index", "count", "copy"))),
    (tuple, frozenset(("index", "count"))),
    (
        LoopContext,
        frozenset("index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle changed".split()),
    ),
    (Cycler, frozenset(("next", "reset", "current"))),
    (Macro, frozenset(("name", "arguments", "catch_kwargs", "catch_varargs", "caller"))),
)
FORBIDDEN = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block, nodes.EvalContextModifier)


class Generator(CodeGenerator):
    """Writes the meter's calls into the compiled template: every loop round, literal, comparison, `~`, slice and output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bodies: set[int] = set()

    def wrapped(self, name: str, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
        self.write(f"environment.meter.{name}(")
        visit(node, frame)
        self.write(")")

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        self.bodies.add(id(node.body))
        if node.test is not None:
            beat = nodes.Call(nodes.EnvironmentAttribute("beat"), [], [], None, None)
            node.test = nodes.And(beat, node.test)
        super().visit_For(node, frame)

    def blockvisit(self, nodes: Iterable[Any], frame: Any) -> None:
        if id(nodes) in self.bodies:
            self.writeline("environment.meter.tick()")
        super().blockvisit(nodes, frame)

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self.wrapped("made", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.wrapped("made", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self.wrapped("made", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self.wrapped("made", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.glue((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(")
        self.wrapped("operand", self.visit, node.expr, frame)
        for op in node.ops:
            self.visit(op, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        words = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
        self.write(f" {words[node.op]} ")
        self.wrapped("operand", self.visit, node.expr, frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible()
        return super()._output_child_to_const(node, frame, finalize)

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.emit({super()._output_const_repr(group)})"

    def _output_child_pre(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write("environment.emit(")

    def _output_child_post(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write(")")


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; rendering passes it through."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Store(Namespace):
    """`namespace()` without private names and without writing itself out."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            Store.check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        Store.check(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"

    @staticmethod
    def check(name: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"namespace field {name!r} begins with an underscore")


class Format:
    """`"...".format(...)` with the sandbox's attribute rules and without widths that fill memory."""

    def __init__(self, environment: Sandbox, pattern: str) -> None:
        self.environment = environment
        self.pattern = pattern

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        plain = self.pattern.replace("{{", "").replace("}}", "")
        if re.search(r"\{[^{}]*\{", plain) or re.search(r"\d{4}", plain):
            raise SecurityError("a format width that is computed or above 999")
        meter = self.environment.meter
        weight = meter.weigh(args).characters + meter.weigh(kwargs).characters
        meter.fits(len(plain) + plain.count("{") * (weight + 999))
        return SandboxedFormatter(self.environment).vformat(self.pattern, args, kwargs)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one render after another in one thread: its whole state is the meter, and each render brings its own."""

    code_generator_class = Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, LoopControlExtension])
        self.under(Meter(Budget()))
        self.filters = {name: self.metered(name, FILTERS[name]) for name in LIST_FILTERS | TEXT_FILTERS - {"tojson"}}
        self.filters["tojson"] = self.metered("tojson", tojson)
        self.tests = {name: self.metered("test", test) for name, test in TESTS.items() if name != "callable"}
        functions = (bounded_range, dict, Store, Cycler, Joiner, raise_exception, strftime_now)
        names = ("range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now")
        self.globals: dict[str, Any] = dict(zip(names, functions, strict=True))
        self.functions = frozenset(map(id, functions))

    def under(self, meter: Meter) -> Sandbox:
        """Itself, with this meter for what it runs next."""
        self.meter, self.beat = meter, meter.tick
        return self

    def _tokenize(self, *args: Any, **kwargs: Any) -> TokenStream:
        stream = super()._tokenize(*args, **kwargs)

        def counted() -> Iterable[Any]:
            for n, token in enumerate(stream):
                if n >= TOKENS:
                    raise TemplateError(f"chat template: more than {TOKENS} tokens of source")
                yield token

        return TokenStream(counted(), stream.name, stream.filename)

    def metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as a filter or test that pays before it runs and for what it returns."""
        kind = _PassArg.from_obj(function)
        check = CHECKS.get(name)

        @pass_context
        def run(context: Any, value: Any = None, *args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            if name in LIST_FILTERS:
                meter.copied(value)
            else:
                meter.operand(value)
            for extra in (*args, *kwargs.values()):
                meter.operand(extra)
            if check is not None:
                check(meter, value, *args, **kwargs)
            lead = {_PassArg.context: context, _PassArg.environment: self, _PassArg.eval_context: context.eval_ctx}
            first = () if kind is None else (lead[kind],)
            return meter.made(function(*first, value, *args, **kwargs))

        return run

    def emit(self, value: Any) -> str:
        """Charge a piece of output."""
        self.meter.operand(value)
        return self.meter.text(str(value))

    def glue(self, parts: tuple[Any, ...]) -> str:
        """The `~` operator."""
        self.meter.fits(sum(self.meter.weigh(self.meter.operand(part)).characters for part in parts))
        return self.meter.made("".join(map(str, parts)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.operand(left)
        meter.operand(right)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int) and isinstance(one, (str, list, tuple)):
                    meter.fits(max(0, other) * (meter.weigh(one).characters + 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 4096:
            raise TemplateError(f"chat template: {left} ** {right} is above the allowed 4096 bits")
        elif operator == "%" and isinstance(left, str):
            check_format(meter, left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr.startswith("_"):
            return False
        if isinstance(obj, Store):
            return True
        return any(isinstance(obj, kind) and attr in names for kind, names in ATTRIBUTES)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} may not be read")

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str) and attribute == "format":
            return Format(self, obj)
        if attribute.startswith("_") and not (isinstance(obj, dict) and attribute in obj):
            self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.meter.operand(argument)
        return self.getattr(obj, argument) if isinstance(obj, str) and isinstance(argument, str) else super().getitem(obj, argument)

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, (Macro, LoopContext, Format, Joiner, Undefined)) or id(obj) in self.functions:
            return True
        bound = isinstance(obj, (types.BuiltinMethodType, types.MethodType))
        return bound and self.is_safe_attribute(obj.__self__, obj.__name__, obj)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        self, meter = __self, __self.meter
        if __obj is self.beat:
            return meter.tick()
        if not self.is_safe_callable(__obj):
            raise SecurityError(f"a {type(__obj).__name__} may not be called")
        meter.tick(4)
        owner = getattr(__obj, "__self__", None)
        for value in (owner, *args, *kwargs.values()):
            meter.operand(value)
        if isinstance(owner, str):
            check_method(meter, __obj.__name__, owner, args, kwargs)
        meter.depth += 1
        if meter.depth > meter.budget.calls:
            raise TemplateError(f"chat template: calls nested more than {meter.budget.calls} deep")
        try:
            return meter.made(super().call(__context, __obj, *args, **kwargs))
        finally:
            meter.depth -= 1

    def check(self, tree: nodes.Template) -> None:
        """Refuse statements that reach for other files, and nesting that the Python compiler would pay for."""
        level: list[nodes.Node] = [tree]
        for _ in range(NESTING):
            level = [child for node in level for child in node.iter_child_nodes()]
            for node in level:
                if isinstance(node, FORBIDDEN):
                    raise TemplateError(f"chat template, line {node.lineno}: {type(node).__name__} is not part of chat templates")
            if not level:
                return
        raise TemplateError(f"chat template: nested more than {NESTING} levels deep")


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as chat templates were trained on: no HTML escapes, characters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def bounded_range(*args: int) -> range:
    """`range` of at most 100,000 items."""
    found = range(*args)
    if max(map(abs, args), default=0) > 1 << 62 or len(found) > 100_000:
        raise TemplateError("chat template: range() of more than 100000 items")
    return found


def raise_exception(message: object) -> None:
    """What templates call on a conversation that they do not accept."""
    raise TemplateError(f"the chat template refuses this conversation: {str(message)[:500]}")


def strftime_now(pattern: str) -> str:
    """Today's date in the template's format."""
    if not isinstance(pattern, str) or len(pattern) > 200 or re.search(r"%[-_0^#]*\d", pattern):
        raise TemplateError("chat template: strftime_now() takes a short format without widths")
    return datetime.now().strftime(pattern)


def check_format(meter: Meter, pattern: str, values: Any) -> None:
    """The `%` operator and the `format` filter on strings: no computed and no large width."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", pattern):
        raise TemplateError("chat template: a format width that is computed or above 999")
    uses = pattern.count("%") if "%(" in pattern else 1
    meter.fits(len(pattern) * 1000 if re.search(r"%[^a-zA-Z%]*\d", pattern) else len(pattern) + uses * meter.weigh(values).characters)


def check_width(meter: Meter, value: Any, width: Any = 80, *_: Any, **__: Any) -> None:
    """center, truncate, batch, slice, round: a number that sets the size of the result."""
    if not isinstance(width, int) or abs(width) > WIDEST:
        raise TemplateError(f"chat template: a width or count of {str(width)[:40]}; at most {WIDEST} is allowed")


def check_replace(meter: Meter, value: Any, old: Any = "", new: Any = "", count: Any = None, **_: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        text = str(value)
        meter.fits(len(text) + text.count(old) * len(new))


def check_indent(meter: Meter, value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    size = len(width) if isinstance(width, str) else width
    check_width(meter, value, size)
    meter.fits((str(value).count("\n") + 1) * (size + 1) + len(str(value)))


def check_join(meter: Meter, value: Any, d: Any = "", *_: Any, **__: Any) -> None:
    if isinstance(value, (list, tuple, str, dict, range)):
        meter.fits(meter.weigh(value).characters + len(value) * len(str(d)))
    elif len(str(d)) > 1000:
        raise TemplateError("chat template: a separator above 1000 characters for a list of unknown length")


def check_json(meter: Meter, value: Any, *args: Any, indent: Any = None, separators: Any = None, **_: Any) -> None:
    if args:
        raise TemplateError("chat template: tojson takes its options by name")
    step = len(indent) if isinstance(indent, str) else indent or 0
    between = sum(map(len, separators)) if separators else 4
    weight = meter.weigh(value)
    if not isinstance(step, int) or step > 64 or between > 64:
        raise TemplateError("chat template: tojson with an indent or separators above 64 characters")
    meter.fits(6 * weight.characters + weight.items * (step * weight.depth + between) if step or separators else weight.characters)


def check_default(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    """sum: numbers only, since lists or strings would be copied once per item."""
    if not isinstance(kwargs.get("start", args[1] if len(args) > 1 else 0), (int, float)):
        raise TemplateError("chat template: sum() starts from a number")


def check_percent(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    check_format(meter, str(value), kwargs or args)


CHECKS: dict[str, Callable[..., None]] = {
    "center": check_width,
    "truncate": lambda meter, value, length=255, *_, **__: check_width(meter, value, length),
    "batch": lambda meter, value, linecount=1, *_, **__: check_width(meter, value, linecount),
    "slice": lambda meter, value, slices=1, *_, **__: check_width(meter, value, slices),
    "round": lambda meter, value, precision=0, *_, **__: check_width(meter, value, precision * 40),
    "replace": check_replace,
    "indent": check_indent,
    "join": check_join,
    "tojson": check_json,
    "sum": check_default,
    "format": check_percent,
}


def check_method(meter: Meter, name: str, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """String methods whose result can be much longer than the string."""
    if name == "replace":
        check_replace(meter, owner, *args, **kwargs)
    elif name in ("center", "ljust", "rjust", "zfill"):
        check_width(meter, owner, *args)
    elif name == "join" and args:
        check_join(meter, args[0], owner)
    elif name in ("split", "rsplit", "splitlines"):
        cut = args[0] if args and isinstance(args[0], str) and args[0] else None
        meter.spend(80 * (owner.count(cut) + 1 if cut else len(owner) // 2))
