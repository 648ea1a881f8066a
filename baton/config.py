"""What the operator asked: one YAML file, read once, frozen. What the machine found is never written back here.

Every field states its unit, meaning and default. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import reprlib
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from baton.errors import ConfigError

PROTOCOL_VERSION = 4
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_MAX_SIZE_CHARS = 40
_MAX_EXPLAINED = 20
_MAX_NAME_CHARS = 200


def parse_bytes(size: object) -> int:
    """Bytes from 268435456, "256MiB", "1.5 GB" …; ValueError for anything else."""
    if isinstance(size, int):
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) and len(size) < _MAX_SIZE_CHARS else None
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(f"{_shown(size)} is not a size; write a number of bytes or, say, 512MiB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["auto", "none", "w8a8"]


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys and numbers that are not finite refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PrefillConfig(Section):
    """Prefill nodes: each is one tensor-parallel group that runs prompts."""

    nodes: int = Field(1, ge=1, description="number of prefill nodes (model replicas)")
    tp: int = Field(1, ge=1, description="tensor-parallel ranks per node")
    moe: Literal["experts", "tensor"] = Field(
        "experts", description="how tp ranks share experts: experts (each holds some of them whole) or tensor (each holds a slice of all)"
    )
    max_step_tokens: int = Field(256, ge=16, description="tokens computed in one step: the size of a prompt's chunks")
    max_sequences: int = Field(64, ge=1, description="prompts computed at the same time")
    max_waiting: int = Field(1024, ge=0, description="prompts that may wait on one node; more are refused")
    max_unaccepted: int = Field(4, ge=0, description="prompts that may start before a decode group has reserved room for them")
    threads: int = Field(0, ge=0, description="cores that a rank has for itself; 0: those of the host divided among its ranks")


class DecodeConfig(Section):
    """Decode nodes: each has dp groups of tp ranks; experts are sharded over all ranks of the node."""

    nodes: int = Field(1, ge=1, description="number of decode nodes (model replicas)")
    dp: int = Field(1, ge=1, description="data-parallel groups per node, each with its own sequences and block pool")
    tp: int = Field(1, ge=1, description="tensor-parallel ranks per group")
    max_sequences: int = Field(256, ge=1, description="sequences in one group's batch")
    max_waiting: int = Field(1024, ge=0, description="sequences that may wait for blocks in one group; more are refused")
    reserve_output_tokens: int = Field(512, ge=1, description="output tokens for which blocks are reserved before a sequence starts")
    overcommit: Literal["outputs", "none"] = Field(
        "outputs",
        description="outputs: a sequence that outgrows its reservation on a full pool is suspended and resumed; none: reserve max_tokens",
    )
    max_step_tokens: int = Field(
        512,
        ge=16,
        description="prompt tokens computed in one step, when a decode node has to compute prompts itself because no prefill node is left",
    )
    mixed_step_tokens: int = Field(
        40,
        ge=1,
        description="prompt tokens computed in one step beside running sequences, whose next tokens wait for them; if more sequences run, "
        "as many as these",
    )
    max_prompt_tokens: int = Field(
        512,
        ge=0,
        description="longest prompt that a decode node may compute itself while prefill nodes are behind, where the router reckons that "
        "this saves more waiting than it costs; 0: never (it still does when no prefill node is left)",
    )
    threads: int = Field(0, ge=0, description="cores that a rank has for itself; 0: those of the host divided among its ranks")


class TransferConfig(Section):
    """How KV blocks travel from prefill to decode."""

    transport: Literal["auto", "shm", "tcp"] = Field(
        "auto", description="auto: shared memory where both are proven to be on one host, else tcp"
    )
    handshake_s: float = Field(5.0, gt=0, description="seconds within which a peer must answer a Pull, even if only 'queued'")
    lease_s: float = Field(60.0, gt=0, description="seconds after the last announcement or read when an unread lease expires")
    read_s: float = Field(30.0, gt=0, description="seconds that one read (at most 256 MiB per rank) may take")


class RouterConfig(Section):
    """The front door: gRPC and HTTP."""

    host: str = Field("127.0.0.1", description="address to listen on; anything but loopback needs `insecure: true` until TLS is set up")
    http_port: int = Field(8000, ge=0, le=65535, description="port of the HTTP interfaces; 0: any free one")
    grpc_port: int = Field(8001, ge=0, le=65535, description="port of baton.v1.Inference; 0: any free one")
    max_running: int = Field(1024, ge=1, description="requests that run at the same time; more wait")
    max_queue: int = Field(4096, ge=0, description="requests that may wait in the router; more are refused with 429")
    timeout_s: float = Field(600.0, gt=0, description="deadline of a request whose client set none, seconds")
    max_timeout_s: float = Field(3600.0, gt=0, description="longest deadline a client may set, seconds")
    max_body_bytes: Bytes = Field(8 * 2**20, description="largest HTTP body or gRPC message accepted")
    max_n: int = Field(128, ge=1, description="most sequences (n) of one request")
    slow_client_s: float = Field(60.0, gt=0, description="seconds a client may leave its stream unread, then it is cancelled")
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="a client must present one of these (Authorization: Bearer …); empty: none"
    )
    no_node_s: float = Field(
        60.0, ge=0, description="seconds that a new request waits while no pair of nodes can serve (one is being rebuilt), then 503"
    )
    drain_s: float = Field(25.0, ge=0, description="seconds that running requests get to finish after SIGTERM; Ctrl-C gives none")
    max_stop_strings: int = Field(16, ge=1, description="most stop strings of one request")
    max_stop_chars: int = Field(1024, ge=1, description="longest stop string, characters")
    insecure: bool = Field(False, description="allow a non-loopback bind without TLS and token")


class MembershipConfig(Section):
    """Who counts as alive. Every process beats; a node is judged by its silence, a router by its nodes in the same way."""

    beat_s: float = Field(1.0, gt=0, description="seconds between heartbeats")
    suspect_beats: int = Field(3, ge=1, description="missed beats after which a node gets no new work")
    dead_beats: int = Field(6, ge=2, description="missed beats after which a node is dead: its sequences go on elsewhere, it is rebuilt")
    router_gone_s: float = Field(3.0, gt=0, description="seconds of a router's silence after which nodes end its sequences and leases")
    stall_s: float = Field(120.0, gt=0, description="seconds that one step may take before its rank counts as dead")
    rebuild: bool = Field(True, description="rebuild a node that lost a rank, and restart the router; false: leave it out of use")
    max_backoff_s: float = Field(60.0, gt=0, description="longest pause between attempts to rebuild a node that keeps failing")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.suspect_beats >= self.dead_beats:
            raise ValueError(f"suspect_beats {self.suspect_beats} must be fewer than dead_beats {self.dead_beats}")
        if self.router_gone_s < 2 * self.beat_s:
            raise ValueError(
                f"router_gone_s {self.router_gone_s:g} must be at least two beats of {self.beat_s:g} s, or one late beat ends all"
            )
        return self

    @property
    def suspect_s(self) -> float:
        """Silence after which a node gets no new work, seconds."""
        return self.beat_s * self.suspect_beats

    @property
    def dead_s(self) -> float:
        """Silence after which a node is dead, seconds."""
        return self.beat_s * self.dead_beats


class RayConfig(Section):
    """The Ray cluster that holds the actors."""

    address: str = Field("", description="address of an existing Ray cluster (`baton up`); empty: start a local one")
    ready_s: float = Field(600.0, gt=0, description="seconds until all ranks must have loaded")
    prefill_label: dict[str, str] = Field(default_factory=dict, description="Ray node labels that a prefill node's host must carry")
    decode_label: dict[str, str] = Field(default_factory=dict, description="Ray node labels that a decode node's host must carry")


class BatonConfig(Section):
    """A whole cluster."""

    model: str = Field(description="checkpoint directory as transformers saves it")
    served_model_name: str = Field("", description="name clients use; empty: the model string as given")
    device: Literal["cpu"] = Field("cpu", description="device of all ranks")
    dtype: Dtype = Field("auto", description="dtype of weights, activations and KV cache; auto: the checkpoint's")
    quantization: Quantization = Field(
        "auto", description="auto: as the checkpoint is; w8a8: int8 weights and activations, made while loading where it is not; none"
    )
    max_model_len: int = Field(0, ge=0, description="longest prompt plus answer, tokens; 0: the model's limit, or what fits")
    block_size: int = Field(16, ge=1, le=256, description="token slots per KV block, equal within a cluster")
    kv_memory: Bytes = Field(512 * 2**20, description="KV cache per rank, bytes (or 512MiB, 2GiB)")
    lend_cores: bool = Field(
        True, description="a rank also computes on cores that other ranks of its host leave idle, step by step; false: only on its own"
    )
    cpu_binding: Literal["auto", "none", "cores"] = Field(
        "auto",
        description="cores: every thread that computes stays on one core, a rank's own or one lent to it, all others run anywhere; "
        "none: threads run where the system puts them; auto: cores if lend_cores is on",
    )
    collective_timeout_s: float = Field(120.0, gt=0, description="seconds after which a collective that hangs makes its group unusable")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="log level of every process")
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    transfer: TransferConfig = TransferConfig()
    router: RouterConfig = RouterConfig()
    membership: MembershipConfig = MembershipConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _binds_are_safe(self) -> Self:
        if not self.router.insecure and not is_loopback(self.router.host):
            raise ValueError(
                f"router.host {self.router.host} is not loopback and the connection would not be encrypted; "
                "set router.insecure: true if the network is trusted"
            )
        return self

    @property
    def binds_cores(self) -> bool:
        """Whether threads that compute stay on their cores. By default where they may be lent some: the system often puts both threads
        of a pair on the core that woke them, and one computes while the other waits.
        """
        return self.cpu_binding == "cores" or (self.cpu_binding == "auto" and self.lend_cores)

    @property
    def name(self) -> str:
        """The model name clients use."""
        return self.served_model_name or self.model

    @property
    def num_ranks(self) -> int:
        """Rank processes in the whole cluster."""
        return self.prefill.nodes * self.prefill.tp + self.decode.nodes * self.decode.dp * self.decode.tp


class RankPlan(Section):
    """One rank's place in the cluster: what its actor is made from. Computed by cluster/, never written by an operator.

    threads: the cores of its host that are its own, from number first_core on, of `cores`. slot: its number among all ranks of the
    cluster, its place in the file `ledger`, by which ranks of a host lend each other idle cores (ranks/cores.py); "": they do not.
    """

    config: BatonConfig
    role: Literal["prefill", "decode"]
    node: str
    rank: int
    threads: int
    host: str = "127.0.0.1"
    cores: int = 1
    first_core: int = 0
    slot: int = 0
    ledger: str = ""

    @property
    def dp_size(self) -> int:
        """Data-parallel groups of the node."""
        return self.config.decode.dp if self.role == "decode" else 1

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks of a group."""
        return self.config.decode.tp if self.role == "decode" else self.config.prefill.tp

    @property
    def num_ranks(self) -> int:
        """Ranks of the node."""
        return self.dp_size * self.tp_size

    @property
    def group(self) -> int:
        """The data-parallel group this rank belongs to."""
        return self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        """This rank's place in its tensor-parallel group; 0 leads it."""
        return self.rank % self.tp_size


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_config(path: str | Path | None, overrides: dict[str, object] | None = None) -> BatonConfig:
    """Read a YAML file, lay `overrides` (dotted names, say "router.http_port") over it, and validate.

    Raises ConfigError naming the file, every wrong field with its value, and the nearest known name for unknown ones.
    """
    content = _read(path) if path else {}
    for dotted, value in (overrides or {}).items():
        _set(content, dotted.split("."), value)
    try:
        return BatonConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path or "the command line"))) from error


