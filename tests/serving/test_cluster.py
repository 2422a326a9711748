"""Several replicas behind one address, where ray is installed; without it, a sentence that says what to install."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import httpx
import pytest

from tests.serving import tiny
from transept.core.errors import InputError, SourceError
from transept.serving.cluster import application

HERE = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HERE, reason="ray is installed, so nothing is missing")
def test_without_ray_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"transept\[cluster\]"):
        application(tiny.settings(tmp_path))


def test_a_cluster_has_replicas(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found 0"):
        application(tiny.settings(tmp_path), replicas=0)


@pytest.mark.serial
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not HERE, reason="needs the extra [cluster], 80 MB: pip install 'transept[cluster]'")
def test_two_replicas_behind_one_address(tmp_path: Path) -> None:
    """Both serve, both say the same, and a request that is wrong or from a foreign host is refused as by one server."""
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8771})
        serve.run(application(tiny.settings(tmp_path), cores=0.5))
        with httpx.Client(base_url="http://127.0.0.1:8771", timeout=60) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            replies = [client.post("/v1/chat/completions", json=tiny.ASK) for _ in range(12)]
            said = {reply.json()["choices"][0]["message"]["content"] for reply in replies}
            assert len(said) == 1 and said != {""}
            assert client.post("/v1/chat/completions", json={"model": "tiny"}).status_code == 400
            assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        states = serve.status().applications["default"].deployments["transept"].replica_states
        assert sum(states.values()) == 2
    finally:
        serve.shutdown()
        ray.shutdown()
