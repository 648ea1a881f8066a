"""What ends a request in the real relay (cancel, disconnect, deadline, a killed rank), and that nothing of it stays behind.

One cluster in the full shape over TCP: prefill tp=2 → decode dp=2, experts over both ranks. The last test kills a rank.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from baton.client import connect
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest
from cluster.offline import Engine
from tests.relay.reference import Oracle
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.relay, pytest.mark.timeout(300)]

LONG = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 900}
PROMPT = list(range(10, 60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    shape = {"prefill.tp": 2, "decode.dp": 2, "transfer.transport": "tcp"}
    settings = {
        "dtype": "float32",
        "kv_memory": "16MiB",
        "max_model_len": 1024,
        "prefill.max_step_tokens": 32,
        "decode.max_prompt_tokens": 0,
    }
    with Engine(str(model), **settings, **shape) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_stays(engine: Engine, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "kill" not in request.node.name:
        counts = engine.wait_idle()
        assert all(rank.idle() for rank in counts), counts


def test_tcp_gives_the_same_tokens(engine: Engine, model: Path) -> None:
    expected = Oracle(model).greedy(PROMPT, 20)
    answers = engine.generate([PROMPT, PROMPT], {**LONG, "max_tokens": 20})
    assert [list(answer.token_ids) for answer in answers] == [expected.token_ids] * 2
    pulls = [group["pulls"] for group in engine.status()["groups"] if group["role"] == "decode"]
    assert sum(pull["bytes_pulled"] for pull in pulls) > 0


def test_leaving_a_stream_cancels_everywhere(engine: Engine) -> None:
    with connect(engine.info.grpc) as client:
        stream = client.generate(PROMPT, **LONG)
        assert [next(stream).token_ids for _ in range(3)]
        stream.close()


def test_a_client_that_disconnects_cancels_everywhere(engine: Engine) -> None:
    body = {"model": engine.info.model, "prompt": PROMPT, "stream": True, **LONG}
    with httpx.stream("POST", f"http://{engine.info.http}/v1/completions", json=body, timeout=30) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")


def test_cancel_while_prefill_still_computes(engine: Engine) -> None:
    """Disconnecting before the first token: chunks are being computed and pulled at that time."""
    with connect(engine.info.grpc) as client:
        streams = [client.generate([10 + i] * 900, temperature=0.0, max_tokens=50) for i in range(4)]
        threads = [threading.Thread(target=lambda stream=stream: next(stream, None)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        for stream in streams:
            stream.close()


def test_the_deadline_reaches_every_node(engine: Engine) -> None:
    began_s = time.monotonic()
    with connect(engine.info.grpc) as client, pytest.raises(DeadlineExceeded):
        client.complete(PROMPT, **LONG, timeout_s=0.3)
    assert time.monotonic() - began_s < 30, "the deadline was 0.3 s"


def test_bad_requests_cost_nothing(engine: Engine) -> None:
    before = sum(rank.steps for rank in engine.counts())
    with connect(engine.info.grpc) as client:
        for prompt, options in (([1] * 2000, {}), ([], {}), ("x", {"n": 0}), ("x", {"temperature": -1.0}), ([10**6], {})):
            with pytest.raises(InvalidRequest):
                client.complete(prompt, **options)
    assert sum(rank.steps for rank in engine.counts()) == before


def test_all_idle_uses_no_cpu(engine: Engine) -> None:
    """Asleep is asleep: no rank steps, and what their processes burn is the beat of their streams, not a busy wait."""
    before = {(rank.node, rank.rank): rank for rank in engine.wait_idle()}
    time.sleep(3.0)
    for rank in engine.counts():
        earlier = before[rank.node, rank.rank]
        assert rank.asleep and rank.steps == earlier.steps
        assert rank.cpu_seconds - earlier.cpu_seconds < 1.0


def test_killing_a_rank_ends_every_request(engine: Engine) -> None:
    outcomes: list[BaseException | None] = []

    def ask() -> None:
        try:
            with connect(engine.info.grpc) as client:
                client.complete(PROMPT, **LONG, timeout_s=20.0)
            outcomes.append(None)
        except BatonError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    victim = next(rank.pid for rank in engine.counts() if rank.node == "decode-0")
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 6, "a request hangs"
