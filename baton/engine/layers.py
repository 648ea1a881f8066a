"""The layers of a decoder, sharded over a tensor-parallel group. Knows the device seam and the collectives; knows no model by name.

Layers hold the tensors of this rank and say in `pieces(prefix)` which slices of which checkpoint tensors fill them.
T: tokens of the step, H: hidden, D: head_dim. Column-parallel layers split their outputs, row-parallel ones their inputs and add up
(Megatron-LM, https://arxiv.org/abs/1909.08053).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.engine.devices import BlockAttention, Device, LayerCache
from baton.engine.parallel import Groups, Placement
from baton.engine.spec import Llama3Scaling, ModelSpec, RopeSpec
from baton.engine.weights import Piece

_ALL = slice(None)


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What every layer of a rank is built with."""

    spec: ModelSpec
    placement: Placement
    groups: Groups
    device: Device

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory for a parameter, in the model's dtype."""
        return self.device.empty(shape, self.spec.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What the layers share during one forward. token_ids: [T] int64; cos, sin: [T, 1, D / 2]; caches: one per layer."""

    token_ids: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    attention: BlockAttention
    caches: Sequence[LayerCache]


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor's share in a fused column-parallel weight: `rows` of its `total` rows."""

    name: str
    rows: range
    total: int


class ColumnParallel:
    """x [T, in] -> [T, out of this rank]: several projections of the same input, fused."""

    def __init__(self, setting: Setting, in_width: int, parts: Sequence[Part], bias: bool) -> None:
        self._device = setting.device
        self._parts = tuple(parts)
        self.weight = setting.empty(sum(len(part.rows) for part in parts), in_width)
        self.bias = setting.empty(len(self.weight)) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._device.linear(x, self.weight, self.bias)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """`prefix`.part.weight and .bias, each row slice into its place."""
        at = 0
        for part in self._parts:
            target, rows = slice(at, at + len(part.rows)), slice(part.rows.start, part.rows.stop)
            at = target.stop
            name = f"{prefix}.{part.name}"
            yield Piece(f"{name}.weight", (part.total, self.weight.shape[1]), (rows, _ALL), self.weight[target])
            if self.bias is not None:
                yield Piece(f"{name}.bias", (part.total,), (rows,), self.bias[target])


class RowParallel:
    """x [T, in of this rank] -> [T, out], summed over the group."""

    def __init__(self, setting: Setting, columns: range, in_width: int, out_width: int, bias: bool) -> None:
        self._device, self._groups = setting.device, setting.groups
        self._columns, self._in_width = columns, in_width
        self.weight = setting.empty(out_width, len(columns))
        self.bias = setting.empty(out_width) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._groups.all_reduce(self._device.linear(x, self.weight))
        return out if self.bias is None else out + self.bias

    def pieces(self, name: str) -> Iterator[Piece]:
        """`name`.weight, its columns; `name`.bias, all of it."""
        columns = slice(self._columns.start, self._columns.stop)
        yield Piece(f"{name}.weight", (len(self.weight), self._in_width), (_ALL, columns), self.weight)
        if self.bias is not None:
            yield Piece(f"{name}.bias", tuple(self.bias.shape), (_ALL,), self.bias)


class RMSNorm:
    """Root-mean-square norm over the last axis, replicated."""

    def __init__(self, setting: Setting, width: int) -> None:
        self._device, self._eps = setting.device, setting.spec.norm_eps
        self.weight = setting.empty(width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._device.rms_norm(x, self.weight, self._eps)

    def pieces(self, name: str) -> Iterator[Piece]:
        """`name`.weight, all of it."""
        yield Piece(f"{name}.weight", tuple(self.weight.shape), (_ALL,), self.weight)


class VocabParallel:
    """A [vocab, H] table by rows: the embedding, the head, or both when they are tied."""

    def __init__(self, setting: Setting) -> None:
        self._device, self._groups = setting.device, setting.groups
        self._leader = setting.placement.leader
        self._vocab = setting.spec.vocab
        self._rows = setting.placement.vocab(self._vocab)
        self.weight = setting.empty(-(-self._vocab // setting.placement.tp_size), setting.spec.hidden)
        self.weight[len(self._rows) :].zero_()  # rows beyond the vocabulary, where it does not divide; cut off again in `logits`

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] -> [T, H] on every rank."""
        mine = self.weight[: len(self._rows)]
        return self._groups.all_reduce(self._device.embed(ids, mine, self._rows.start))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [N, H] -> [N, vocab] float32 on the leader of the group, None on the others."""
        shards = self._groups.all_gather(self._device.linear(hidden, self.weight))
        if not self._leader:
            return None
        return shards.transpose(0, 1).reshape(len(hidden), -1)[:, : self._vocab].float()

    def pieces(self, name: str) -> Iterator[Piece]:
        """`name`.weight, its rows."""
        rows = slice(self._rows.start, self._rows.stop)
        yield Piece(f"{name}.weight", (self._vocab, self.weight.shape[1]), (rows, _ALL), self.weight[: len(self._rows)])


class Rotary:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864): angles of positions, computed once per step."""

    def __init__(self, setting: Setting) -> None:
        dim = setting.spec.head_dim
        self._dtype = setting.empty(0).dtype
        self._frequencies = rotary_frequencies(setting.spec.rope, dim)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] -> cos, sin, each [T, 1, D / 2] in the model's dtype; angles are float32."""
        angles = positions[:, None, None].float() * self._frequencies.to(positions.device)
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)


def rotary_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2], float32 on the host."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    return plain if rope.scaling is None else _llama3(plain, rope.scaling)


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated (transformers, modeling_rope_utils)."""
    wave_lens = 2 * math.pi / plain
    longest_kept = scaling.original_positions / scaling.high_freq_factor
    shortest_slowed = scaling.original_positions / scaling.low_freq_factor
    slowed = plain / scaling.factor
    smooth = (scaling.original_positions / wave_lens - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * slowed + smooth * plain
    kept_or_slowed = torch.where(wave_lens > shortest_slowed, slowed, plain)
    return torch.where((wave_lens >= longest_kept) & (wave_lens <= shortest_slowed), between, kept_or_slowed)


class Attention:
    """Grouped-query attention over blocks, heads split over the group."""

    def __init__(self, setting: Setting) -> None:
        spec, placement, self._device = setting.spec, setting.placement, setting.device
        heads, kv_heads = placement.heads(spec.heads), placement.kv_heads(spec.kv_heads)
        self._dim, self._num_heads, self._num_kv_heads = spec.head_dim, len(heads), len(kv_heads)
        columns, kv_columns = _scaled(heads, spec.head_dim), _scaled(kv_heads, spec.head_dim)
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [Part("q_proj", columns, width), Part("k_proj", kv_columns, kv_width), Part("v_proj", kv_columns, kv_width)]
        self._qkv = ColumnParallel(setting, spec.hidden, parts, spec.qkv_bias)
        self._out = RowParallel(setting, columns, width, spec.hidden, spec.output_bias)
        self._norms = (RMSNorm(setting, spec.head_dim), RMSNorm(setting, spec.head_dim)) if spec.qk_norm else None

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """x [T, H] -> [T, H]; writes the step's keys and values into the cache first."""
        heads = self._qkv(x).view(len(x), self._num_heads + 2 * self._num_kv_heads, self._dim)
        queries, keys, values = torch.split(heads, [self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        if self._norms is not None:
            queries, keys = self._norms[0](queries), self._norms[1](keys)
        queries, keys = (self._device.rotate(part, step.cos, step.sin) for part in (queries, keys))
        step.attention.write(keys, values, cache)
        return self._out(step.attention.attend(queries, cache))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.self_attn."""
        yield from self._qkv.pieces(prefix)
        yield from self._out.pieces(f"{prefix}.o_proj")
        if self._norms is not None:
            yield from self._norms[0].pieces(f"{prefix}.q_norm")
            yield from self._norms[1].pieces(f"{prefix}.k_norm")


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


class Mlp:
    """The gated MLP of a dense layer."""

    def __init__(self, setting: Setting) -> None:
        spec, self._device = setting.spec, setting.device
        columns = setting.placement.columns(spec.intermediate)
        parts = [Part(name, columns, spec.intermediate) for name in ("gate_proj", "up_proj")]
        self._gate_up = ColumnParallel(setting, spec.hidden, parts, spec.mlp_bias)
        self._down = RowParallel(setting, columns, spec.intermediate, spec.hidden, spec.mlp_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        return self._down(self._device.silu_mul(self._gate_up(x)))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.mlp."""
        yield from self._gate_up.pieces(prefix)
        yield from self._down.pieces(f"{prefix}.down_proj")


class FeedForward(Protocol):
    """The second half of a block: dense or routed."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        ...

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """What fills it."""
        ...


class Block:
    """One pre-norm decoder layer."""

    def __init__(self, setting: Setting, feed_forward: FeedForward) -> None:
        self._attention, self._feed_forward = Attention(setting), feed_forward
        self._before, self._between = RMSNorm(setting, setting.spec.hidden), RMSNorm(setting, setting.spec.hidden)

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        x = x + self._attention(self._before(x), step, cache)
        return x + self._feed_forward(self._between(x))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything of the layer `prefix`."""
        yield from self._before.pieces(f"{prefix}.input_layernorm")
        yield from self._attention.pieces(f"{prefix}.self_attn")
        yield from self._between.pieces(f"{prefix}.post_attention_layernorm")
        yield from self._feed_forward.pieces(f"{prefix}.mlp")


class Decoder:
    """A stack of blocks between an embedding and a head: every model that Baton knows so far."""

    def __init__(self, setting: Setting, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)
        self._embedding = VocabParallel(setting)
        self._head = self._embedding if setting.spec.tie_embeddings else VocabParallel(setting)
        self._norm = RMSNorm(setting, setting.spec.hidden)

    def __call__(self, step: Step) -> torch.Tensor:
        """The last hidden states [T, H], before the final norm. A rank with T = 0 takes part in the collectives of its domain."""
        x = self._embedding.embed(step.token_ids)
        for block, cache in zip(self._blocks, step.caches, strict=True):
            x = block(x, step, cache)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [N, H] -> [N, vocab] float32 on the leader, None on the others."""
        return self._head.logits(self._norm(hidden))

    def pieces(self) -> Iterator[Piece]:
        """What fills the model, under the names that transformers gives."""
        yield from self._embedding.pieces("model.embed_tokens")
        for layer, block in enumerate(self._blocks):
            yield from block.pieces(f"model.layers.{layer}")
        yield from self._norm.pieces("model.norm")
        if self._head is not self._embedding:
            yield from self._head.pieces("lm_head")

    def spare(self) -> tuple[str, ...]:
        """Checkpoint tensors that may be there and are not needed."""
        return ("lm_head.weight",) if self._head is self._embedding else ()
