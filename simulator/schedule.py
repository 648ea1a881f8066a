"""What happens in one simulated world: its nodes, requests and faults, all drawn from one seed. Pure: the same seed, the same schedule.

A schedule has a *season*, which says what is likely to go wrong. Times are seconds after the cluster has become ready.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from baton.config import BatonConfig, DecodeConfig, MembershipConfig, PrefillConfig, RouterConfig, TransferConfig
from simulator.engine import Cost
from simulator.link import Weather

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
LEAST_BLOCKS = 16  # one longest sequence
MOST_ASKS, MOST_CHOICES = 9, 3
REQUESTS_S = 1.0  # all requests come within
FAULTS_S = 1.5  # all faults begin within
FOR_EVER_S = 500.0  # until all requests have ended

Season = Literal["calm", "tight", "nodes", "links", "lossy", "router", "storm"]
SEASONS: dict[Season, int] = {"calm": 8, "tight": 17, "nodes": 25, "links": 20, "lossy": 14, "router": 8, "storm": 8}
Kind = Literal[
    "kill",  # SIGKILL of a group's process
    "vanish",  # the same, and nobody is told: its host is gone
    "stop",  # SIGSTOP, then SIGCONT
    "leave",  # an orderly end, as after SIGTERM
    "slow",  # steps and reads take longer
    "fail step",  # a step raises
    "no token",  # a step's logits are no numbers
    "stuck read",  # a read neither ends nor stops writing for a while
    "cut",  # a link breaks
    "silence",  # a link is half open
    "lossy",  # single messages are dropped, doubled, swapped
    "kill router",
    "stop router",
    "restart router",  # an orderly one
    "drain",  # by the operator, who restores the node later
    "retire",  # the same, and its processes end
    "flush",
]
KINDS: dict[Season, dict[Kind, int]] = {
    "calm": {"flush": 2, "drain": 2, "retire": 1},
    "tight": {"slow": 2, "flush": 1, "kill": 1, "stuck read": 1},
    "nodes": {
        "kill": 5,
        "vanish": 2,
        "stop": 4,
        "leave": 1,
        "slow": 2,
        "fail step": 2,
        "stuck read": 2,
        "no token": 1,
        "drain": 1,
        "retire": 1,
    },
    "links": {"cut": 5, "silence": 6, "stop": 1, "flush": 1},
    "lossy": {"lossy": 5, "cut": 1},
    "router": {"kill router": 3, "stop router": 3, "restart router": 2, "cut": 1, "kill": 1},
    "storm": {
        "kill": 4,
        "vanish": 1,
        "stop": 3,
        "slow": 1,
        "fail step": 1,
        "cut": 3,
        "silence": 3,
        "kill router": 1,
        "stop router": 1,
        "drain": 1,
    },
}
_NUM_FAULTS: dict[Season, tuple[int, int]] = {
    "calm": (0, 1),
    "tight": (0, 2),
    "nodes": (1, 4),
    "links": (1, 4),
    "lossy": (2, 4),
    "router": (1, 2),
    "storm": (4, 8),
}


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node. groups: data-parallel groups, 1 on prefill. num_blocks: of each group. shared: whether others map its memory."""

    name: str
    role: Literal["prefill", "decode"]
    groups: int
    num_blocks: int
    cost: Cost
    shared: bool

    def group_names(self) -> tuple[str, ...]:
        """As the router calls them."""
        return (self.name,) if self.role == "prefill" else tuple(f"{self.name}/{group}" for group in range(self.groups))


