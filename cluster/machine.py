"""What this machine offers and whether it can take a cluster: cores, memory, ports, a readable checkpoint.

Knows: the operating system and the files of a checkpoint directory. Does not know: Ray, and decides nothing (plan.py does).
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from baton.config import BatonConfig
from baton.engine.config_json import load_spec
from baton.engine.spec import ModelSpec
from baton.errors import ConfigError
from cluster.plan import Checkpoint, refuse_overcommit, refuse_unfit

_CGROUP = Path("/sys/fs/cgroup")
_UNQUANTIZED = ("embed_tokens.weight", "lm_head.weight", "kv_b_proj.weight")
_MAX_HEADER_BYTES = 100 * 2**20


def available_cores() -> int:
    """Cores this process may use: its affinity, cut by the container's CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = _read_cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cores)


def available_memory_bytes() -> int:
    """Memory that can still be taken without swapping, cut by the container's limit."""
    available = psutil.virtual_memory().available
    limit, used = _read_cgroup("memory.max").strip(), _read_cgroup("memory.current").strip()
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def check_before_start(config: BatonConfig) -> BatonConfig:
    """Refuse, before any process starts, what cannot work on this machine; returns the configuration with the model's absolute path.

    Raises ConfigError: model directory, what config.json asks for, a layout it cannot be cut to, memory, or a port that is taken.
    """
    checkpoint = read_checkpoint(Path(config.model))
    refuse_overcommit(config, checkpoint, checked_spec(config), available_memory_bytes())
    check_ports(config)
    return with_absolute_model(config)


def check_before_connecting(config: BatonConfig) -> BatonConfig:
    """As check_before_start, for a Ray cluster of other machines: only what config.json and the layout say, if the model lies here too."""
    if (Path(config.model) / "config.json").is_file():
        checked_spec(config)
    return with_absolute_model(config)


def checked_spec(config: BatonConfig) -> ModelSpec:
    """What the model is. Raises ConfigError if Baton cannot run it, or not on nodes of this shape."""
    spec = load_spec(config.model, config.dtype, config.quantization)
    refuse_unfit(config, spec)
    return spec


def with_absolute_model(config: BatonConfig) -> BatonConfig:
    """The same configuration for processes in other working directories; clients keep the name the operator wrote."""
    return config.model_copy(update={"model": str(Path(config.model).resolve()), "served_model_name": config.name})


def check_ports(config: BatonConfig) -> None:
    """Raise ConfigError naming the port if HTTP or gRPC could not be bound now."""
    router = config.router
    if router.http_port and router.http_port == router.grpc_port:
        raise ConfigError(f"router.http_port and router.grpc_port are both {router.http_port}; HTTP and gRPC need a port each")
    for name, port in (("http_port", router.http_port), ("grpc_port", router.grpc_port)):
        if port:
            _check_port(router.host, name, port)


def read_checkpoint(model: Path) -> Checkpoint:
    """What the headers of a checkpoint's safetensors files say. Raises ConfigError naming what the directory lacks."""
    if not model.is_dir():
        raise ConfigError(f"{model} is not a directory; model must be a checkpoint directory as transformers saves it")
    for name, purpose in (("config.json", "the model's configuration"), ("tokenizer.json", "its tokenizer")):
        if not (model / name).is_file():
            raise ConfigError(f"{model} holds no {name} ({purpose}); model must be a checkpoint directory as transformers saves it")
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{model} holds no *.safetensors file; save the model with safe_serialization=True")
    tensors = [tensor for file in files for tensor in _tensors(file)]
    return Checkpoint(
        num_params=sum(num_params for _, num_params in tensors),
        num_expert_params=sum(num_params for name, num_params in tensors if ".experts." in name),
        num_unquantized_params=sum(num_params for name, num_params in tensors if name.endswith(_UNQUANTIZED)),
    )


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    # Format: https://huggingface.co/docs/safetensors/index#format (u64 little endian header length, then JSON).
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a readable safetensors file: {error}") from error
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, math.prod(tensor["shape"])


def _check_port(host: str, name: str, port: int) -> None:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is already in use; choose another router.{name}, or 0 for any free one") from error
        raise ConfigError(f"cannot listen on {host}:{port} (router.{name}): {error.strerror}") from error


def _read_cgroup(name: str) -> str:
    try:
        return (_CGROUP / name).read_text(encoding="ascii")
    except OSError:
        return ""  # no cgroup v2, or the root group, which has no limits
