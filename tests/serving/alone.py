"""A server of the tiny model in a process of its own, without the checks that pytest puts around every call.

    python -m tests.serving.alone FOLDER KEY...

Prints its address; when a line comes in and nothing is under way any more, its engine's counts as JSON; then it ends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.serving import tiny
from transept.serving.run import Running

if __name__ == "__main__":
    with Running(tiny.settings(Path(sys.argv[1]), keys=tuple(sys.argv[2:]), rows=4, limits={"queue": 96})) as server:
        print(server.address, flush=True)
        sys.stdin.readline()
        tiny.settle(server.app)
        print(json.dumps(server.app.state.desk.shelf.books["tiny"].served.engine.engine.counts), flush=True)
