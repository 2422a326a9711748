"""The command line: exit codes, one sentence per error, no traceback, JSON that parses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transept
from transept.cli.main import main
from transept.core.registry import family
from transept.door import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    fam = family("llama")
    torch.manual_seed(0)
    transept.save(Model(fam.build(fam.tiny["gqa"]), fam, None, fam.tiny["gqa"]), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = main(line)
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_prints_json(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, _ = run(capsys, "generate", str(folder), "1 2 3", "--ids", "--max-tokens", "4", "--json")
    record = json.loads(out)
    assert code == 0 and len(record["ids"]) == 4 and record["finish_reason"] == "length" and record["usage"]["prompt_tokens"] == 3


def test_card_counts_before_a_weight_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "card", "llama2-70b", "--json")
    record = json.loads(out)
    assert code == 0 and record["parameters"] == 68_976_648_192
    assert record["cache_bytes_per_token_2"] == 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("generate", "/nowhere/model", "hello"), ("no file or folder", "/nowhere/model")),
        (("generate", "smollm2-135m-instuct", "hello"), ("smollm2-135m-instruct",)),
        (("card", "llama2-70x"), ("llama2-70x",)),
        (("diff", "gpt", "lama2-7b"), ("lama2-7b", "nearest")),
    ],
)
def test_errors_are_one_sentence(capsys: pytest.CaptureFixture[str], line: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *line)
    assert code == 1 and out == "" and err.startswith("transept: ") and "Traceback" not in err
    assert all(word in err for word in words), err


def test_prompt_errors_name_both_numbers(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, _, err = run(capsys, "generate", str(folder), " ".join(["1"] * 65), "--ids")
    assert code == 1 and "65 tokens" in err and "64" in err
    code, _, err = run(capsys, "generate", str(folder), "some text")
    assert code == 1 and "tokenizer" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlamaForCausalLn"]}, ("LlamaForCausalLn", "LlamaForCausalLM")),
        ({"hidden_act": "silo"}, ("silo", "silu")),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"num_attention_heads": "four"}, ("four",)),
        ({"query_scale": 3.0}, ("query_scale", "arithmetic")),
        ({"vocab_size": 97}, ("97",)),
    ],
)
def test_wrong_configurations_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, change: dict, words: tuple[str, ...]
) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    code, _, err = run(capsys, "generate", str(tmp_path), "1", "--ids")
    assert code == 1 and "Traceback" not in err
    assert all(word in err for word in words), err


def test_nan_weights_are_refused_by_name(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    m = transept.load(folder)
    with torch.no_grad():
        next(m.model.parameters())[3, 4] = float("nan")
    transept.save(m, tmp_path)
    code, _, err = run(capsys, "generate", str(tmp_path), "1", "--ids")
    assert code == 1 and "model.embed_tokens.weight" in err and "finite" in err


def test_truncated_weights_are_refused(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    code, _, err = run(capsys, "generate", str(tmp_path), "1", "--ids")
    assert code == 1 and "model.safetensors" in err and "Traceback" not in err


def test_diff_prints_real_differences_only(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", "gpt", "llama2", "--json")
    lines = {d["where"]: (d["left"], d["right"]) for d in json.loads(out)["differences"]}
    assert code == 0
    assert "LayerNorm" in lines["layers.attn_norm"][0] and "RMSNorm" in lines["layers.attn_norm"][1]
    assert "Learned" in lines["embed.position"][0] and "Rotary" in lines["layers.attn.position"][1]
    assert "GatedMLP" in lines["layers.mlp"][1]
    assert all(a != b for a, b in lines.values())
    code, out, _ = run(capsys, "diff", "llama2-7b", "llama2-7b", "--json")
    assert code == 0 and json.loads(out)["differences"] == []


@pytest.mark.parametrize("name", ["lstm", "t5", "bert", "seq2seq"])
def test_verify_of_what_transformers_has_no_causal_model_of_is_one_sentence(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = family(name)
    spec = next(iter(page.tiny.values()))
    transept.save(Model(page.build(spec), page, None, spec), tmp_path)
    code, out, err = run(capsys, "verify", str(tmp_path))
    assert code == 1 and not out and ("as a causal language model" in err or "continues no text" in err)
    assert "Traceback" not in err and err.count("\n") == 1


def test_verify_against_transformers(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    pytest.importorskip("transformers")
    code, out, err = run(capsys, "verify", str(folder), "--json")
    record = json.loads(out)
    assert code == 0 and record["ok"] and len(record["rows"]) >= 12, (record, err)


def test_starts_without_torch() -> None:
    line = "import sys, transept, transept.cli.main as m; m.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0


def test_a_conversation_over_a_pipe_ends_with_the_input(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transept.cli.main", "chat", str(folder)], input="hello\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "tokenizer" in done.stderr
