"""A router over echo nodes: real gRPC on loopback, no model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from baton.config import BatonConfig, MembershipConfig, RouterConfig
from baton.tokenizer import Tokenizer
from router.dispatch import Dispatcher
from tests.router.echo_nodes import EchoNode
from tests.router.echo_tokenizer import save_tokenizer

MakeDispatcher = Callable[..., Awaitable[Dispatcher]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with a tokenizer only."""
    return save_tokenizer(tmp_path_factory.mktemp("echo"))


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    """Its tokenizer: one token per byte."""
    return Tokenizer.load(model_dir)


@pytest.fixture
async def make_dispatcher(model_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[MakeDispatcher]:
    """Start a dispatcher over started echo nodes and wait until a pair is proven; router settings as keywords.

    beat_s: between heartbeats; dead_beats: missed ones after which a node is dead; suspect_beats: suspect, by default half of them.
    """
    async with AsyncExitStack() as stack:

        async def make(
            *nodes: EchoNode, wait: bool = True, beat_s: float = 1.0, dead_beats: int = 6, suspect_beats: int = 0, **router: object
        ) -> Dispatcher:
            config = BatonConfig(
                model=str(model_dir),
                served_model_name="echo",
                router=RouterConfig.model_validate(router),
                membership=MembershipConfig(beat_s=beat_s, suspect_beats=suspect_beats or dead_beats // 2, dead_beats=dead_beats),
            )
            dispatcher = Dispatcher(config, tokenizer)
            stack.push_async_callback(dispatcher.close)
            dispatcher.start()
            for node in nodes:
                stack.push_async_callback(node.stop)
                dispatcher.add_group(node.role, await node.start())
            if wait:
                assert await dispatcher.wait_ready(20)
            return dispatcher

        yield make
