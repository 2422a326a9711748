"""The inspector's addresses: what they tell is what the library sees, and what a model cannot do is refused in a sentence."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import transept
from tests.contracts.decoders import initialised
from tests.inspection.reference import hands
from tests.serving import tiny
from transept.core.registry import family
from transept.door import Model
from transept.inference.rules import Rules
from transept.serving.run import Running

SENTENCE = "A quick fox."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("looked")
    settings = tiny.settings(folder, encoders=True, limits={"inspected": 64, "weights": 4096})
    settings = replace(settings, models=(*settings.models, str(translator(folder / "marian"))))
    with Running(settings) as running, httpx.Client(base_url=running.address, timeout=60) as client:
        yield running, client


def translator(folder: Path) -> Path:
    """An encoder-decoder of two layers over the vocabulary of the tiny decoder."""
    torch.manual_seed(0)
    page = family("transformer")
    tokenizer = tiny.train_bpe(tiny.TEXT, vocab=320, specials=("<|im_end|>", "<|im_start|>"))
    spec = page.tiny["2017"].replace(vocab=tokenizer.vocab_size)
    ends = tokenizer.eos_ids or (0,)
    transept.save(Model(initialised(page.build(spec)), page, None, spec, tokenizer, rules=Rules(start=0, ends=tuple(ends))), folder)
    return folder


def ask(server: Any, name: str, **body: Any) -> dict[str, Any]:
    reply = server[1].post(f"/v1/inspect/{name}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refusal(server: Any, name: str, **body: Any) -> dict[str, Any]:
    reply = server[1].post(f"/v1/inspect/{name}", json=body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


def model(server: Any, name: str) -> Model:
    return server[0].app.state.desk.shelf.books[name].served.model


def test_attention_is_what_the_equation_gives(server: Any) -> None:
    for name in ("tiny", "fill"):
        told = ask(server, "attention", model=name, input=SENTENCE)
        m = model(server, name)
        ids = torch.tensor([m.encode(SENTENCE)])
        assert [one["id"] for one in told["queries"]] == ids[0].tolist() and told["queries"] == told["keys"]
        assert len(told["maps"]) == told["layers"] * told["heads"] == 8
        naive = hands(m.look(), ids)
        for one in told["maps"]:
            found = torch.tensor(one["weights"])
            assert (found - naive[f"attn[{one['layer']}]"][0, one["head"]]).abs().max() <= 2e-5, one["name"]
        alone = ask(server, "attention", model=name, input=SENTENCE, layer=1, head=2)["maps"]
        assert alone == [one for one in told["maps"] if one["name"] == "attn[1].head[2]"]


def test_encoder_decoders_tell_three_kinds(server: Any) -> None:
    sizes = {}
    for kind in ("encoder", "self", "cross"):
        told = ask(server, "attention", model="marian", input=SENTENCE, target="a plan", kind=kind)
        assert told["kinds"] == ["self", "encoder", "cross"]
        sizes[kind] = len(told["queries"]), len(told["keys"])
        assert all(abs(sum(row) - 1) < 1e-3 for one in told["maps"] for row in one["weights"])
    assert sizes["encoder"][0] == sizes["encoder"][1] == sizes["cross"][1] and sizes["self"][0] == sizes["self"][1] == sizes["cross"][0]
    own = ask(server, "attention", model="marian", input=SENTENCE)
    assert own["kind"] == "cross" and len(own["queries"]) >= 1
    told = ask(
        server, "ablation", model="marian", input=SENTENCE, heads=[{"layer": 0, "head": 0}, {"layer": 1, "head": 1, "kind": "encoder"}]
    )
    assert told["divergence"] > 0 and told["before"]["text"] is not None and told["before"]["probabilities"][0] is None


def test_a_conversation_is_read_in_its_template(server: Any) -> None:
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "A man"}]
    m = model(server, "tiny")
    told = ask(server, "rollout", model="tiny", messages=messages)
    ids = m.chat_ids(messages[:1]) + m.encode("A man")
    assert [one["id"] for one in told["tokens"]] == ids and told["usage"]["prompt_tokens"] == len(ids)
    assert all(abs(sum(row) - 1) < 1e-3 for row in told["rollout"])


def test_the_lens_ends_with_the_models_answer(server: Any) -> None:
    told = ask(server, "lens", model="tiny", input=SENTENCE, last=3, top=4)
    m = model(server, "tiny")
    ids = torch.tensor([m.encode(SENTENCE)])
    assert told["at"] == [*range(ids.shape[1])][-3:] and [one["name"] for one in told["layers"]] == ["embed", "block[0]", "hidden"]
    with torch.no_grad():
        best = m.look()(ids).logits[0, -3:].softmax(-1).topk(4)
    last = told["layers"][-1]["guesses"]
    assert [[one["id"] for one in guesses] for guesses in last] == best.indices.tolist()
    assert abs(last[0][0]["p"] - float(best.values[0, 0])) < 1e-5
    assert "lens" in refusal(server, "lens", model="classify", input="fox")["message"]


def test_a_head_taken_out_is_a_zeroed_column(server: Any) -> None:
    m = model(server, "tiny")
    plain = ask(server, "ablation", model="tiny", input=SENTENCE, heads=[], max_tokens=4)
    assert plain["before"] == plain["after"] and plain["divergence"] == 0 and plain["similarity"] == 1
    every = [{"layer": layer, "head": head} for layer in (0, 1) for head in (0, 1, 2)]
    told = ask(server, "ablation", model="tiny", input=SENTENCE, heads=every, max_tokens=4, top=3)
    ids = torch.tensor([m.encode(SENTENCE)])
    module = m.look()
    kept = [layer.attn.out.weight.clone() for layer in module.stack.layers]
    with torch.no_grad():
        for layer in module.stack.layers:
            layer.attn.out.weight.unflatten(1, (layer.attn.heads, -1))[:, :3] = 0
        best = module(ids).logits[0, -1].softmax(-1).topk(3)
        for layer, weight in zip(module.stack.layers, kept, strict=True):
            layer.attn.out.weight.copy_(weight)
    assert [one["id"] for one in told["after"]["guesses"]] == best.indices.tolist()
    assert (
        told["divergence"] > 0
        and len(told["before"]["probabilities"]) == ids.shape[1]
        and told["before"]["text"] == plain["before"]["text"]
    )


def test_encoders_answer_in_their_own_way(server: Any) -> None:
    off = [{"layer": 0, "head": 0}, {"layer": 1, "head": 3}]
    filled = ask(server, "ablation", model="fill", input="a [MASK] fox", heads=off)
    assert filled["before"]["at"] == 2 and filled["before"]["text"] is None and filled["divergence"] > 0
    sorted_ = ask(server, "ablation", model="classify", input="fox", heads=off)
    assert {one["token"] for one in sorted_["before"]["guesses"]} == {"no", "yes"} and sorted_["before"]["at"] is None
    span = ask(server, "ablation", model="answer", input="fox", heads=off)
    assert span["before"]["guesses"] == [] and span["similarity"] < 1


def test_positions_latency_and_card(server: Any) -> None:
    turned = ask(server, "positions", model="tiny", count=9)
    assert turned["kind"] == "rotary" and all(abs(row[i] - 1) < 1e-4 for i, row in enumerate(turned["similarity"])) and turned["count"] == 9
    assert ask(server, "positions", model="fill", count=256)["kind"] == "learned"
    assert ask(server, "positions", model="marian")["kind"] == "sinusoidal"
    told = ask(server, "latency", model="tiny", input=SENTENCE, runs=1)
    assert abs(sum(part["share"] for part in told["parts"]) - 1) < 1e-6 and {"qkv", "scores", "softmax", "ffn"} <= {
        p["part"] for p in told["parts"]
    }
    card = ask(server, "card", model="marian", length=10)
    assert card["kinds"] == ["self", "encoder", "cross"] and "cross[0..1].head[0..3]" in card["names"]
    assert sum(card["groups"].values()) == card["parameters"] == sum(p.numel() for p in model(server, "marian").look().parameters())


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("attention", {"model": "tiny"}, "input: give a text"),
        ("attention", {"model": "tiny", "input": "a", "messages": tiny.ASK["messages"]}, "not both"),
        ("attention", {"model": "tiny", "input": ""}, "empty"),
        ("attention", {"model": "tiny", "input": "fox " * 200}, "at most 64 tokens"),
        ("attention", {"model": "tiny", "input": "fox " * 30}, "at most 4096 numbers"),
        ("attention", {"model": "tiny", "input": "a", "kind": "cross"}, "no attention of the kind 'cross'"),
        ("attention", {"model": "tiny", "input": "a", "layer": 2}, "the layers are 0 to 1, found 2"),
        ("attention", {"model": "tiny", "input": "a", "head": 4}, "the heads are 0 to 3, found 4"),
        ("attention", {"model": "tiny", "input": "a", "target": "b"}, "target: 'tiny' writes nothing"),
        ("rollout", {"model": "tiny", "input": "a", "layer": 7}, "the layers are 0 to 1, found 7"),
        ("ablation", {"model": "tiny", "input": "a", "heads": [{"layer": 0, "head": 9}]}, "heads.0: the layers are 0 to 1"),
    ],
)
def test_refusals_say_what_would_do(server: Any, name: str, body: dict[str, Any], words: str) -> None:
    assert words in refusal(server, name, **body)["message"]


def test_looks_do_not_change_answers(server: Any) -> None:
    """A conversation gets the same answer before, between and after looks into the model that gives it."""
    answers = []
    for _ in range(3):
        answers.append(server[1].post("/v1/chat/completions", json=tiny.ASK).json()["choices"][0]["message"]["content"])
        ask(server, "ablation", model="tiny", input=SENTENCE, heads=[{"layer": 0, "head": 0}])
        ask(server, "latency", model="tiny", input=SENTENCE, runs=1)
    assert len(set(answers)) == 1


def test_clients_that_leave_and_clients_at_once(server: Any) -> None:
    """Looks wait for each other and are not lost; those whose client is gone give back their place, and the next one goes on."""
    running, client = server
    desk = running.app.state.desk
    body = {"model": "tiny", "input": SENTENCE, "runs": 20}
    for seconds in (0.005, 0.02, 0.05) * 3:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{running.address}/v1/inspect/latency", json=body, timeout=seconds)
    with ThreadPoolExecutor(8) as pool:
        made = [("attention", {"layer": 0}), ("lens", {}), ("rollout", {}), ("ablation", {"heads": [{"layer": 0, "head": 1}]})] * 4
        replies = list(
            pool.map(lambda one: client.post(f"/v1/inspect/{one[0]}", json={"model": "tiny", "input": SENTENCE, **one[1]}), made)
        )
    assert [reply.status_code for reply in replies] == [200] * 16
    for i in range(4):
        assert all(replies[i].json() == reply.json() for reply in replies[i::4])
    tiny.settle(running.app)
    until = time.monotonic() + 30
    while desk.looking.locked() and time.monotonic() < until:
        time.sleep(0.02)
    assert not desk.looking.locked()
