"""How the KV cache of one rank lies in its buffer: described, never assumed. Knows neither the buffer nor the model behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from baton.errors import Incompatible

AXES = ("block", "layer", "part", "head", "slot", "dim")
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_BYTES = 2**63 - 1  # offsets are int64
MAX_PARTS = 8
MAX_SOURCES = 1024  # ranks of one node
_MAX_NAME_CHARS = 32


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One rank's share of a KV cache: dense over `axes`, outermost first, without gaps.

    axes: a permutation of AXES that ends in ("slot", "dim"). block_size: token slots of a block. layer_start, num_layers and
    head_start, num_heads: the model's layers and KV heads held by this rank. part_dims: elements per token and head of each part:
    (128, 128) for K and V; (576,) for one latent with its rotary key (MLA), (512, 64) where a device keeps the two apart. A latent
    counts as one head, which every rank of a tensor-parallel group holds.
    Parts may differ in width: an index of "part" then takes as much room as its part needs, so that strides of axes within "part"
    depend on the part, and those outside span all parts.
    Raises Incompatible where the values describe nothing that can exist, since they come from peers.
    """

    axes: tuple[str, ...]
    num_blocks: int
    block_size: int
    layer_start: int
    num_layers: int
    part_dims: tuple[int, ...]
    head_start: int
    num_heads: int
    dtype: str
    model_num_layers: int
    model_num_kv_heads: int

    def __post_init__(self) -> None:
        # What is too much even to be described:
        if not 1 <= len(self.part_dims) <= MAX_PARTS:
            raise Incompatible(f"a KV layout has 1 to {MAX_PARTS} parts, this one {len(self.part_dims)}", cause="kv_layout")
        if len(self.axes) > len(AXES) or max(map(len, (*self.axes, self.dtype))) > _MAX_NAME_CHARS:
            raise Incompatible("a KV layout has axes or a dtype that nobody knows", cause="kv_layout")
        problem = self._problem()
        if problem:
            raise Incompatible(f"{problem} in KV layout {self.describe()}", cause="kv_layout")

    def _problem(self) -> str:
        if sorted(self.axes) != sorted(AXES) or self.axes[-2:] != ("slot", "dim"):
            return "axes must be block, layer, part, head in any order, then slot, dim"
        if self.dtype not in ITEMSIZES:
            return f"dtype must be one of {', '.join(ITEMSIZES)}"
        if min(self.num_blocks, self.block_size, self.num_layers, self.num_heads, *self.part_dims) < 1:
            return "a size is zero or negative"
        if self.layer_start < 0 or self.layer_start + self.num_layers > self.model_num_layers:
            return "layers outside of the model"
        if self.head_start < 0 or self.head_start + self.num_heads > self.model_num_kv_heads:
            return "heads outside of the model"
        if self.nbytes > MAX_BYTES:
            return f"{self.nbytes} bytes in one buffer"
        return ""

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZES[self.dtype]

    @property
    def num_parts(self) -> int:
        """Parts kept per layer and head."""
        return len(self.part_dims)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, parts and heads of this rank."""
        return self.num_layers * self.num_heads * self.block_size * sum(self.part_dims) * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.num_blocks * self.block_bytes

    @property
    def layers(self) -> range:
        """The model's layers held here."""
        return range(self.layer_start, self.layer_start + self.num_layers)

    @property
    def heads(self) -> range:
        """The model's KV heads held here."""
        return range(self.head_start, self.head_start + self.num_heads)

    def owns(self, layer: int, head: int) -> bool:
        """Whether this rank holds a KV head of a layer (both as the model numbers them)."""
        return layer in self.layers and head in self.heads

    def piece_bytes(self, part: int) -> int:
        """Bytes of one (block, layer, part, head): always contiguous."""
        return self.block_size * self.part_dims[part] * self.itemsize

    def stride(self, axis: str, part: int) -> int:
        """Bytes from one index of an axis ("block", "layer" or "head") to the next, within a part."""
        width = sum(self.part_dims) if "part" in self._within(axis) else self.part_dims[part]
        return self._count_within(axis) * width * self.itemsize

    def offset(self, block: int, layer: int, part: int, head: int) -> int:
        """Byte offset of a piece; layer and head as the model numbers them."""
        assert self.owns(layer, head) and 0 <= block < self.num_blocks and 0 <= part < self.num_parts
        return (
            block * self.stride("block", part)
            + (layer - self.layer_start) * self.stride("layer", part)
            + (head - self.head_start) * self.stride("head", part)
            + self._count_within("part") * sum(self.part_dims[:part]) * self.itemsize
        )

    def describe(self) -> str:
        """One line for error messages."""
        return (
            f"[{' '.join(self.axes)}] {self.dtype} blocks {self.num_blocks}x{self.block_size} slots, "
            f"layers {self.layer_start}..{self.layer_start + self.num_layers} of {self.model_num_layers}, "
            f"heads {self.head_start}..{self.head_start + self.num_heads} of {self.model_num_kv_heads}, "
            f"parts {'+'.join(map(str, self.part_dims))}"
        )

    def _within(self, axis: str) -> tuple[str, ...]:
        return self.axes[self.axes.index(axis) + 1 :]

    def _count_within(self, axis: str) -> int:
        """How many token slots, of one part, lie within one index of an axis."""
        sizes = {"block": self.num_blocks, "layer": self.num_layers, "head": self.num_heads, "slot": self.block_size}
        return prod(sizes[inner] for inner in self._within(axis) if inner in sizes)

    def shared(self) -> dict[str, object]:
        """What source and target must have in common, by name. The rest (block counts, layers, heads) is what resharding is for."""
        return {
            "axes": self.axes,
            "block_size": self.block_size,
            "part_dims": self.part_dims,
            "dtype": self.dtype,
            "model_num_layers": self.model_num_layers,
            "model_num_kv_heads": self.model_num_kv_heads,
        }


def check_compatible(sources: Sequence[KVLayout], target: KVLayout) -> None:
    """Raise Incompatible, naming both sides, unless `target` can be filled from `sources`."""
    if len(sources) > MAX_SOURCES:
        raise Incompatible(f"{len(sources)} source ranks; {MAX_SOURCES} are the most", cause="kv_layout")
    wanted = target.shared()
    for source in sources:
        differing = [name for name, value in source.shared().items() if value != wanted[name]]
        if differing:
            raise Incompatible(
                f"KV layouts differ in {', '.join(differing)}: source {source.describe()}; target {target.describe()}",
                cause="kv_layout",
            )
    missing = [(layer, head) for layer in target.layers for head in target.heads if not any(s.owns(layer, head) for s in sources)]
    if missing:
        described = "; ".join(source.describe() for source in sources[:4]) or "none"
        raise Incompatible(
            f"no source holds KV (layer, head) {missing[0]} and {len(missing) - 1} more: sources {described}; target {target.describe()}",
            cause="kv_layout",
        )
