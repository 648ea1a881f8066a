"""The KV cache of one rank: a flat buffer seen as blocks. Knows neither who owns a block nor how bytes travel.

How blocks lie in it: kv_shape.py. The buffer and the table of generations belong to the node, which made them and outlives the
engine; the step thread of this rank is their only writer apart from the transfer thread, which writes blocks that no step uses.
"""

from __future__ import annotations

import mmap

import torch

from baton.engine.batch import Batch, UInt64
from baton.engine.devices import LayerCache
from baton.engine.kv_shape import KVShape

Buffer = memoryview | bytearray | mmap.mmap


class KVCache:
    """Views of the node's buffer, one per layer, without a copy; and the stamps that tell one content of a block from the next.

    buffer: writable, at least num_blocks * shape.block_bytes. generations: uint64 [num_blocks], readable by peers.
    The views keep the buffer alive: drop this object (with the rank that uses it) before unmapping.
    """

    def __init__(self, shape: KVShape, num_blocks: int, buffer: Buffer, generations: UInt64) -> None:
        size = num_blocks * shape.block_bytes
        with memoryview(buffer) as view:
            assert view.nbytes >= size and not view.readonly, f"need {size} writable bytes, got {view.nbytes}"
        assert generations.shape == (num_blocks,), generations.shape
        self.shape = shape
        self.num_blocks = num_blocks
        self._generations = generations
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size).view(_torch_dtype(shape.dtype))
        blocks = flat.view(num_blocks, shape.num_layers, -1)
        self.layers = tuple(_layer(blocks[:, layer], shape) for layer in range(shape.num_layers))

    def stamp(self, batch: Batch) -> None:
        """Give the batch's new blocks their generations. Before the step writes: a peer that read the old content must notice."""
        self._generations[batch.new_blocks] = batch.new_generations


def _layer(blocks: torch.Tensor, shape: KVShape) -> LayerCache:
    """blocks: [num_blocks, elements of a layer's block]."""
    sizes = [shape.num_heads * shape.block_size * dim for dim in shape.part_dims]
    parts = zip(torch.split(blocks, sizes, dim=1), shape.part_dims, strict=True)
    return LayerCache(tuple(part.view(len(part), shape.num_heads, shape.block_size, dim) for part, dim in parts))


def _torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
