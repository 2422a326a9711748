"""A cluster of two replicas in a process of its own, where no hook checks types: Ray takes its functions apart to send them around."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import httpx
import ray
from ray import serve

from tests.serving import tiny
from transept.serving.cluster import application


def main(folder: Path) -> None:
    """Both replicas serve and say the same; a wrong request and a foreign host are refused as by one server."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8771})
        serve.run(application(tiny.settings(folder), cores=0.5))
        with httpx.Client(base_url="http://127.0.0.1:8771", timeout=60) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            replies = [client.post("/v1/chat/completions", json=tiny.ASK) for _ in range(12)]
            said = {reply.json()["choices"][0]["message"]["content"] for reply in replies}
            assert len(said) == 1 and said != {""}, said
            assert client.post("/v1/chat/completions", json={"model": "tiny"}).status_code == 400
            assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        states = serve.status().applications["default"].deployments["transept"].replica_states
        assert sum(states.values()) == 2, states
        print("two replicas, one answer")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
