"""A node of two tensor-parallel ranks in one process, over gloo and gRPC: it comes up in any order, steps, and falls as a unit."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from baton.config import BatonConfig, RankPlan
from prefill_node.node import PrefillNode
from ranks.host import RankHost
from ranks.node import RankLife
from tests.relay.inprocess import BLOCK_BYTES, BLOCK_SIZE, Stream, ask, eventually
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def loaded(model: Path) -> AsyncIterator[list[RankLife]]:
    """Both ranks, loaded; leader first."""
    config = BatonConfig.model_validate(
        {
            "model": str(model),
            "dtype": "float32",
            "block_size": BLOCK_SIZE,
            "kv_memory": 12 * BLOCK_BYTES,
            "prefill": {"tp": 2},
            "membership": {"beat_s": 0.2, "suspect_beats": 2, "dead_beats": 4},
        }
    )
    plans = [RankPlan(config=config, role="prefill", node="prefill-0", rank=rank, threads=1) for rank in range(2)]
    lives = [RankLife(RankHost(plan)) for plan in plans]
    addresses = [await life.prepare() for life in lives]
    await asyncio.gather(*(life.load(addresses) for life in lives))
    yield lives
    await asyncio.gather(*(life.stop() for life in lives))


@pytest.mark.parametrize("leader_first", [True, False])
async def test_a_node_comes_up_whichever_rank_starts_first_and_serves_when_all_have(loaded: list[RankLife], leader_first: bool) -> None:
    first, second = loaded if leader_first else reversed(loaded)
    starting = asyncio.create_task(first.start(PrefillNode))
    await asyncio.sleep(0.2)
    assert starting.done() is not leader_first, "the leader waits for its follower's export, a follower for nobody"
    await second.start(PrefillNode)
    await starting
    router = Stream("prefill", loaded[0].host.address.control)
    await router.open()
    assert router.hello and [export.rank for export in router.hello.exports] == [0, 1]
    await router.prefill(ask("a", 40, max_tokens=1), 0)
    await eventually(lambda: router.finished("a"), "a token")
    await eventually(lambda: all(life.counts().asleep for life in loaded), "two sleeping ranks")
    assert loaded[0].counts().steps == loaded[1].counts().steps > 0
    await router.close()


async def test_a_leader_falls_with_its_follower_although_nobody_asks_for_anything(loaded: list[RankLife]) -> None:
    await asyncio.gather(*(life.start(PrefillNode) for life in loaded))
    leader, follower = loaded
    router = Stream("prefill", leader.host.address.control)
    await router.open()
    partner = leader.host.partners[0]
    assert await partner.ping(5.0) == 0
    await asyncio.sleep(0.5)  # some beats: a rank that has never answered is not judged
    await follower.host.hang_up()
    await eventually(leader.failed.is_set, "the verdict")
    await eventually(lambda: router.ended, "the end of the stream")
    assert not follower.failed.is_set(), "it has no say about its leader"
    await router.close()
