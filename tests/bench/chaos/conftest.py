"""A router over echo nodes, through which the clients of a run can be tried without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from baton.config import BatonConfig, RouterConfig
from router.server import RouterServer
from tests.router.echo_nodes import EchoNode
from tests.router.echo_tokenizer import save_tokenizer

Running = Callable[..., AbstractAsyncContextManager[RouterServer]]


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("echo"))


@pytest.fixture
def running(echo_model: Path) -> Running:
    """Start a router with a pair of echo nodes: `async with running(step_s=0.01, max_queue=0) as (grpc, http)`."""

    @asynccontextmanager
    async def run(*, step_s: float = 0.0, grpc_port: int = 0, http_port: int = 0, **router: object) -> AsyncIterator[tuple[str, str]]:
        settings = RouterConfig.model_validate({"http_port": http_port, "grpc_port": grpc_port, **router})
        server = RouterServer(BatonConfig(model=str(echo_model), served_model_name="echo", router=settings))
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
