"""Renders every hostile template and prints what became of each: error, processor seconds, peak of traced memory."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.data_text.hostile import BOMBS, ESCAPES
from transept.data.text.template import render

UNKNOWN = ("gettext", "config.", "environment.", "context.", "get_flashed", "url_for")


def fate(source: str) -> dict[str, object]:
    # a name that chat templates do not have is an undefined value, which renders as nothing; reading further is the error
    more = "{{ missing.attribute }}" if any(name in source for name in UNKNOWN) else ""
    talk = [{"role": "user", "content": "hello"}]
    error, text = "none", ""
    tracemalloc.start()
    began = time.thread_time()
    try:
        text = render(source + more, talk)[:200]
    except BaseException as caught:
        error, text = type(caught).__name__, str(caught)
    seconds, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"error": error, "text": text, "seconds": seconds, "peak": peak}


print(json.dumps({source: fate(source) for source in ESCAPES + BOMBS}))
