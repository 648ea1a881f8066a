"""Where a rank stands in its node and which part of a model it holds. Pure arithmetic; knows no tensors and no process groups."""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one rank stands among the dp_size × tp_size ranks of its node.

    coupled: the whole node is one domain, as decode with experts needs it; otherwise every tensor-parallel group is one.
    Experts are shared out over the domain, everything else over the tensor-parallel group. split_experts: instead every rank of
    the tensor-parallel group holds a run of the columns of every expert; never together with coupled.
    """

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    coupled: bool = False
    split_experts: bool = False

    @classmethod
    def of(cls, rank: int, tp_size: int, dp_size: int = 1, coupled: bool = False, split_experts: bool = False) -> Placement:
        """The place of the node's rank number `rank`: tensor-parallel neighbours have consecutive numbers."""
        assert 0 <= rank < tp_size * dp_size, f"rank {rank} of {dp_size} x {tp_size}"
        assert not (coupled and split_experts), "split experts have no all-to-all"
        return cls(rank % tp_size, tp_size, rank // tp_size, dp_size, coupled, split_experts)

    @property
    def rank(self) -> int:
        """The number of this rank within its node."""
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def leader(self) -> bool:
        """Whether this rank decides for its tensor-parallel group."""
        return self.tp_rank == 0

    @property
    def domain_size(self) -> int:
        """How many ranks step together."""
        return self.tp_size * (self.dp_size if self.coupled else 1)

    @property
    def domain_rank(self) -> int:
        """The number of this rank among those that step together; 0 hosts the rendezvous."""
        return self.rank if self.coupled else self.tp_rank

    @property
    def domain(self) -> int:
        """The number of this rank's domain within its node."""
        return 0 if self.coupled else self.dp_rank

    def heads(self, num_heads: int) -> range:
        """The query heads of this rank. Raises ConfigError if they do not divide."""
        return _share(num_heads, self.tp_size, self.tp_rank, "num_attention_heads")

    def kv_heads(self, num_kv_heads: int) -> range:
        """The KV heads of this rank; with fewer heads than ranks, neighbours hold the same one. Raises ConfigError."""
        if num_kv_heads >= self.tp_size:
            return _share(num_kv_heads, self.tp_size, self.tp_rank, "num_key_value_heads")
        if self.tp_size % num_kv_heads:
            raise ConfigError(f"num_key_value_heads={num_kv_heads} neither divides by tp={self.tp_size} nor into it")
        head = self.tp_rank // (self.tp_size // num_kv_heads)
        return range(head, head + 1)

    def columns(self, width: int, what: str = "intermediate_size") -> range:
        """The columns of an MLP of this intermediate width. what: its name in config.json. Raises ConfigError if they do not divide."""
        return _share(width, self.tp_size, self.tp_rank, what)

    def vocab(self, size: int) -> range:
        """The vocabulary rows of this rank: equal runs, the last ones shorter (maybe empty) where the size does not divide."""
        rows = -(-size // self.tp_size)
        return range(min(size, self.tp_rank * rows), min(size, (self.tp_rank + 1) * rows))

    def experts(self, num_experts: int) -> range:
        """The experts of this rank: all of them if they are split. Raises ConfigError if they do not divide among the domain."""
        if self.split_experts:
            return range(num_experts)
        remedy = "dp * tp must divide it" if self.coupled else "choose a tp that divides it, or prefill.moe: tensor"
        return _share(num_experts, self.domain_size, self.domain_rank, "num_experts", remedy)

    def expert_columns(self, width: int) -> range:
        """The columns of each of its experts of this intermediate width: all unless experts are split. Raises ConfigError."""
        if not self.split_experts:
            return range(width)
        return _share(width, self.tp_size, self.tp_rank, "moe_intermediate_size", "choose a tp that divides it, or prefill.moe: experts")


def _share(total: int, parts: int, index: int, what: str, remedy: str = "") -> range:
    if total % parts:
        raise ConfigError(f"{what}={total} does not divide by {parts} ranks" + (f"; {remedy}" if remedy else ""))
    size = total // parts
    return range(index * size, (index + 1) * size)
