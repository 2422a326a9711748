"""Chat templates: equal to transformers on published ones, and nothing gets out of the sandbox or runs away."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Native
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from tests.data_text.hostile import BOMBS, ESCAPES
from tests.data_text.published import TEMPLATES
from tests.figures import record
from transept.core.errors import InputError, TemplateError
from transept.data.text.template import Budget, messages, render

USER = {"role": "user", "content": "  Héllo <b> & 'you' \U0001f999 مرحبا\n"}
ANSWER = {"role": "assistant", "content": " Fine.\n\n- one\n- two "}
SYSTEM = {"role": "system", "content": "You answer in rhyme."}
TOOL = {"type": "function", "function": {"name": "sum", "description": "é <x>", "parameters": {"type": "object", "properties": {"a": {}}}}}
TALKS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "More?"}],
    "system and turns": [SYSTEM, USER, ANSWER, USER, ANSWER, {"role": "user", "content": "x"}],
    "answered": [USER, ANSWER],
}


def oracle(name: str) -> PreTrainedTokenizerFast:
    source, bos, eos = TEMPLATES[name]
    native = Native(models.WordLevel({"a": 0, bos: 1, eos: 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=native, bos_token=bos, eos_token=eos, chat_template=source)


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_render_as_transformers_renders_them(name: str) -> None:
    source, bos, eos = TEMPLATES[name]
    theirs = oracle(name)
    equal = 0
    for talk in TALKS.values():
        for start in (True, False):
            for tools in (None, [TOOL]) if name in ("mistral", "qwen2.5") else (None,):
                options = {"add_generation_prompt": start, "tools": tools}
                try:
                    expected = theirs.apply_chat_template(talk, tokenize=False, **options)
                except Exception as error:
                    with pytest.raises(TemplateError, match=str(error)[:20]):
                        render(source, talk, bos_token=bos, eos_token=eos, **options)
                    continue
                assert render(source, talk, bos_token=bos, eos_token=eos, **options) == expected
                equal += 1
    assert equal >= 4


def test_tool_calls_and_lists_of_parts_render_as_in_transformers() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": [1, "é"]}}}]}
    talk = [USER, call, {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}]
    expected = oracle("qwen2.5").apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert render(TEMPLATES["qwen2.5"][0], talk) == expected
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what? "}]}]
    expected = oracle("gemma-3").apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert render(TEMPLATES["gemma-3"][0], parts, bos_token="<bos>") == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages|tojson(indent=2) }}|{{ messages[0]|tojson }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content|trim|upper }}{% endfor %}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% macro t(x, n=2) %}{{ x * n }}{% endmacro %}{{ t('ab') }}{{ t(x='c', n=3) }}",
        "{% set ns = namespace(a=[], b=0) %}{% for i in range(5) %}{% set ns.a = ns.a + [i] %}{% endfor %}{{ ns.a, ns.b }}",
        "{{ 'a,b,c'.split(',')[1] }}{{ 'abc'[::-1] }}{{ 'x'.replace('x', 'yy') }}{{ '-'.join(['a', 'b']) }}{{ 'A b'.title() }}",
        "{{ {'b': 1, 'a': 2}|dictsort }}{{ {'b': 1}.items()|list }}{{ [3, 1]|sort }}{{ [1, 2]|sum }}{{ 2.567|round(1) }}",
        "{{ 'x' if missing is not defined else missing }}{{ none }}{{ true }}{{ missing }}{{ missing|default('d') }}",
        "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'in', ['user'])|list|length }}",
        "{% for k, v in messages[0].items() if k != 'content' %}{{ k ~ '=' ~ v }}{{ loop.length }}{% else %}none{% endfor %}",
        "{{ '%s is %d' % ('a', 3) }}{{ '{} {b:>4}'.format(1, b=2) }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 1 / 4 }}{{ -3 }}",
        "{% call(x) outer() %}[{{ x }}]{% endcall %}",
        "{% macro outer() %}{{ caller('y') }}{% endmacro %}{% call(x) outer() %}[{{ x }}]{% endcall %}",
        "{% filter upper %}abc{{ 1 }}{% endfilter %}{% set z %}q{{ 2 }}{% endset %}{{ z|length }}{{ 1 < 2 <= 2 and 'a' in 'ab' }}",
        "{% for t in [[1, [2]], [3, []]] recursive %}{{ t[0] }}{{ loop([[5, []]]) if loop.depth < 3 }}{% endfor %}",
        "{{ messages[0].content|string|length }}{{ ''|first }}{{ [1,2,3]|batch(2)|list }}",
        "{{ '<a>'|escape }}{{ '<a>'|safe }}{{ 'a\nb'|indent(2) }}",
        "{%- set s = joiner(', ') -%}{%- for i in [1, 2] %}{{ s() }}{{ i }}{% endfor %}",
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}",
        "{{ dict(a=1, b='x') }}{{ (1, 2) }}{{ 'a' ~ 1 ~ none }}{{ [1, 'é'] | string }}",
        "{{ 3 is divisibleby 3 }}{{ 'é'|tojson(ensure_ascii=true) }}",
    ],
)
def test_the_template_language_is_transformers(source: str) -> None:
    native = Native(models.WordLevel({"a": 0}, unk_token="a"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=native, chat_template=source)
    talk = TALKS["system and turns"]
    try:
        expected = theirs.apply_chat_template(talk, tokenize=False)
    except Exception:
        with pytest.raises(TemplateError):
            render(source, talk, add_generation_prompt=False)
        return
    assert render(source, talk, add_generation_prompt=False) == expected


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y-%m-%d') }}", [USER]) == datetime.now().strftime("%Y-%m-%d")


def test_system_prompt_helper() -> None:
    talk = messages("c", system="s", history=[("a", "b")])
    assert [(m["role"], m["content"]) for m in talk] == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert render(TEMPLATES["phi-3"][0], talk, eos_token="</s>").startswith("<|system|>\ns<|end|>\n<|user|>\na<|end|>\n")
    assert messages("c") == [{"role": "user", "content": "c"}]


@pytest.fixture(scope="module")
def fates() -> dict[str, dict]:
    """What became of each hostile template, rendered in a child process without the suite's own checks."""
    child = Path(__file__).with_name("render_child.py")
    done = subprocess.run([sys.executable, child], capture_output=True, text=True, timeout=240, check=True)
    found = json.loads(done.stdout)
    ok = sum(fate["error"] == "TemplateError" for fate in found.values())
    worst = 1000 * max(fate["seconds"] for fate in found.values())
    record("X-4 chat templates", n_tried=len(found), n_ok=ok, n_bad=len(found) - ok, worst_ms=worst)
    return found


