"""The playground in a real browser: every page does its work, by mouse and by keyboard, and asks nothing of another machine."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import scipy.stats
from playwright.sync_api import Page, expect

from transept.serving import pages
from transept.serving.run import Running

pytestmark = pytest.mark.xdist_group("browser")
ANSWER = "article.assistant:last-of-type"
STATIC = Path(pages.__file__).parent / "static"


def post(playground: Running, path: str, **body: Any) -> Any:
    """The API's own reply, beside which the page's is held."""
    reply = httpx.post(playground.address + path, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def setting(page: Page, **values: str) -> None:
    """Fills in fields of the settings."""
    if page.locator("#settings[open]").count() == 0:
        page.click("#settings summary")
    for name, value in values.items():
        page.fill(f"#set-{name}", value)


def ask(page: Page, text: str) -> str:
    """Sends a message and waits for the whole answer."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(f"{ANSWER} .stats")
    return page.locator(f"{ANSWER} .text").inner_text()


def go(page: Page, name: str) -> None:
    page.click(f"nav a:has-text('{name}')")


def until(page: Page, condition: str, arg: Any = None) -> None:
    """Waits for a condition; playwright's own wait_for_function needs eval, which the page's policy forbids."""
    for _ in range(1000):
        if page.evaluate(condition, arg):
            return
        page.wait_for_timeout(10)
    raise AssertionError(condition)


# --- chat ---


def test_an_answer_streams_and_is_the_apis(page: Page, playground: Running) -> None:
    setting(page, temperature="0", min_p="", max_tokens="24")
    page.evaluate("""() => {
        window.lengths = [];
        new MutationObserver(() => {
            const text = document.querySelector('article.assistant .text[aria-busy="true"]');
            if (text) window.lengths.push(text.textContent.length);
        }).observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true});
    }""")
    text = ask(page, "Tell me of the fox")
    lengths = page.evaluate("window.lengths")
    assert lengths == sorted(lengths) and len(set(lengths)) >= 5, lengths
    messages = [{"role": "user", "content": "Tell me of the fox"}]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
    told = post(playground, "/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    assert page.locator(f"{ANSWER} .text").evaluate("node => node.textContent") == told and text
    page.click("text=Regenerate")
    expect(page.locator(".versions")).to_contain_text("2 of 2")
    page.wait_for_selector(f"{ANSWER} .stats")
    assert page.locator(f"{ANSWER} .text").evaluate("node => node.textContent") == told


def test_stop_ends_the_answer(page: Page) -> None:
    setting(page, temperature="0", min_p="", max_tokens="900")
    page.fill("#prompt", "Tell me of the fox")
    page.click("button:text-is('Send')")
    until(page, "() => document.querySelector('article.assistant .text')?.textContent.length > 20")
    page.click("#stop")
    page.wait_for_selector("article.assistant[data-finish=stopped] .stats")
    length = page.locator(f"{ANSWER} .text").evaluate("node => node.textContent.length")
    page.wait_for_timeout(200)
    assert 20 < length == page.locator(f"{ANSWER} .text").evaluate("node => node.textContent.length")
    assert "stopped" in page.locator(f"{ANSWER} .stats").inner_text() and page.locator("#stop").is_disabled()


def test_json_after_a_schema(page: Page) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}}, "required": ["ok", "n"],
              "additionalProperties": False}  # fmt: skip
    setting(page, max_tokens="64", seed="3")
    page.select_option("#format", "json_schema")
    page.fill("#schema", "{not JSON")
    assert page.get_attribute("#schema", "aria-invalid") == "true"
    page.fill("#prompt", "Is it so?")
    page.press("#prompt", "Enter")
    assert page.locator("article").count() == 0 and page.evaluate("document.activeElement.id") == "schema"
    page.fill("#schema", json.dumps(schema))
    found = json.loads(ask(page, "Is it so?"))
    assert set(found) == {"ok", "n"} and isinstance(found["ok"], bool) and found["n"] in (1, 2)