@dataclass(frozen=True, slots=True)
class Ask:
    """One client's request. stop_at: where in the expected text its stop string is, as a fraction; None for none.

    leaves_after, stalls_after: chunks after which the client cancels, or stops to read.
    """

    at_s: float
    prompt_ids: tuple[int, ...]
    max_tokens: int
    timeout_s: float
    greedy: bool = True
    seed: int = 0
    n: int = 1
    min_tokens: int = 0
    num_logprobs: int | None = None
    ignore_eos: bool = False
    stream: bool = True
    stop_at: float | None = None
    leaves_after: int | None = None
    stalls_after: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong. target: a group or node, as names; far: the other end of a link ("" for the router).

    there, back: the directions that fall silent. strength: how many times slower.
    """

    at_s: float
    kind: Kind
    target: str = ""
    far: str = ""
    lasts_s: float = 0.0
    strength: float = 1.0
    there: bool = True
    back: bool = True


@dataclass(frozen=True, slots=True)
class Schedule:
    """One world. rebuild_s: from a death to the node's next life."""

    seed: int
    season: Season
    config: BatonConfig
    weather: Weather
    nodes: tuple[NodePlan, ...]
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    detect_s: float
    rebuild_s: float

    @property
    def roomy(self) -> bool:
        """Whether no queue is so short that requests may be refused."""
        config = self.config
        return min(config.prefill.max_waiting, config.decode.max_waiting, config.router.max_queue) > 2 * MOST_ASKS * MOST_CHOICES

    @property
    def tokenless(self) -> bool:
        """Whether a request may end because no token could be drawn."""
        return any(fault.kind == "no token" for fault in self.faults)

    @property
    def lossy_pulls(self) -> bool:
        """Whether announcements may get lost, of which nobody asks what has become: streams of real networks break instead."""
        return any(fault.kind == "lossy" and fault.far for fault in self.faults)

    @property
    def lossy(self) -> bool:
        """Whether single messages may get lost: then a lost word may cost time until a deadline."""
        return any(fault.kind == "lossy" for fault in self.faults)


def schedule(seed: int) -> Schedule:
    """The schedule of a seed."""
    chance = random.Random(seed)
    season = chance.choices(list(SEASONS), list(SEASONS.values()))[0]
    tight = season == "tight" or chance.random() < 0.2
    nodes = _nodes(chance, tight)
    return Schedule(
        seed=seed,
        season=season,
        config=_config(chance, nodes, tight),
        weather=_weather(chance, season),
        nodes=nodes,
        asks=_asks(chance, tight),
        faults=_faults(chance, season, nodes),
        detect_s=chance.uniform(0.02, 1.0),
        rebuild_s=chance.uniform(0.3, 3.0),
    )


def _nodes(chance: random.Random, tight: bool) -> tuple[NodePlan, ...]:
    num_prefill = chance.choices((1, 2, 3), (5, 4, 1))[0]
    decode_groups = chance.choices(((1,), (1, 1), (2,), (2, 1), (1, 1, 1)), (5, 5, 3, 1, 1))[0]
    shared = chance.random() < 0.5
    prefill = [NodePlan(f"prefill-{i}", "prefill", 1, _num_blocks(chance, tight), _cost(chance), shared) for i in range(num_prefill)]
    decode = [
        NodePlan(f"decode-{i}", "decode", groups, _num_blocks(chance, tight), _cost(chance), shared)
        for i, groups in enumerate(decode_groups)
    ]
    return (*prefill, *decode)


def _num_blocks(chance: random.Random, tight: bool) -> int:
    return chance.randint(LEAST_BLOCKS, 22) if tight else chance.randint(28, 64)


def _cost(chance: random.Random) -> Cost:
    return Cost(step_s=chance.uniform(0.02, 0.1), token_s=chance.uniform(0, 0.002), block_s=chance.choice((0.0005, 0.004, 0.03)))


def _weather(chance: random.Random, season: Season) -> Weather:
    spiky = chance.random() < (0.5 if season == "links" else 0.1)
    return Weather(
        least_s=chance.choice((0.0001, 0.001, 0.01)),
        jitter_s=chance.choice((0.0005, 0.005, 0.05)),
        spike_odds=0.02 if spiky else 0.0,
        spike_s=chance.choice((0.1, 1.5)),
        window=chance.choice((2, 16, 64)),
        drop=chance.choice((0.0, 0.05, 0.2)),
        double=chance.choice((0.0, 0.05, 0.2)),
        swap=chance.choice((0.0, 0.05, 0.2)),
    )


def _config(chance: random.Random, nodes: tuple[NodePlan, ...], tight: bool) -> BatonConfig:
    few = chance.random() < (0.5 if tight else 0.1)
    return BatonConfig(
        model="simulated",
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        prefill=PrefillConfig(
            nodes=sum(node.role == "prefill" for node in nodes),
            max_step_tokens=chance.choice((16, 32, 256)),
            max_sequences=chance.choice((2, 4, 64)),
            max_waiting=chance.choice((0, 2)) if few else 64,
            max_unaccepted=chance.choice((0, 1, 4)),
        ),
        decode=DecodeConfig(
            nodes=sum(node.role == "decode" for node in nodes),
            dp=2,
            max_sequences=chance.choice((4, 64) if tight else (2, 4, 64)),
            max_waiting=chance.choice((0, 2)) if few else 64,
            reserve_output_tokens=chance.choice((1, 2) if tight else (1, 2, 4, 512)),
            overcommit="none" if chance.random() < 0.1 else "outputs",
            max_step_tokens=chance.choice((16, 64)),
        ),
        transfer=TransferConfig(handshake_s=5.0, lease_s=120.0, read_s=4.0),
        router=RouterConfig(
            max_running=chance.choice((2, 4)) if few else 64,
            max_queue=chance.choice((0, 2, 64)) if few else 64,
            slow_client_s=3.0,
            no_node_s=45.0,
            timeout_s=60.0,
        ),
        membership=MembershipConfig(stall_s=15.0),
    )


