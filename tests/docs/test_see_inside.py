"""The page about looking inside: its code runs as it stands, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.test_howto import blocks
from tests.serving import tiny


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("docs/howto/see-inside.md", "python")
    folder = tiny.decoder(tmp_path / "tiny")
    assert code.count("smollm2-135m-instruct") == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("smollm2-135m-instruct", str(folder)), "see-inside.md", "exec"), {})
    told = capsys.readouterr().out
    assert (tmp_path / "maps.png").stat().st_size > 1000 and "block[0]" in told and "'ffn'" in told and "attn[0].q" in told
