"""Where ranks go and what each may use, decided from plain values.

Knows: the configuration, what hosts offer, how large a checkpoint is, how a model is shared out. Does not know: Ray, sockets, the
machine it runs on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from baton.config import BatonConfig, RankPlan
from baton.engine.fits import Role, check_node, place
from baton.engine.kv_shape import KVShape
from baton.engine.spec import ModelSpec
from baton.errors import ConfigError
from ranks.capacity import capacity

RANK_RESOURCE = "baton_rank"
FRONT = "router"  # the names of the actors that are no ranks
SUPERVISOR = "supervisor"
# Measured on Linux with torch 2.13 and ray 2.60: 200 MiB of private memory per rank before any weight or KV block, and room for
# activations; 410 MiB for router, keeper and the seven processes of Ray.
RANK_PROCESS_BYTES = 320 * 2**20
SERVICE_PROCESSES_BYTES = 500 * 2**20


@dataclass(frozen=True, slots=True)
class NodeAsk:
    """One node's demand: `num_ranks` slots on one host that carries `labels`."""

    role: Role
    node: str
    num_ranks: int
    labels: Mapping[str, str] = field(default_factory=dict)

    def bundles(self) -> list[dict[str, float]]:
        """One placement bundle per rank, in rank order; to be packed strictly onto one host."""
        return [{RANK_RESOURCE: 1.0} for _ in range(self.num_ranks)]

    def label_selectors(self) -> list[dict[str, str]]:
        """What each bundle's host must carry, in rank order."""
        return [dict(self.labels) for _ in range(self.num_ranks)]


@dataclass(frozen=True, slots=True)
class Host:
    """What one host offers: compute cores, rank slots in all and not yet taken, and its labels.

    ledger: path of a file there that ranks of this cluster, and no others, may share; it goes with Ray's session. "": none.
    """

    address: str
    cores: int
    slots: int = 0
    free_slots: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    ledger: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How many parameters a checkpoint holds; of these, those of experts and those that no quantization touches: tables of the vocabulary
    and what latent attention folds into its queries.
    """

    num_params: int
    num_expert_params: int = 0
    num_unquantized_params: int = 0


def asks(config: BatonConfig) -> list[NodeAsk]:
    """The nodes of a cluster, prefill first; node and rank numbers count from 0."""
    prefill = [NodeAsk("prefill", f"prefill-{i}", config.prefill.tp, config.ray.prefill_label) for i in range(config.prefill.nodes)]
    num_ranks = config.decode.dp * config.decode.tp
    decode = [NodeAsk("decode", f"decode-{i}", num_ranks, config.ray.decode_label) for i in range(config.decode.nodes)]
    return [*prefill, *decode]


def threads_per_rank(cores: int, num_ranks: int) -> int:
    """Compute threads of one rank when `num_ranks` share the cores of a host."""
    return max(1, cores // num_ranks)


def rank_plans(config: BatonConfig, placed: Sequence[tuple[NodeAsk, Host]]) -> list[RankPlan]:
    """Every rank's plan, once each node has a host. Order: nodes as given, then rank. Their slots depend on the configuration only."""
    ranks_on = Counter[str]()
    for ask, host in placed:
        ranks_on[host.address] += ask.num_ranks
    wanted = asks(config)
    first_slots = dict(zip((ask.node for ask in wanted), accumulate((ask.num_ranks for ask in wanted), initial=0), strict=False))
    taken_on = Counter[str]()
    plans = []
    for ask, host in placed:
        threads = _asked_threads(config, ask.role) or threads_per_rank(host.cores, ranks_on[host.address])
        for rank in range(ask.num_ranks):
            plan = RankPlan(
                config=config,
                role=ask.role,
                node=ask.node,
                rank=rank,
                threads=threads,
                host=host.address,
                cores=host.cores,
                first_core=taken_on[host.address] % host.cores,
                slot=first_slots[ask.node] + rank,
                ledger=host.ledger if config.lend_cores else "",
            )
            taken_on[host.address] += threads
            plans.append(plan)
    return plans


def explain_shortage(ask: NodeAsk, hosts: Sequence[Host]) -> str:
    """Why `ask` finds no host, with the numbers, and what to do about it."""
    wanted = f"{ask.node} needs {ask.num_ranks} {RANK_RESOURCE} on one host"
    if ask.labels:
        wanted += " with labels " + ", ".join(f"{key}={value}" for key, value in ask.labels.items())
    fitting = [host for host in hosts if carries(host, ask.labels)]
    if not hosts:
        return f"{wanted}, and the Ray cluster has no live host"
    if not fitting:
        return f"{wanted}, and none of the {len(hosts)} hosts carries these labels; give them to `ray start --labels`"
    offers = "; ".join(f"{host.address}: {host.free_slots} free of {host.slots}" for host in fitting)
    if max(host.slots for host in fitting) < ask.num_ranks:
        return (
            f"{wanted} ({offers}); start Ray there with --resources='{{\"{RANK_RESOURCE}\": {ask.num_ranks}}}' or more, or lower tp or dp"
        )
    return f"{wanted} ({offers}); others hold them: add a host, or take another cluster down"


