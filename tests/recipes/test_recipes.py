"""What recipes do to real data before and after training, and that a few updates of those that start from nothing lower the loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import transept
from recipes import ner, squad
from recipes.results import RUNS, row, train
from recipes.sentiment import _taken
from recipes.text import last_words
from tests.serving.tiny import HEADS, encoder
from tests.shared import shared
from transept.cli.train import recipe
from transept.core.errors import InputError
from transept.evaluation.squad import Question
from transept.training.log import read
from transept.training.loop import Loop
from transept.training.objectives.losses import IGNORE
from transept.training.run import Run, Settings, call


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transept.load(encoder(tmp_path_factory.mktemp("recipes") / "answer", HEADS["answer"])).tokenizer


@pytest.mark.parametrize("longest", [24, 40, 200])
def test_answers_stand_at_their_columns(tokenizer: Any, longest: int) -> None:
    """Wherever a window holds the answer whole, its columns spell it; every answer is whole in some window; else both are 0."""
    context = "a dog ran over the green hill and a cat sat by the old mill, while two men went home."
    for answer in ("dog", "green hill", "the old mill", "home", "a dog"):
        q = Question("1", "x", "who ran?", context, ((answer, context.index(answer)),))
        found = [*squad.rows(tokenizer, q, longest, 12)]
        whole = [r for r in found if r["end"] > 0]
        assert whole and all(len(r["ids"]) <= longest and len(r["ids"]) == len(r["segments"]) for r in found)
        for r in whole:
            assert tokenizer.decode(r["ids"][r["start"] : r["end"] + 1]).replace(" ", "") == answer.replace(" ", "")
        for r in found:
            spelled = tokenizer.decode(r["ids"]).replace(" ", "").split("?")[1]
            assert (r["end"] > 0) == (answer.replace(" ", "") in spelled) or r["start"] == r["end"] == 0


def test_articles_are_divided() -> None:
    questions = squad.read(shared("squad-dev/dev-v1.1.json.xz"))
    learnt, held = squad.divided(questions)
    titles = [{q.article for q in part} for part in (learnt, held)]
    assert (len(titles[0]), len(titles[1])) == (38, 10) and not titles[0] & titles[1] and len(learnt) + len(held) == 10570


def test_tags_stand_at_first_pieces(tokenizer: Any) -> None:
    """Row 60: as many labels as words, each at the first piece of its word, none elsewhere."""
    found = ner.sentences("the\tO\nredondo\tB-location\n\nÿ\tO\ncat\tB-person\nsat\tI-person\n")
    tags = ["O", "B-location", "B-person", "I-person"]
    source = ner.rows(tokenizer, found, tags)
    for sentence, made in zip(found, source.samples, strict=True):
        asked = [i for i, label in enumerate(made["labels"]) if label != IGNORE]
        assert [tags[made["labels"][i]] for i in asked] == [tag for _, tag in sentence]
        assert made["ids"][0] == tokenizer.before[0] and made["ids"][-1] == tokenizer.after[-1] and len(made["ids"]) == len(made["labels"])
        for i, (word, _) in zip(asked, sentence, strict=True):
            assert not tokenizer.token(made["ids"][i]).startswith("##")
            assert word == "ÿ" or tokenizer.token(made["ids"][i]) == word[0]
    with pytest.raises(InputError, match="line 2 has 1"):
        ner.sentences("a\tO\nb\n")


def test_a_student_takes_every_other_layer() -> None:
    assert _taken("stack.layers.2.attn.q.weight", 2) == "stack.layers.4.attn.q.weight" and _taken("head.out.bias", 2) == "head.out.bias"


def test_every_result_names_a_recipe_and_its_settings(tmp_path: Path) -> None:
    for line in RUNS.values():
        made = recipe(line[0])
        known = {*made.__code__.co_varnames[: made.__code__.co_kwonlyargcount], *vars(Settings())}
        assert all(change.removeprefix("--set=").split("=")[0] in known for change in line[1:] if change.startswith("--set"))
    (tmp_path / "result.json").write_text(json.dumps({"recipe": "r", "step": 3, "minutes": 1.25, "seed": 7, "figures": {"loss": 1.0}}))
    (tmp_path / "run.json").write_text(json.dumps({"changes": ["steps=0", "tune=lora"]}))
    assert row(tmp_path) == ["r", "tune=lora", "loss 1", "3", "1.2", "7"]
    assert last_words(tmp_path, {"accuracy": 86.25, "n": 3}) == "test: accuracy 86.25, n 3"
    assert row(tmp_path)[2] == "accuracy 86.25, n 3"


@pytest.mark.parametrize(
    ("why", "wanted"),
    [(None, ["recipes.squad:minilm", "--out", "runs/squad"]), ("signal 15", ["--resume", "runs/squad"]), ("the end of the run", None)],
)
def test_a_result_is_begun_gone_on_with_or_kept(
    why: str | None, wanted: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if why is not None:
        folder = tmp_path / "runs" / "squad"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        (folder / "result.json").write_text(json.dumps({"why": why}))
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    train("squad")
    assert [command[command.index("train") + 1 :] for command in asked] == ([] if wanted is None else [wanted])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("in_context:skills", ["dim=32", "layers=1", "shots=3", "batch=8"]),
        ("translation:transformer", ["dim=32", "layers=1", "ffn=64", "vocab=400", "batch=16"]),
        ("translation:recurrent", ["dim=24", "width=32", "vocab=400", "batch=16"]),
        ("llama:shakespeare", ["dim=32", "layers=1", "context=32", "batch=8"]),
    ],
)
def test_a_few_updates_lower_the_loss(name: str, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shared("multi30k/train.en.gz").parents[1]
    monkeypatch.setenv("TRANSEPT_DATA", str(data))
    found = recipe(f"recipes.{name}")
    if name.startswith("translation"):
        # A few hundred captions are enough here.
        whole = sys.modules["recipes.translation"].lines
        monkeypatch.setattr(sys.modules["recipes.translation"], "lines", lambda file: whole(file)[:300])
    run: Run = call(found, [*changes, "optim.lr=0.01", "steps=25", "schedule.warmup=0", "judging.every=0", "log_every=1"], name)
    run.eval = {}
    result = Loop(run, tmp_path).train()
    losses = [line["loss"] for line in read(tmp_path / "log.jsonl") if "loss" in line]
    assert result.step == len(losses) == 25
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1
