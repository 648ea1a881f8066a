"""Linear maps and tables sharded over a tensor-parallel group. Know the device seam and the collectives; know no model by name.

They hold the tensors of this rank and say in `pieces(prefix)` which slices of which checkpoint tensors fill them.
T: tokens of the step, H: hidden. Column-parallel maps split their outputs, row-parallel ones their inputs and add up
(Megatron-LM, https://arxiv.org/abs/1909.08053). Linear maps are quantized if the model is, tables never are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from baton.engine.devices import Matrix
from baton.engine.setting import Setting
from baton.engine.weights import Piece

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor's share in a fused column-parallel weight: `rows` of its `total` rows."""

    name: str
    rows: range
    total: int


def columns_of(heads: range, width: int) -> range:
    """The columns that these heads of this width occupy among all heads."""
    return range(heads.start * width, heads.stop * width)


class ColumnParallel:
    """x [T, in] -> [T, out of this rank]: several projections of the same input, fused.

    Ranks may hold the same rows of a part, or all of them: nothing is added up here.
    """

    def __init__(self, setting: Setting, in_width: int, parts: Sequence[Part], bias: bool) -> None:
        self._device = setting.device
        self._parts, self._in_width = tuple(parts), in_width
        width = sum(len(part.rows) for part in parts)
        self.weight = setting.matrix(width, in_width)
        self.bias = setting.empty(width) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._device.linear(x, self.weight, self.bias)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of a projection whose parts are a gate and as wide an up: x [T, in] -> [T, width of one]."""
        return self._device.gated_linear(x, self.weight, self.bias)

    def prepare(self, gated: bool = False) -> None:
        """Once, after loading. gated: for `gated` alone."""
        self.weight = self._device.prepare(self.weight, gated)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """`prefix`.part.weight and .bias, each row slice into its place."""
        at = 0
        for part in self._parts:
            target, rows = slice(at, at + len(part.rows)), slice(part.rows.start, part.rows.stop)
            at = target.stop
            name = f"{prefix}.{part.name}"
            yield Piece.of(f"{name}.weight", (part.total, self._in_width), (rows, _ALL), self.weight[target])
            if self.bias is not None:
                yield Piece(f"{name}.bias", (part.total,), (rows,), self.bias[target])


class RowParallel:
    """x [T, in of this rank] -> [T, out], summed over the group."""

    def __init__(self, setting: Setting, columns: range, in_width: int, out_width: int, bias: bool) -> None:
        self._device, self._groups = setting.device, setting.groups
        self._columns, self._in_width = columns, in_width
        self._out_width = out_width
        self.weight = setting.matrix(out_width, len(columns))
        self.bias = setting.empty(out_width) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._groups.all_reduce(self.partial(x))
        return out if self.bias is None else out + self.bias

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's summand, [T, out]; the sum over the group lacks the bias."""
        return self._device.linear(x, self.weight)

    def prepare(self) -> None:
        """Once, after loading."""
        self.weight = self._device.prepare(self.weight)

    def pieces(self, name: str) -> Iterator[Piece]:
        """`name`.weight, its columns; `name`.bias, all of it."""
        columns = slice(self._columns.start, self._columns.stop)
        yield Piece.of(f"{name}.weight", (self._out_width, self._in_width), (_ALL, columns), self.weight)
        if self.bias is not None:
            yield Piece(f"{name}.bias", tuple(self.bias.shape), (_ALL,), self.bias)


class Replicated:
    """x [T, in] -> [T, out]: every rank holds all of it. Several of them over one input are a ColumnParallel of whole parts."""

    def __init__(self, setting: Setting, in_width: int, out_width: int, bias: bool) -> None:
        self._device = setting.device
        self._shape = out_width, in_width
        self.weight = setting.matrix(out_width, in_width)
        self.bias = setting.empty(out_width) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._device.linear(x, self.weight, self.bias)

    def prepare(self) -> None:
        """Once, after loading."""
        self.weight = self._device.prepare(self.weight)

    def pieces(self, name: str) -> Iterator[Piece]:
        """`name`.weight and .bias, all of them."""
        yield Piece.of(f"{name}.weight", self._shape, (_ALL, _ALL), self.weight)
        if self.bias is not None:
            yield Piece(f"{name}.bias", (len(self.bias),), (_ALL,), self.bias)


class VocabParallel:
    """A [vocab, H] table by rows: the embedding, the head, or both when they are tied."""

    def __init__(self, setting: Setting) -> None:
        self._device, self._groups = setting.device, setting.groups
        self._leader = setting.placement.leader
        self._vocab = setting.spec.vocab
        self._rows = setting.placement.vocab(self._vocab)
        self.weight = setting.empty(-(-self._vocab // setting.placement.tp_size), setting.spec.hidden)
        self.weight[len(self._rows) :].zero_()  # rows beyond the vocabulary, where it does not divide; cut off again in `logits`
        self._matrix = Matrix(self.weight)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] -> [T, H] on every rank."""
        mine = self.weight[: len(self._rows)]
        return self._groups.all_reduce(self._device.embed(ids, mine, self._rows.start))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [N, H] -> [N, vocab] in its dtype on the leader of the group, None on the others. Rows may lie apart."""
        shards = self._groups.all_gather(self._device.linear(hidden, self._matrix))
        if not self._leader:
            return None
        return shards.transpose(0, 1).reshape(len(hidden), -1)[:, : self._vocab]

    def prepare(self, looked_up: bool) -> None:
        """Of a head: once, after loading. looked_up: it is the embedding as well; otherwise the plain table is given up."""
        self._matrix = self._device.prepare(self._matrix)
        if not looked_up:
            self.weight = self.weight.new_empty((0, self.weight.shape[1]))

    def pieces(self, name: str) -> Iterator[Piece]:
        """`name`.weight, its rows."""
        rows = slice(self._rows.start, self._rows.stop)
        yield Piece(f"{name}.weight", (self._vocab, self.weight.shape[1]), (rows, _ALL), self.weight[: len(self._rows)])
