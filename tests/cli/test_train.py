"""`transept train`, `compare` and `check` as a newcomer calls them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.training.recipes import __file__ as RECIPES
from transept.cli.main import main

RECIPE = f"{RECIPES}:letters"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of two words, and the folder of the test as the working one."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(rng.choice(["hello ", "world\n"]) for _ in range(400)))
    return path


def test_a_run_ends_with_a_sample_a_curve_and_the_command_that_goes_on(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", RECIPE, "--set", f"data={text}", "--set", "steps=6", "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "ROMEO" not in out and "go on: transept train --resume a --set steps=12" in out
    assert Path("a/curve.png").read_bytes().startswith(b"\x89PNG") and "curve: a/curve.png" in out
    assert main(["train", "--resume", "a", "--set", "steps=12"]) == 0
    assert json.loads(Path("a/result.json").read_text())["step"] == 12
    assert main(["train", RECIPE, "--set", f"data={text}", "--set", "steps=12", "--set", "optim.lr=1e-3", "--out", "b"]) == 0
    capsys.readouterr()
    assert main(["compare", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"settings.optim.lr": [0.01, 0.001]} and len(found["loss"]) == 12
    assert main(["compare", "a", "b"]) == 0
    assert "settings.optim.lr: 0.01 | 0.001" in capsys.readouterr().out


def test_what_goes_wrong_is_told_in_a_sentence(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--set", f"data={text}", "--set", "steps=2"]
    wrong = {
        "neither the recipe nor its settings have 'optim.lrr' (nearest: 'optim.lr')": ["train", RECIPE, *data, "--set", "optim.lrr=1"],
        "a change is written NAME=VALUE, found 'dim'": ["train", RECIPE, "--set", "dim"],
        "'dim' should be int, found 'wide'": ["train", RECIPE, *data, "--set", "dim=wide"],
        "has no recipe 'leters' (nearest: 'letters')": ["train", RECIPE[:-7] + "leters"],
        "there is no module nowhere": ["train", "nowhere:letters"],
        "there is no file nowhere.py": ["train", "nowhere.py:letters"],
        "nowhere holds no run": ["train", "--resume", "nowhere"],
        "a holds a run already; go on with --resume a": ["train", RECIPE, *data, "--out", "a"],
        "changed since a was saved: settings.optim.lr: was 0.01, is 0.5; --force": ["train", "--resume", "a", "--set", "optim.lr=0.5"],
        "no run: run.json or log.jsonl is missing": ["compare", "a", "nowhere"],
    }
    assert main(["train", RECIPE, *data, "--out", "a"]) == 0
    for sentence, line in wrong.items():
        capsys.readouterr()
        assert main(line) == 1, line
        assert sentence in capsys.readouterr().err, line
    # A refused continuation leaves the run as it was.
    assert json.loads(Path("a/run.json").read_text())["settings"]["optim"]["lr"] == 0.01
    assert main(["train", "--resume", "a", "--set", "optim.lr=0.5", "--set", "steps=3", "--force"]) == 0


def test_a_dry_run_says_everything_and_writes_nothing(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", RECIPE, "--set", f"data={text}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("optim.lr = 0.01", "batch: ids [4, 17] int64", "parameters", "MiB", "s an update"):
        assert part in out
    assert [p.name for p in Path(".").iterdir()] == ["text.txt"]


def test_the_invariants_can_be_tried_by_anybody(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from transept.evaluation import invariants

    chosen = {name: invariants.CHECKS[name] for name in ("any split of a batch", "bad rows")}
    monkeypatch.setattr(invariants, "CHECKS", {**chosen, "broken": lambda share, seed: (3, ["one was wrong"])})
    assert main(["check", "training", "--share", "0.01"]) == 1
    out = capsys.readouterr().out
    assert out.count("ok  ") == 2 and "FAIL  broken: 3 tried, 1 bad" in out and "one was wrong" in out
