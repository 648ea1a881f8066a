"""A router over echo nodes with a tokenizer that merges, so that lengths of texts are not trivial; and the real command against it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.config import BatonConfig, RouterConfig
from baton.tokenizer import Tokenizer
from bench.serve.vocabulary import Vocabulary
from router.server import RouterServer
from tests.router.echo_nodes import EchoNode
from tests.tiny_tokenizers import make_byte_fallback, make_byte_level

Running = Callable[..., AbstractAsyncContextManager[tuple[str, str]]]


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


RunBench = Callable[..., Awaitable[Ended]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with a tokenizer only."""
    return make_byte_level(tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="session")
def fallback_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, whose tokenizer adds a BOS token by itself."""
    return make_byte_fallback(tmp_path_factory.mktemp("fallback"))


@pytest.fixture(scope="session")
def vocabulary(model_dir: Path) -> Vocabulary:
    """What prompts are drawn from."""
    return Vocabulary(Tokenizer.load(model_dir))


@pytest.fixture
def running(model_dir: Path) -> Running:
    """Start a router with a pair of echo nodes: `async with running(step_s=0.01) as (grpc, http)`."""

    @asynccontextmanager
    async def run(*, step_s: float = 0.0, **router: object) -> AsyncIterator[tuple[str, str]]:
        settings = RouterConfig.model_validate({"http_port": 0, "grpc_port": 0, **router})
        server = RouterServer(BatonConfig(model=str(model_dir), served_model_name="echo", router=settings))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(server.stop)
            addresses = await server.start()
            for role in ("prefill", "decode"):
                node = EchoNode(role, f"{role}-0", step_s=step_s)
                stack.push_async_callback(node.stop)
                server.dispatcher.add_group(role, await node.start())
            await server.wait_ready(20)
            yield addresses["grpc"], addresses["http"]

    return run


@pytest.fixture
def bench(model_dir: Path) -> RunBench:
    """`baton bench serve` as people start it; it has a minute. interrupt_after_s: send it a Ctrl-C then."""

    async def run(*words: object, interrupt_after_s: float | None = None) -> Ended:
        command = [sys.executable, "-m", "baton", "bench", "serve", "--tokenizer", str(model_dir), *map(str, words)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        try:
            if interrupt_after_s is not None:
                await asyncio.sleep(interrupt_after_s)
                process.send_signal(2)
            out, err = await asyncio.wait_for(process.communicate(), 60)
        except BaseException:
            process.kill()
            raise
        assert process.returncode is not None
        return Ended(process.returncode, out.decode(), err.decode())

    return run