def test_another_token_leads_elsewhere(page: Page, playground: Running) -> None:
    setting(page, temperature="0", min_p="", max_tokens="12")
    ask(page, "Tell me of the fox")
    page.click("button:has-text('Probabilities')")
    tokens = page.locator(".token")
    assert tokens.count() == 12
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me of the fox"}], "temperature": 0}
    told = post(playground, "/v1/chat/completions", **body, max_tokens=12, logprobs=True, top_logprobs=5)
    content = told["choices"][0]["logprobs"]["content"]
    shares = [float(tokens.nth(i).evaluate("node => node.style.getPropertyValue('--p')")) for i in range(12)]
    assert np.allclose(shares, [math.exp(one["logprob"]) for one in content], atol=1e-3)
    # The first place where another token is a whole character, and one that can be written.
    at, other = next((i, one["token"]) for i in range(3, 12) for one in content[i]["top_logprobs"][1:]
                     if "\ufffd" not in "".join(c["token"] for c in content[:i]) + one["token"])  # fmt: skip
    tokens.nth(at).click()
    rank = [one["token"] for one in content[at]["top_logprobs"]].index(other)
    page.locator(".alternative").nth(rank).click()
    expect(page.locator(".versions")).to_contain_text("2 of 2")
    page.wait_for_selector(f"{ANSWER} .stats")
    prefix = "".join(one["token"] for one in content[:at]) + other
    turns = [*body["messages"], {"role": "assistant", "content": prefix}]
    more = post(playground, "/v1/chat/completions", **{**body, "messages": turns}, max_tokens=12, continue_final_message=True)
    assert page.locator(f"{ANSWER} .text").evaluate("node => node.textContent") == prefix + more["choices"][0]["message"]["content"]


# --- tasks ---


def test_embeddings_lie_on_a_map(page: Page, playground: Running) -> None:
    texts = ["a fox", "the quick fox jumps", "a man, a plan", "liquor jugs", "zebra"]
    go(page, "Tasks")
    page.fill("#embeddings-texts", "\n".join(texts))
    page.click("#task-embeddings button[type=submit]")
    page.wait_for_selector("#map")
    model = page.input_value("#task-embeddings select")
    rows = np.array([one["embedding"] for one in post(playground, "/v1/embeddings", model=model, input=texts)["data"]])
    assert page.locator("#map circle").count() == len(texts)
    page.click("#task-embeddings details summary")
    shown = np.array(page.locator("#task-embeddings details tbody td").all_inner_texts(), float).reshape(-1, 2)
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    assert np.allclose(np.abs(shown), np.abs(expected), atol=2e-3)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    told = np.array([float(cell) for cell in page.locator("table.matrix tbody td").all_inner_texts()]).reshape(5, 5)
    assert np.allclose(told, unit @ unit.T, atol=0.0051)


def test_the_other_tasks(page: Page, playground: Running) -> None:
    go(page, "Tasks")
    page.click("#tab-fill")
    page.fill("#fill-text", "a [MASK] fox")
    page.click("#task-fill button[type=submit]")
    page.wait_for_selector("#task-fill table")
    told = post(playground, "/v1/fill", model="fill", input="a [MASK] fox", top=8)["data"][0]
    assert page.locator("#task-fill tbody th").all_inner_texts() == [one["token"] for one in told]
    page.click("#tab-answers")
    page.fill("#answers-question", "who")
    page.fill("#answers-context", "the fox 🦊 jumps over the dog")
    page.click("#task-answers button[type=submit]")
    page.wait_for_selector("#task-answers mark")
    span = post(playground, "/v1/answers", model="answer", question="who", context="the fox 🦊 jumps over the dog")["data"][0]
    assert page.locator("#task-answers mark").inner_text() == span["text"]
    page.click("#tab-classifications")
    page.click("#task-classifications button[type=submit]")
    page.wait_for_selector("#task-classifications table")
    assert set(page.locator("#task-classifications tbody th").all_inner_texts()) == {"no", "yes"}


# --- blind ---


def test_votes_are_blind_and_weighed(page: Page, tmp_path: Path) -> None:
    go(page, "Blind")
    page.fill("#blind-length", "4")
    for _ in range(3):
        page.click("text=Ask both")
        page.wait_for_selector(".verdict button")
        before = page.locator(".pair").inner_text()
        assert "tiny" not in before.split() and "other" not in before.split()
        page.click(".verdict button >> nth=0")
        page.wait_for_selector(".verdict p")
    kept = json.loads(page.evaluate("localStorage.getItem('transept.votes')"))
    assert len(kept) == 3 and all(vote["winner"] == vote["shown"][0] and {vote["a"], vote["b"]} == {"tiny", "other"} for vote in kept)
    won = sum(vote["winner"] == vote["a"] for vote in kept)
    cells = page.locator("#page-blind tbody td").all_inner_texts()
    assert cells[:3] == [str(won), str(3 - won), "0"]
    with page.expect_download() as waited:
        page.click("text=Export as JSON")
    waited.value.save_as(tmp_path / "votes.json")
    assert json.loads((tmp_path / "votes.json").read_text()) == kept
    page.reload()
    page.wait_for_selector("#page-blind table")


