"""More clients than a server takes, in a process of their own: the server's threads share one interpreter, its clients do not.

    python -m tests.serving.crowd ADDRESS KEY REQUESTS AT_ONCE

Prints JSON: `answered`, `prompt` (tokens of their prompts), `refused` (seconds from a request's last byte to its refusal), and `wrong`,
what was neither.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.serving.wire import ASK, heard, sent


async def crowd(address: str, key: str, requests: int, at_once: int) -> dict[str, Any]:
    """Sends the requests, so many at once; a client that is refused waits as long as it is told."""
    answered, prompt, refused, wrong = 0, 0, list[float](), list[str]()

    async def client(left: Iterator[int]) -> None:
        nonlocal answered, prompt
        for i in left:
            body = {**ASK, "seed": i, "messages": [{"role": "user", "content": f"Number {i}"}]}
            pair = await sent(address, body, headers={"Authorization": f"Bearer {key}"})
            begin = time.monotonic()
            status, head, rest = await heard(*pair)
            late = time.monotonic() - begin
            if status == 200 and json.loads(rest)["usage"]["completion_tokens"] == 8:
                answered += 1
                prompt += json.loads(rest)["usage"]["prompt_tokens"]
            elif status == 429 and json.loads(rest)["error"]["type"] == "rate_limit_error":
                refused.append(late)
                seconds = int(head.lower().partition("retry-after: ")[2].split()[0])
                if not 1 <= seconds <= 60:
                    wrong.append(head)
                await asyncio.sleep(seconds)
            else:
                wrong.append(f"{status} {rest[:300]}")

    left = iter(range(requests))
    await asyncio.gather(*(client(left) for _ in range(at_once)))
    return {"answered": answered, "prompt": prompt, "refused": refused, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(crowd(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))))