def _read(path: str | Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that there never was
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not a {type(content).__name__}")
    return content or {}


def _set(content: dict[str, object], names: list[str], value: object) -> None:
    *outer, last = names
    for name in outer:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{name} must be a mapping of settings, not {inner!r}")
        content = inner
    content[last] = value


def _explain(error: ValidationError, source: str) -> str:
    lines = [f"{source} cannot be used:"]
    wrong = error.errors(include_url=False)
    for item in wrong[:_MAX_EXPLAINED]:
        name = ".".join(str(part) for part in item["loc"]) or "configuration"
        hint = _nearest(item["loc"]) if item["type"] == "extra_forbidden" else f"{item['msg']} (given: {_shown(item['input'])})"
        lines.append(f"  {name[:_MAX_NAME_CHARS]}: {hint}" if item["loc"] else f"  {item['msg']}")
    return "\n".join([*lines, *([f"  and {len(wrong) - _MAX_EXPLAINED} more"] if len(wrong) > _MAX_EXPLAINED else [])])


def _shown(value: object) -> str:
    """A value for a message; YAML can make a few lines stand for more than there is room for."""
    return reprlib.repr(value)


def _nearest(where: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = BatonConfig
    for part in where[:-1]:
        inner = section.model_fields[str(part)].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        section = inner
    close = difflib.get_close_matches(str(where[-1]), section.model_fields, n=1)
    known = f"did you mean {close[0]}?" if close else f"known here: {', '.join(section.model_fields)}"
    return f"unknown setting; {known}"