def test_the_statistics_are_scipys(page: Page) -> None:
    """Wilson's interval and the exact test, for every result of up to 12 votes and a large one."""
    pairs = [(k, n) for n in range(1, 13) for k in range(n + 1)] + [(530, 1000)]
    script = "async (pairs) => { const m = await import('/maths.js'); return pairs.map(([k, n]) => [...m.wilson(k, n), m.fair(k, n)]); }"
    found = page.evaluate(script, pairs)
    for (k, n), (low, high, p) in zip(pairs, found, strict=True):
        test = scipy.stats.binomtest(k, n)
        expected = test.proportion_ci(0.95, method="wilson")
        assert np.allclose([low, high, p], [expected.low, expected.high, test.pvalue], atol=1e-9), (k, n)


# --- inspector ---


def opened(page: Page, view: str) -> None:
    page.click(f"#tab-{view}")
    page.wait_for_selector(f"#inspector-out[data-view={view}][aria-busy=false]")


def look(page: Page, text: str) -> None:
    page.fill("#inspected", text)
    with page.expect_response("**/v1/inspect/**"):
        page.click("text=Look inside")
    page.wait_for_selector("#inspector-out[aria-busy=false]")


def picture(page: Page) -> str:
    return page.locator("#heat").evaluate("canvas => canvas.toDataURL()")


def test_a_map_changes_with_the_sentence(page: Page, playground: Running) -> None:
    go(page, "Inspector")
    opened(page, "attention")
    look(page, "a quick fox")
    one = picture(page)
    look(page, "a quick dog")
    two = picture(page)
    assert one != two
    maps = post(playground, "/v1/inspect/attention", model="tiny", input="a quick dog", layer=0)["maps"]
    row = maps[0]["weights"][-1]
    box = page.locator("#heat").bounding_box()
    assert box is not None
    page.locator("#heat").focus()
    for key in ["ArrowRight", *["ArrowDown"] * (len(row) - 1)]:
        page.keyboard.press(key)
    # The first key enters at the first cell; the others go down its column.
    assert page.locator(".cell").inner_text().endswith(f"{100 * row[0]:.1f} %")
    page.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] - 4)
    assert page.locator(".cell").inner_text().endswith(f"{100 * row[-1]:.1f} %")
    page.select_option("#inspector-panel select >> nth=1", "1")
    until(page, "before => document.getElementById('heat').toDataURL() !== before", two)


def test_heads_off_change_the_answer(page: Page, playground: Running) -> None:
    go(page, "Inspector")
    look(page, "a quick fox")
    opened(page, "ablation")
    same = page.locator("#before .quoted").inner_text()
    assert page.locator("#after .quoted").inner_text() == same
    for layer in range(2):
        page.click(f".head[data-at='{layer}/-1']")
    until(page, "before => document.querySelector('#after .quoted').textContent !== before", same)
    heads = int(page.locator(".head[data-key]").count()) // 2
    off = [{"layer": layer, "head": head, "kind": "self"} for layer in range(2) for head in range(heads)]
    told = post(playground, "/v1/inspect/ablation", model="tiny", input="a quick fox", heads=off)
    assert told["before"]["text"] != told["after"]["text"]
    until(page, "text => document.querySelector('#after .quoted').textContent === text", told["after"]["text"])
    page.click("text=All heads on again")
    until(page, "before => document.querySelector('#after .quoted').textContent === before", same)


def test_an_answer_looks_at_its_source(page: Page, playground: Running) -> None:
    """Cross-attention of an encoder-decoder: rows are what was written, columns are the source, and other words give another map."""
    go(page, "Inspector")
    page.select_option("#inspector select >> nth=0", "t5")
    page.wait_for_selector("#target")
    page.fill("#target", "the dog")
    look(page, "a quick fox jumps")
    one = picture(page)
    told = post(playground, "/v1/inspect/attention", model="t5", input="a quick fox jumps", target="the dog", layer=0)
    assert told["kind"] == "cross" and len(told["queries"]) != len(told["keys"])
    expect(page.locator("#heat")).to_have_attribute("aria-label", re.compile(f"{len(told['queries'])} by {len(told['keys'])} tokens"))
    shown = [float(text.removesuffix("%")) for text in page.locator("#inspector-out tbody td").all_inner_texts()]
    assert np.allclose(shown, sorted((100 * w for w in told["maps"][0]["weights"][-1]), reverse=True)[: len(shown)], atol=0.51)
    page.fill("#target", "the plan")
    look(page, "a quick fox jumps")
    assert picture(page) != one
    page.select_option("#inspector-panel select >> nth=0", "encoder")
    keys = len(told["keys"])
    expect(page.locator("#heat")).to_have_attribute("aria-label", re.compile(f"{keys} by {keys} tokens"))


