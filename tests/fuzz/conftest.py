"""A whole router over echo nodes, with small limits so that even the worst request is cheap."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.config import BatonConfig, RouterConfig
from router.server import RouterServer
from tests.router.echo_nodes import EchoNode
from tests.router.echo_tokenizer import save_tokenizer

MAX_BODY_BYTES = 16_384


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a failing test was given may be long; that it is must not hide why it failed."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Generating overly large repr"))


class Running:
    """A router and where it listens. dispatcher: what is behind both of its doors."""

    def __init__(self, server: RouterServer, addresses: dict[str, str]) -> None:
        self.dispatcher = server.dispatcher
        self.http_port = int(addresses["http"].rpartition(":")[2])
        self.grpc = addresses["grpc"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with a tokenizer only."""
    return save_tokenizer(tmp_path_factory.mktemp("echo"))


@pytest.fixture
async def router(model_dir: Path) -> AsyncIterator[Running]:
    """Serves until the test is over, and is idle then."""
    limits = {"http_port": 0, "grpc_port": 0, "max_body_bytes": MAX_BODY_BYTES, "max_n": 4, "slow_client_s": 0.5}
    server = RouterServer(BatonConfig(model=str(model_dir), served_model_name="echo", router=RouterConfig.model_validate(limits)))
    nodes = [EchoNode("prefill", "prefill-0", max_model_len=128), EchoNode("decode", "decode-0", max_model_len=128)]
    try:
        addresses = await server.start()
        for node in nodes:
            server.dispatcher.add_group(node.role, await node.start())
        await server.wait_ready(20)
        yield Running(server, addresses)
        assert server.dispatcher.num_running == 0
    finally:
        await server.stop()
        for node in nodes:
            await node.stop()
