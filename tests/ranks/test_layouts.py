"""From a model and a cluster's shape to who reads what from whom, as ranks work it out: the missions' models, in every layout."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from baton.config import BatonConfig, RankPlan
from baton.engine.config_json import spec_from_config
from baton.engine.kv_cache import KVCache
from baton.engine.kv_shape import KVShape
from baton.engine.spec import ModelSpec
from kv_transfer.layout import KVLayout, check_compatible
from kv_transfer.reshard import plan
from ranks.layouts import node_layouts, placement_of
from tests.mission_configs import CONFIGS

SPECS = {name: spec_from_config(config) for name, config in CONFIGS.items()}
LATENT = next(spec for spec in SPECS.values() if spec.mla)
GROUPED = next(spec for spec in SPECS.values() if spec.kv_heads == 4)


def node(role: str, spec: ModelSpec, tp: int, dp: int = 1, num_blocks: int = 4) -> tuple[KVLayout, ...]:
    config = BatonConfig.model_validate({"model": "m", "block_size": 16, "prefill": {"tp": tp}, "decode": {"tp": tp, "dp": dp}})
    return node_layouts(RankPlan(config=config, role=role, node=f"{role}-0", rank=0, threads=1), spec, num_blocks)  # type: ignore[arg-type]


def served(sources: tuple[KVLayout, ...], targets: tuple[KVLayout, ...]) -> list[int]:
    """Bytes of a block that each prefill rank serves to all ranks of a decode node, each asked for itself."""
    total = [0] * len(sources)
    for index, target in enumerate(targets):
        for reads in plan(sources, target, targets[:index]):
            total[reads.source] += reads.block_bytes
    return total


@pytest.mark.parametrize("name", SPECS)
def test_prefill_ranks_share_the_reads_of_any_decode_node_evenly(name: str) -> None:
    """Up to one layer of one rank, whether heads are split, replicated on either side or both, or are one latent."""
    spec = SPECS[name]
    for prefill_tp, tp, dp in product((1, 2, 4), (1, 2, 4), (1, 2, 4)):
        sources, targets = node("prefill", spec, prefill_tp), node("decode", spec, tp, dp)
        for target in targets:
            check_compatible(sources, target)
        total = served(sources, targets)
        assert sum(total) == sum(target.block_bytes for target in targets)
        assert max(total) - min(total) <= max(target.block_bytes // target.num_layers for target in targets)


@pytest.mark.parametrize(("tp", "dp"), [(1, 4), (2, 2), (4, 1), (1, 8)])
@pytest.mark.parametrize("spec", [LATENT, replace(GROUPED, kv_heads=2)], ids=["latent", "replicated heads"])
def test_one_layer_is_spread_over_decode_ranks_at_least(spec: ModelSpec, tp: int, dp: int) -> None:
    """Four prefill ranks hold four, or twice two, copies; as many decode ranks as there are readers load all of them alike."""
    total = served(node("prefill", replace(spec, num_layers=1), 4), node("decode", replace(spec, num_layers=1), tp, dp))
    assert len(set(total)) == 1 and total[0] > 0


@pytest.mark.parametrize("spec", [LATENT, GROUPED], ids=["latent", "grouped"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_layout_says_where_the_engine_puts_things(spec: ModelSpec, rank: int) -> None:
    """Every piece, byte for byte: what the engine writes through its views, peers find by the layout."""
    small = replace(spec, num_layers=2)
    layout = node("decode", small, tp=2, num_blocks=3)[rank]
    config = BatonConfig.model_validate({"model": "m", "block_size": 16, "decode": {"tp": 2}})
    plan = RankPlan(config=config, role="decode", node="decode-0", rank=rank, threads=1)
    shape = KVShape.of(small, placement_of(plan, small, rank), 16)
    buffer = bytearray(layout.nbytes)
    cache = KVCache(shape, 3, buffer, np.zeros(3, np.uint64))
    for number, (block, layer, part, head) in enumerate(product(range(3), range(2), range(len(shape.part_dims)), layout.heads)):
        cache.layers[layer].parts[part][block, head - layout.head_start] = float(number + 1)
        at, size = layout.offset(block, layer, part, head), layout.piece_bytes(part)
        written = cache.layers[layer].parts[part][block, head - layout.head_start].view(torch.uint8).numpy().tobytes()
        assert len(written) == size and bytes(buffer[at : at + size]) == written and any(written)
