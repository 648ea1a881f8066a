"""Routed experts in three ways of sharing the work, by what the ranks of a domain hold.

Where all of them hold the same tokens (prefill), every rank computes its share for all tokens and the sums are all-reduced: its
own experts whole, or its columns of every expert. Where data-parallel groups hold different tokens (decode), tokens travel to the
experts and back by all-to-all: a rank sends a token at most once to each other rank and gets back the weighted sum over the
experts there. Ranks without a token take part all the same. Experts that all tokens share are an MLP beside them, split over the
tensor-parallel group; where both are sums over the group they are reduced as one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from baton.engine.devices import Matrix
from baton.engine.layers import Mlp
from baton.engine.setting import Setting
from baton.engine.weights import Piece

_ALL = slice(None)


class Moe:
    """The experts of one layer: the router replicated, experts shared out as the placement says.

    float32_router: whether the router computes in float32 (DeepSeek) or in the model's dtype (Qwen3). Weights have the precision
    of the router's logits, as in transformers: they multiply an expert's output in float32, and the product is rounded once.
    """

    def __init__(self, setting: Setting, *, float32_router: bool = False) -> None:
        moe, placement, hidden = setting.spec.moe, setting.placement, setting.spec.hidden
        assert moe is not None
        self._setting, self._moe = setting, moe
        self._experts, self._columns = placement.experts(moe.num_experts), placement.expert_columns(moe.intermediate)
        self.router = setting.device.empty((moe.num_experts, hidden), "float32" if float32_router else setting.spec.dtype)
        self._router = Matrix(self.router)
        self.bias = setting.device.empty((moe.num_experts,), "float32") if moe.gate.biased else None
        self.gate_up = setting.matrix(len(self._experts), 2 * len(self._columns), hidden)
        self.down = setting.matrix(len(self._experts), hidden, len(self._columns))
        self._shared = Mlp(setting, moe.shared_intermediate) if moe.shared_intermediate else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H], equal on the ranks of a tensor-parallel group -> [T, H], likewise."""
        return self._dispatched(x) if self._setting.placement.coupled else self._reduced(x)

    def _reduced(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self._route(x)
        total = self._local(x, weights, ids - self._experts.start)
        if self._shared is not None:
            total += self._shared.partial(x)
        return self._setting.groups.all_reduce(total)

    def _dispatched(self, x: torch.Tensor) -> torch.Tensor:
        """Each rank of a tensor-parallel group speaks for an equal run of its tokens, the last ones maybe for fewer."""
        placement, groups = self._setting.placement, self._setting.groups
        run = -(-len(x) // placement.tp_size)
        mine = slice(placement.tp_rank * run, (placement.tp_rank + 1) * run)
        if self._shared is not None:
            total = self._shared.partial(x)
            total[mine] += self._exchanged(x[mine])
            return groups.all_reduce(total)
        done = x.new_zeros((run, x.shape[1]))
        done[: len(x[mine])] = self._exchanged(x[mine])
        return groups.all_gather(done).flatten(0, 1)[: len(x)]

    def _exchanged(self, x: torch.Tensor) -> torch.Tensor:
        """What the experts of all ranks make of this rank's tokens: x [n, H] -> [n, H]."""
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
        return torch.zeros_like(x).index_add_(0, tokens, groups.all_to_all(sums, receive, send))

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights [T, top_k] float32, with no more precision than the logits have, and ids [T, top_k]."""
        device = self._setting.device
        logits = device.linear(x.to(self.router.dtype), self._router)
        weights, ids = device.route(logits, self._moe.gate, self.bias)
        return weights.to(logits.dtype).float(), ids

    def _local(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self._setting.device.experts(x, weights, ids, self.gate_up, self.down)

    def prepare(self) -> None:
        """Once, after loading."""
        device = self._setting.device
        self._router = device.prepare(self._router)
        self.gate_up = device.prepare(self.gate_up, gated=True)
        self.down = device.prepare(self.down)
        if self._shared is not None:
            self._shared.prepare()

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.mlp: the router, and one tensor per expert and projection, as the hub has them."""
        yield Piece(f"{prefix}.gate.weight", tuple(self.router.shape), (_ALL, _ALL), self.router)
        if self.bias is not None:
            yield Piece(f"{prefix}.gate.e_score_correction_bias", (len(self.bias),), (_ALL,), self.bias)
        for expert in range(self._moe.num_experts):
            yield from self._expert_pieces(f"{prefix}.experts.{expert}", expert)
        if self._shared is not None:
            yield from self._shared.pieces(f"{prefix}.shared_experts")

    def _expert_pieces(self, name: str, expert: int) -> Iterator[Piece]:
        width, hidden = self._moe.intermediate, self._setting.spec.hidden
        columns = slice(self._columns.start, self._columns.stop)
        gate, up, down = self._expert(expert - self._experts.start) if expert in self._experts else self._nothing()
        yield Piece.of(f"{name}.gate_proj.weight", (width, hidden), (columns, _ALL), gate)
        yield Piece.of(f"{name}.up_proj.weight", (width, hidden), (columns, _ALL), up)
        yield Piece.of(f"{name}.down_proj.weight", (hidden, width), (_ALL, columns), down)

    def _expert(self, local: int) -> tuple[Matrix, Matrix, Matrix]:
        width = len(self._columns)
        return self.gate_up[local][:width], self.gate_up[local][width:], self.down[local]

    def _nothing(self) -> tuple[Matrix, Matrix, Matrix]:
        none = self.gate_up[:0]
        return none, none, none


def _pack(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One byte row per (token, rank): the token [H], then its weights [k] as float32, then expert ids [k] as int32."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in (x, weights, ids.to(torch.int32))], dim=1)


def _unpack(rows: torch.Tensor, like: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of _pack: x, weights, ids, where x has the width and dtype of `like`."""
    x, weights, ids = torch.split(rows, [like.shape[1] * like.element_size(), top_k * 4, top_k * 4], dim=1)
    return x.contiguous().view(like.dtype), weights.contiguous().view(torch.float32), ids.contiguous().view(torch.int32).long()
