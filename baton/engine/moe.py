"""Routed experts in two ways of sharing the work, by what the ranks of a domain hold.

Where all of them hold the same tokens (prefill), every rank computes its own experts for all tokens and the sums are all-reduced.
Where data-parallel groups hold different tokens (decode), tokens travel to the experts and back by all-to-all: a rank sends a
token at most once to each other rank and gets back the weighted sum over the experts there. Ranks without a token take part all
the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from baton.engine.devices import Matrix
from baton.engine.setting import Setting
from baton.engine.weights import Piece

_ALL = slice(None)


class Moe:
    """The experts of one layer: the router replicated, experts split over the domain."""

    def __init__(self, setting: Setting) -> None:
        moe = setting.spec.moe
        assert moe is not None
        self._setting, self._moe = setting, moe
        self._experts = setting.placement.experts(moe.num_experts)
        self.router = setting.empty(moe.num_experts, setting.spec.hidden)
        self.gate_up = setting.matrix(len(self._experts), 2 * moe.intermediate, setting.spec.hidden)
        self.down = setting.matrix(len(self._experts), setting.spec.hidden, moe.intermediate)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H], equal on the ranks of a tensor-parallel group -> [T, H], likewise."""
        return self._dispatched(x) if self._setting.placement.coupled else self._gathered(x)

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self._route(x)
        return self._setting.groups.all_reduce(self._local(x, weights, ids - self._experts.start))

    def _dispatched(self, x: torch.Tensor) -> torch.Tensor:
        """Each rank of a tensor-parallel group speaks for an equal run of its tokens, the last ones maybe for fewer."""
        placement = self._setting.placement
        run = -(-len(x) // placement.tp_size)
        mine = x[placement.tp_rank * run : (placement.tp_rank + 1) * run]
        done = x.new_zeros((run, x.shape[1]))
        self._exchange(mine, done[: len(mine)])
        return self._setting.groups.all_gather(done).flatten(0, 1)[: len(x)]

    def _exchange(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add to out [n, H] what the experts of all ranks make of x [n, H]."""
        groups, placement = self._setting.groups, self._setting.placement
        weights, ids = self._route(x)
        per_rank = len(self._experts)
        wanted = torch.zeros((placement.domain_size, len(x)), dtype=torch.bool, device=x.device)
        wanted.t().scatter_(1, ids // per_rank, True)
        ranks, tokens = wanted.nonzero().unbind(1)
        send = wanted.sum(1).tolist()
        receive = groups.exchange_counts(send)
        rows = _pack(x[tokens], weights[tokens], ids[tokens] - ranks[:, None] * per_rank)
        sums = self._local(*_unpack(groups.all_to_all(rows, send, receive), x, self._moe.gate.top_k))
        out.index_add_(0, tokens, groups.all_to_all(sums, receive, send))

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._setting.device
        weights, ids = device.route(device.linear(x, Matrix(self.router)), self._moe.gate)
        return weights.to(x.dtype), ids

    def _local(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self._setting.device.experts(x, weights, ids, self.gate_up, self.down)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.mlp: the router, and one tensor per expert and projection, as the hub has them."""
        yield Piece(f"{prefix}.gate.weight", tuple(self.router.shape), (_ALL, _ALL), self.router)
        width, hidden = self._moe.intermediate, self._setting.spec.hidden
        for expert in range(self._moe.num_experts):
            name = f"{prefix}.experts.{expert}"
            gate, up, down = self._expert(expert - self._experts.start) if expert in self._experts else self._nothing()
            yield Piece.of(f"{name}.gate_proj.weight", (width, hidden), (_ALL, _ALL), gate)
            yield Piece.of(f"{name}.up_proj.weight", (width, hidden), (_ALL, _ALL), up)
            yield Piece.of(f"{name}.down_proj.weight", (hidden, width), (_ALL, _ALL), down)

    def _expert(self, local: int) -> tuple[Matrix, Matrix, Matrix]:
        width = self._moe.intermediate
        return self.gate_up[local][:width], self.gate_up[local][width:], self.down[local]

    def _nothing(self) -> tuple[Matrix, Matrix, Matrix]:
        none = self.gate_up[:0]
        return none, none, none


def _pack(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One byte row per (token, rank): the token [H], then its weights [k] in the same dtype, then expert ids [k] as int32."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in (x, weights, ids.to(torch.int32))], dim=1)


def _unpack(rows: torch.Tensor, like: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of _pack: x, weights, ids, where x has the width and dtype of `like`."""
    size = like.element_size()
    x, weights, ids = torch.split(rows, [like.shape[1] * size, top_k * size, top_k * 4], dim=1)
    return x.contiguous().view(like.dtype), weights.contiguous().view(like.dtype), ids.contiguous().view(torch.int32).long()
