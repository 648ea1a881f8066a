"""A prefill node's ranks in a process of their own: serves pools of known bytes until its input ends. Started by tests, imports no torch.

Arguments: JSON of a list of layouts. Output: one line of JSON, the exports. Input: lines "stamp RANK BLOCK GENERATION", each answered "ok".
"""

import json
import sys
from dataclasses import asdict

import numpy as np

from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.source import SourceRank
from kv_transfer.thread import TransferThread


def serve(layouts: list[KVLayout]) -> None:
    thread = TransferThread()
    pools = [Pool(layout.num_blocks, layout.block_bytes) for layout in layouts]
    sources = [SourceRank(thread, pool, layout, rank=rank) for rank, (pool, layout) in enumerate(zip(pools, layouts, strict=True))]
    for rank, pool in enumerate(pools):
        pool.data[:] = np.random.default_rng(rank).bytes(len(pool.data))
        pool.generations[:] = np.arange(100, 100 + pool.num_blocks)
    print(json.dumps([asdict(source.export) | {"nonce": source.export.nonce.hex()} for source in sources]), flush=True)
    for line in sys.stdin:
        _, rank, block, generation = line.split()
        pools[int(rank)].generations[int(block)] = int(generation)
        print("ok", flush=True)
    thread.close()
    for pool in pools:
        pool.close()


if __name__ == "__main__":
    serve(
        [
            KVLayout(**fields | {"axes": tuple(fields["axes"]), "part_dims": tuple(fields["part_dims"])})
            for fields in json.loads(sys.argv[1])
        ]
    )
