"""How the ranks of one node speak to each other while they step. Knows no models and no requests.

`Groups` holds the process groups: one per domain (the ranks that step together), and one per tensor-parallel group where that is
smaller. They are made in this order on every rank, and used from the step thread only.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from baton.engine.batch import Int64
from baton.engine.devices import Collectives, Work, open_device
from baton.engine.placement import Placement
from baton.errors import NodeLost

_HEAD_WORDS = 512  # what the first message of a broadcast carries; most batches fit, and need no second one


class Rendezvous:
    """Where the ranks of a domain find each other: a key-value server in the process of domain rank 0, bound to `host` alone.

    Ended by `close`, after all ranks have closed their groups; if that process dies, connecting ranks time out.
    """

    def __init__(self, host: str, timeout_s: float) -> None:
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.host = host
        self.port: int = listener.getsockname()[1]
        self.store: Store | None = TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def close(self) -> None:
        """Stop serving."""
        self.store = None


class Groups:
    """The collectives of one rank. Blocking, for the step thread; every wait ends within the timeout given at connect.

    After an error, and after `close`, the groups are unusable and every method raises NodeLost: the node is rebuilt.
    """

    def __init__(self, placement: Placement, domain: Collectives | None, tp: Collectives | None) -> None:
        self._placement = placement
        self._members = domain, tp
        self._closed = False

    @classmethod
    def alone(cls) -> Groups:
        """The groups of a domain of one rank: nothing to connect."""
        return cls(Placement(), None, None)

    @classmethod
    def connect(
        cls, placement: Placement, host: str, port: int, timeout_s: float, *, bind: str = "127.0.0.1", device: str = "cpu"
    ) -> Groups:
        """Meet the other ranks of the domain at the Rendezvous on host:port; all must call this within timeout_s.

        Groups are made in one order on every rank: the domain's, then the tensor-parallel group's unless it is the same.
        bind: this rank's own address, for the connections between ranks; no environment variable (GLOO_SOCKET_IFNAME) is read.
        timeout_s also bounds every later collective. Raises NodeLost when a rank is missing.
        """
        if placement.domain_size == 1:
            return cls(placement, None, None)
        connect = open_device(device).collectives
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
            domain = connect(PrefixStore(f"domain{placement.domain}", store), placement.domain_rank, placement.domain_size, bind, timeout_s)
            if placement.tp_size in (1, placement.domain_size):
                return cls(placement, domain, domain if placement.tp_size > 1 else None)
            tp = connect(PrefixStore(f"tp{placement.dp_rank}", store), placement.tp_rank, placement.tp_size, bind, timeout_s)
        except RuntimeError as error:  # torch's DistError among them
            raise NodeLost(f"rank {placement.rank} met not all of its {placement.domain_size} ranks at {host}:{port}: {error}") from error
        return cls(placement, domain, tp)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the tensor-parallel group, in place and equal on all its ranks, bit for bit."""
        tp = self._tp
        if tp is not None and x.numel():
            self._run(tp, "all-reduce", lambda group: group.allreduce([x]))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] on every rank of the tensor-parallel group -> [tp_size, n, ...]."""
        tp = self._tp
        if tp is None:
            return x.unsqueeze(0)
        gathered = x.new_empty((self._placement.tp_size, *x.shape))
        if x.numel():
            source = x.contiguous().view(torch.uint8)
            self._run(tp, "all-gather", lambda group: group.allgather([list(gathered.view(torch.uint8).unbind(0))], [source]))
        return gathered

    def broadcast(self, vector: Int64 | None) -> Int64:
        """The tensor-parallel leader's vector on every rank of its group; followers pass None.

        A first message carries the length and as much as fits, a second one the rest, if any.
        """
        tp = self._tp
        if tp is None:
            assert vector is not None
            return vector
        head = torch.zeros(_HEAD_WORDS, dtype=torch.int64)
        if vector is not None:
            head[0] = len(vector)
            head[1 : len(vector) + 1] = torch.from_numpy(vector[: _HEAD_WORDS - 1])
        self._run(tp, "broadcast", lambda group: group.broadcast(head, 0))
        return self._broadcast_rest(tp, head, vector)

    def _broadcast_rest(self, tp: Collectives, head: torch.Tensor, vector: Int64 | None) -> Int64:
        length = int(head[0])
        first = head[1 : min(length + 1, _HEAD_WORDS)].numpy()
        if length < _HEAD_WORDS:
            return first
        rest = torch.empty(length + 1 - _HEAD_WORDS, dtype=torch.int64)
        if vector is not None:
            rest.copy_(torch.from_numpy(vector[_HEAD_WORDS - 1 :]))
        self._run(tp, "broadcast", lambda group: group.broadcast(rest, 0))
        return np.concatenate([first, rest.numpy()])

    def exchange_sizes(self, size: int) -> list[int]:
        """Every domain rank's size, by domain rank."""
        domain = self._domain
        if domain is None:
            return [size]
        sizes = torch.empty(self._placement.domain_size, dtype=torch.int64)
        mine = torch.tensor([size], dtype=torch.int64)
        self._run(domain, "size exchange", lambda group: group.allgather([list(sizes.unsqueeze(1).unbind(0))], [mine]))
        return [int(value) for value in sizes]

    def exchange_counts(self, send: Sequence[int]) -> list[int]:
        """send[i] rows will go to domain rank i; the answer says how many come from each."""
        domain = self._domain
        if domain is None:
            return list(send)
        ones = [1] * self._placement.domain_size
        received = torch.empty(len(ones), dtype=torch.int64)
        self._run(domain, "count exchange", lambda group: group.alltoall_base(received, torch.tensor(send, dtype=torch.int64), ones, ones))
        return [int(value) for value in received]

    def all_to_all(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Send rows [sum(send), width] in runs, one to each domain rank; returns [sum(receive), width], in order of rank."""
        domain = self._domain
        if domain is None:
            return rows
        received = rows.new_empty((sum(receive), rows.shape[1]))
        raw = [received.view(torch.uint8), rows.contiguous().view(torch.uint8)]
        self._run(domain, "all-to-all", lambda group: group.alltoall_base(raw[0], raw[1], list(receive), list(send)))
        return received

    def close(self) -> None:
        """Leave: peers in a collective get an error. From any thread; a collective under way here ends by itself, in time."""
        if not self._closed:
            self._closed = True
            for group in {id(group): group for group in self._members if group is not None}.values():
                group.shutdown()
            self._members = None, None

    @property
    def _domain(self) -> Collectives | None:
        self._check_open()
        return self._members[0]

    @property
    def _tp(self) -> Collectives | None:
        self._check_open()
        return self._members[1]

    def _check_open(self) -> None:
        if self._closed:
            raise NodeLost(f"the groups of rank {self._placement.rank} are closed")

    def _run(self, group: Collectives, what: str, start: Callable[[Collectives], Work]) -> None:
        """Holds `group` until the collective has ended: gloo's destructor waits for it, and must not do so in `close`."""
        try:
            start(group).wait()
        except RuntimeError as error:
            raise NodeLost(f"{what} of rank {self._placement.rank} failed, its group is lost: {error}") from error