@pytest.mark.parametrize("source", ESCAPES + BOMBS, ids=range(len(ESCAPES) + len(BOMBS)))
def test_hostile_templates_end_in_a_typed_error(fates: dict[str, dict], source: str) -> None:
    fate = fates[source]
    assert fate["error"] == "TemplateError", fate
    assert len(fate["text"]) < 700
    assert fate["peak"] < 16 << 20, fate


def test_the_corpora_are_as_large_as_promised() -> None:
    assert len(set(ESCAPES)) >= 80 and len(set(BOMBS)) >= 30


def test_a_long_conversation_is_no_bomb() -> None:
    talk = messages("x " * 200_000, history=[("question " * 50, "answer " * 50)] * 100)
    patient = Budget(seconds=60.0)  # the suite's checks of every argument make a step many times dearer
    for source, bos, eos in TEMPLATES.values():
        assert len(render(source, talk, bos_token=bos, eos_token=eos, budget=patient)) > 400_000


def test_budget_is_the_callers_choice() -> None:
    source = "{% for i in range(500) %}x{% endfor %}"
    assert render(source, [USER]) == "x" * 500
    with pytest.raises(TemplateError, match="steps"):
        render(source, [], budget=Budget(steps=10))


def test_unknown_arguments_and_objects_are_refused() -> None:
    with pytest.raises(InputError, match="enable_thinking"):
        render("x", [USER], enable_thinkin=True)
    with pytest.raises(InputError, match="object"):
        render("x", [{"role": "user", "content": object()}])


def test_an_interrupt_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transept.data.text.meter.Meter.text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render("x", [])