def _asks(chance: random.Random, tight: bool) -> tuple[Ask, ...]:
    prefixes = [_ids(chance, chance.randint(0, 24)) for _ in range(3)]
    within_s = REQUESTS_S * chance.choice((0.2, 1.0))
    count = chance.randint(5, MOST_ASKS) if tight else chance.randint(3, 7)
    return tuple(_ask(chance, prefixes, within_s, tight) for _ in range(count))


def _ids(chance: random.Random, count: int) -> tuple[int, ...]:
    return tuple(chance.randrange(32, 127) for _ in range(count))


def _ask(chance: random.Random, prefixes: list[tuple[int, ...]], within_s: float, tight: bool) -> Ask:
    max_tokens = chance.choice((1, 5, 9, 16) if tight else (1, 2, 3, 5, 8, 12))
    odd = chance.random()
    stop_at = chance.random() if chance.random() < 0.15 else None
    return Ask(
        at_s=chance.uniform(0, within_s),
        prompt_ids=chance.choice(prefixes) + _ids(chance, chance.randint(1, 14)),
        max_tokens=max_tokens,
        timeout_s=chance.choice((2.0, 10.0, 60.0, 60.0, 90.0)),
        greedy=chance.random() < 0.5,
        seed=chance.getrandbits(32),
        n=chance.randint(2, MOST_CHOICES) if odd < 0.08 else 1,
        min_tokens=min(2, max_tokens) if chance.random() < 0.2 and stop_at is None else 0,
        num_logprobs=chance.choice((0, 2)) if chance.random() < 0.3 else None,
        ignore_eos=chance.random() < 0.3,
        stream=chance.random() < 0.85,
        stop_at=stop_at,
        leaves_after=chance.randint(0, max_tokens) if 0.08 < odd < 0.2 else None,
        stalls_after=chance.randint(0, max_tokens) if 0.2 < odd < 0.25 else None,
    )


def _faults(chance: random.Random, season: Season, nodes: tuple[NodePlan, ...]) -> tuple[Fault, ...]:
    kinds = KINDS[season]
    drawn = chance.choices(list(kinds), list(kinds.values()), k=chance.randint(*_NUM_FAULTS[season]))
    faults = [_fault(chance, kind, nodes) for kind in drawn]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _fault(chance: random.Random, kind: Kind, nodes: tuple[NodePlan, ...]) -> Fault:
    node = chance.choice([node for node in nodes if node.role == "decode" or kind != "stuck read"])
    group = chance.choice(node.group_names())
    near, far = _ends(chance, nodes)
    on_link = kind in ("cut", "silence", "lossy")
    there, back = chance.choice(((True, True), (True, False), (False, True)))
    return Fault(
        at_s=chance.uniform(0, FAULTS_S),
        kind=kind,
        target=near if on_link else node.name if kind in ("drain", "retire", "flush") else group,
        far=far if on_link else "",
        lasts_s=_lasts_s(chance, kind),
        strength=chance.choice((5.0, 50.0, 400.0)),
        there=there,
        back=back,
    )


def _ends(chance: random.Random, nodes: tuple[NodePlan, ...]) -> tuple[str, str]:
    """The two ends of some link: a group and the router, or a decode group and a prefill node."""
    groups = {role: [name for node in nodes if node.role == role for name in node.group_names()] for role in ("prefill", "decode")}
    if chance.random() < 0.5:
        return chance.choice(groups["decode"]), chance.choice(groups["prefill"])
    return chance.choice(groups["decode"] + groups["prefill"]), ""


def _lasts_s(chance: random.Random, kind: Kind) -> float:
    if kind in ("stop", "silence"):
        return chance.choice((chance.uniform(0.2, 2.5), chance.uniform(3, 5.5), chance.uniform(7, 18), FOR_EVER_S))
    if kind == "stop router":
        return chance.choice((chance.uniform(0.2, 2.0), chance.uniform(2.5, 8.0)))
    return chance.uniform(1.0, 4.0)