def can_ever_fit(ask: NodeAsk, hosts: Sequence[Host]) -> bool:
    """Whether some host could hold `ask` if nothing else ran there."""
    return any(host.slots >= ask.num_ranks and carries(host, ask.labels) for host in hosts)


def carries(host: Host, labels: Mapping[str, str]) -> bool:
    """Whether a host has all these labels with these values."""
    return all(host.labels.get(key) == value for key, value in labels.items())


def refuse_unfit(config: BatonConfig, spec: ModelSpec) -> None:
    """Raise ConfigError, with the numbers, if some rank could not have its share of the model or hold one longest sequence.

    The ranks find the same when they load; this says it before they exist.
    """
    check_node(spec, "prefill", config.prefill.tp, moe=config.prefill.moe)
    check_node(spec, "decode", config.decode.tp, config.decode.dp)
    longest_sequence(config, spec)


def longest_sequence(config: BatonConfig, spec: ModelSpec) -> int:
    """Prompt and answer together that every rank can hold, tokens. Raises ConfigError, with the numbers, if that is less than asked."""
    placements = place(spec, "prefill", 0, config.prefill.tp), place(spec, "decode", 0, config.decode.tp, config.decode.dp)
    found = [
        capacity(
            kv_memory=config.kv_memory,
            block_bytes=KVShape.of(spec, placement, config.block_size).block_bytes,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_positions=spec.max_position_embeddings,
        )
        for placement in placements
    ]
    return min(longest for _, longest in found)


def description(config: BatonConfig, spec: ModelSpec) -> str:
    """What a cluster runs, for people: model, arithmetic, layout, and the longest sequence with what limits it."""
    prefill, decode = config.prefill, config.decode
    longest = longest_sequence(config, spec)
    said = (
        f"{spec.model_type}, {spec.dtype}{', ' + spec.quantization if spec.quantization else ''}; "
        f"prefill {prefill.nodes} x tp {prefill.tp}, decode {decode.nodes} x dp {decode.dp} x tp {decode.tp}; "
        f"up to {longest} tokens per sequence"
    )
    if longest == spec.max_position_embeddings:
        return said
    why = "max_model_len" if config.max_model_len else f"kv_memory {gib(config.kv_memory)} per rank"
    return f"{said} ({why}; the model allows {spec.max_position_embeddings})"


def weight_bytes_per_rank(config: BatonConfig, checkpoint: Checkpoint, spec: ModelSpec, role: Role) -> int:
    """Estimate of one rank's weights: experts are cut over all ranks of a node, everything else over its tp ranks only.

    Quantized weights take a byte each. Left out as small: scales, and what every rank of a tp group holds whole.
    """
    tp = config.prefill.tp if role == "prefill" else config.decode.tp
    num_ranks = tp if role == "prefill" else config.decode.dp * config.decode.tp
    dense = checkpoint.num_params - checkpoint.num_expert_params - checkpoint.num_unquantized_params
    weight_bytes = 1 if spec.quantization else spec.dtype_bytes
    unquantized = spec.dtype_bytes * -(-checkpoint.num_unquantized_params // tp)
    return unquantized + weight_bytes * (-(-dense // tp) + -(-checkpoint.num_expert_params // num_ranks))


def memory_needed(config: BatonConfig, checkpoint: Checkpoint, spec: ModelSpec) -> int:
    """Bytes that a whole cluster on one host will hold: KV buffers, weights, and the processes themselves."""
    ranks = sum(ask.num_ranks * (config.kv_memory + weight_bytes_per_rank(config, checkpoint, spec, ask.role)) for ask in asks(config))
    return ranks + config.num_ranks * RANK_PROCESS_BYTES + SERVICE_PROCESSES_BYTES


def refuse_overcommit(config: BatonConfig, checkpoint: Checkpoint, spec: ModelSpec, available_bytes: int) -> None:
    """Raise ConfigError, with the numbers, if one host cannot hold the whole cluster."""
    need = memory_needed(config, checkpoint, spec)
    if need <= available_bytes:
        return
    weights = sum(ask.num_ranks * weight_bytes_per_rank(config, checkpoint, spec, ask.role) for ask in asks(config))
    raise ConfigError(
        f"this host has {gib(available_bytes)} of memory available and the cluster needs {gib(need)}: "
        f"{config.num_ranks} ranks x {gib(config.kv_memory)} KV cache, {gib(weights)} weights in all, "
        f"{gib(config.num_ranks * RANK_PROCESS_BYTES + SERVICE_PROCESSES_BYTES)} for the processes; lower kv_memory, tp, dp or nodes"
    )


def gib(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def _asked_threads(config: BatonConfig, role: Role) -> int:
    return config.prefill.threads if role == "prefill" else config.decode.threads
