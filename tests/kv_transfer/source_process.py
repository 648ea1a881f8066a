"""A prefill node's ranks in a process of their own: serves pools of known bytes until its input ends. Started by tests, imports no torch.

Arguments: JSON of a list of layouts. Output: one line of JSON, the exports. Input, each line answered "ok":
stamp RANK BLOCK GENERATION: give a block another generation.
reuse RANK BLOCK GENERATION: give it another content, as an engine does: the stamp first, then the bytes, GENERATION modulo 251 each.
scribble RANK BLOCK COUNT: reuse it for ever new contents, in the background; the next block's generation says which is complete.
"""

import json
import sys
import threading
import time
from dataclasses import asdict

import numpy as np

from kv_transfer.layout import KVLayout
from kv_transfer.pool import Pool
from kv_transfer.source import SourceRank
from kv_transfer.thread import TransferThread

FIRST = 1000  # generation of a scribbler


def reuse(pool: Pool, block: int, generation: int) -> None:
    pool.generations[block] = generation
    content = np.frombuffer(pool.data, np.uint8).reshape(pool.num_blocks, -1)
    content[block] = generation % 251


def scribble(pool: Pool, block: int, count: int) -> None:
    for generation in range(FIRST, FIRST + count):
        reuse(pool, block, generation)
        pool.generations[block + 1] = generation
        time.sleep(0.0003)


def obey(pool: Pool, command: str, block: int, number: int) -> None:
    if command == "stamp":
        pool.generations[block] = number
    elif command == "reuse":
        reuse(pool, block, number)
    else:
        threading.Thread(target=scribble, args=(pool, block, number), daemon=True).start()


def serve(layouts: list[KVLayout]) -> None:
    thread = TransferThread()
    pools = [Pool(layout.num_blocks, layout.block_bytes) for layout in layouts]
    sources = [SourceRank(thread, pool, layout, rank=rank) for rank, (pool, layout) in enumerate(zip(pools, layouts, strict=True))]
    for rank, pool in enumerate(pools):
        pool.data[:] = np.random.default_rng(rank).bytes(len(pool.data))
        pool.generations[:] = np.arange(100, 100 + pool.num_blocks)
    print(json.dumps([asdict(source.export) | {"nonce": source.export.nonce.hex()} for source in sources]), flush=True)
    for line in sys.stdin:
        command, rank, block, number = line.split()
        obey(pools[int(rank)], command, int(block), int(number))
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