def test_every_view_opens_beside_an_answer(page: Page) -> None:
    setting(page, temperature="0", min_p="", max_tokens="6")
    ask(page, "Tell me of the fox")
    page.click(f"{ANSWER} button:has-text('Inspect')")
    expect(page.locator("#inspector-title")).to_be_focused()
    for view in ("attention", "rollout", "lens", "ablation", "positions", "time", "cost"):
        opened(page, view)
        assert page.locator("#inspector-out .error").count() == 0, page.locator("#inspector-out").inner_text()
        assert page.locator("#inspector-out").inner_text()
    page.click("#inspector >> text=Close")
    assert not page.locator("#inspector").is_visible()


# --- everybody ---


def test_by_keyboard_alone(page: Page) -> None:
    """From the top of the page to an answer, another token of it, and the map of its attention, without a pointer."""

    def tab(selector: str, key: str = "Tab") -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"no way by Tab to {selector}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    tab("#settings summary")
    page.keyboard.press("Enter")
    for name, value in (("temperature", "0"), ("max_tokens", "8")):
        tab(f"#set-{name}")
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
    tab("#prompt")
    page.keyboard.type("Tell me of the fox")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{ANSWER} .stats")
    tab("article button[aria-expanded]", "Shift+Tab")
    page.keyboard.press("Enter")
    tab(".token")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    tab(".alternative:not(:disabled)")
    page.keyboard.press("Enter")
    expect(page.locator(".versions")).to_contain_text("2 of 2")
    page.wait_for_selector(f"{ANSWER} .stats")
    tab("article .actions button:nth-child(3)")
    page.keyboard.press("Enter")
    page.wait_for_selector("#heat")
    tab("#heat")
    page.keyboard.press("ArrowRight")
    assert "looks at" in page.locator(".cell").inner_text()
    page.keyboard.press("Escape")


PAGES = ("Chat", "Tasks", "Blind", "Inspector")


def test_a_narrow_window_needs_no_sideways_scrolling(page: Page) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    setting(page, temperature="0", max_tokens="40")
    ask(page, "w" * 200)
    page.click("button:has-text('Probabilities')")
    page.click(f"{ANSWER} button:has-text('Inspect')")
    page.wait_for_selector("#heat")
    for name in PAGES:
        go(page, name)
        if name == "Tasks":
            page.click("#task-embeddings button[type=submit]")
            page.wait_for_selector("#map")
        for view in ("attention", "lens", "ablation", "time", "cost") if name == "Inspector" else ():
            opened(page, view)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400, view
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, scheme: Any) -> None:
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None and spec.submodule_search_locations
    axe = next(Path(spec.submodule_search_locations[0]).rglob("axe.min.js")).read_text()
    page.emulate_media(color_scheme=scheme)
    setting(page, temperature="0", max_tokens="8")
    ask(page, "Tell me of the fox")
    page.click("button:has-text('Probabilities')")
    page.click(".token >> nth=1")
    page.click(f"{ANSWER} button:has-text('Inspect')")
    page.wait_for_selector("#heat")
    page.evaluate(axe)
    for name in PAGES:
        go(page, name)
        if name == "Tasks":
            page.click("#task-embeddings button[type=submit]")
            page.wait_for_selector("#map")
        for view in ("attention", "lens", "ablation", "positions", "cost") if name == "Inspector" else ("",):
            if view:
                opened(page, view)
            found = page.evaluate("async () => (await axe.run()).violations")
            bad = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
            assert not bad, (name, view, bad)


def test_colours_are_the_readers_choice(page: Page) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) == light
    page.click("#theme")
    dark = page.evaluate(ground)
    assert dark != light and page.locator("#theme").inner_text() == "Theme: dark"
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(ground) == dark


def test_files_have_their_types_and_tags(playground: Running) -> None:
    kinds = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
             ".svg": "image/svg+xml"}  # fmt: skip
    with httpx.Client(base_url=playground.address) as client:
        for path in sorted(STATIC.iterdir()):
            reply = client.get(f"/{path.name}")
            assert reply.status_code == 200 and reply.content == path.read_bytes() and reply.headers["content-type"] == kinds[path.suffix]
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy and "*" not in policy
            assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-content-type-options"] == "nosniff"
            again = client.get(f"/{path.name}", headers={"if-none-match": reply.headers["etag"]})
            assert again.status_code == 304 and not again.content
            assert client.head(f"/{path.name}").headers["etag"] == reply.headers["etag"]
            assert b"://" not in path.read_bytes().replace(b"http://www.w3.org/2000/svg", b"")
        assert client.get("/").content == (STATIC / "index.html").read_bytes()
        assert client.post("/").status_code == 405
        assert client.get("/nothing.js").status_code == client.get("/%2e%2e/app.py").status_code == 404
