"""What cannot work on this machine is refused before anything starts, by name and number."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from baton.config import BatonConfig
from baton.errors import ConfigError
from cluster.machine import (
    available_cores,
    available_memory_bytes,
    check_before_connecting,
    check_before_start,
    check_ports,
    read_checkpoint,
    with_absolute_model,
)
from cluster.plan import Checkpoint

TINY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "num_experts": 9,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "tokenizer.json").write_text("{}")
    dense = {"model.embed_tokens.weight": torch.zeros(8, 4, dtype=torch.bfloat16), "scale": torch.zeros((), dtype=torch.float32)}
    save_file(dense, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(
        {"model.layers.0.mlp.experts.0.up.weight": torch.zeros(5, 2, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    return tmp_path


def config(model: Path, **router: object) -> BatonConfig:
    return settings(model, router={"http_port": 0, "grpc_port": 0, **router})


def settings(model: Path, **changes: Any) -> BatonConfig:
    free = {"router": {"http_port": 0, "grpc_port": 0}}
    return BatonConfig.model_validate({"model": str(model), "kv_memory": "16MiB", **free, **changes})


def test_parameters_are_counted_from_the_headers_of_all_files(checkpoint_dir: Path) -> None:
    assert read_checkpoint(checkpoint_dir) == Checkpoint(num_params=32 + 1 + 10, num_expert_params=10, num_unquantized_params=32)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint_dir: Path, missing: str) -> None:
    (checkpoint_dir / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        read_checkpoint(checkpoint_dir)


def test_no_directory_and_no_weights_are_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        read_checkpoint(checkpoint_dir / "nowhere")
    for file in checkpoint_dir.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        read_checkpoint(checkpoint_dir)


@pytest.mark.parametrize("content", [b"", b"not a header", b"\xff" * 64, b"\2" + bytes(7) + b"[]"])
def test_a_broken_weights_file_is_named(checkpoint_dir: Path, content: bytes) -> None:
    (checkpoint_dir / "model-00002-of-00002.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors is not a readable"):
        read_checkpoint(checkpoint_dir)


def test_a_port_in_use_is_named(checkpoint_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is already in use.*grpc_port"):
            check_before_start(config(checkpoint_dir, grpc_port=port))
    check_ports(config(checkpoint_dir, grpc_port=port))


def test_two_services_on_one_port_are_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(ConfigError, match="both 4711"):
        check_ports(config(checkpoint_dir, http_port=4711, grpc_port=4711))


def test_an_address_of_another_machine_is_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.77:4711"):
        check_ports(config(checkpoint_dir, host="192.0.2.77", insecure=True, http_port=4711))


def test_clients_keep_the_name_the_operator_wrote(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint_dir.parent)
    checked = check_before_start(config(Path(checkpoint_dir.name)))
    assert checked.model == str(checkpoint_dir.resolve())
    assert checked.name == checkpoint_dir.name
    assert with_absolute_model(checked) == checked


def test_more_memory_than_there_is_is_refused(checkpoint_dir: Path) -> None:
    greedy = config(checkpoint_dir).model_copy(update={"kv_memory": 2**50})
    with pytest.raises(ConfigError, match="of memory available"):
        check_before_start(greedy)


def test_the_machine_has_something_to_offer() -> None:
    assert available_cores() >= 1
    assert available_memory_bytes() > 0


REFUSALS = [
    ({"architectures": ["MambaForCausalLM"]}, {}, "MambaForCausalLM is not supported; supported are"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, "rope type 'dynamic' is not supported; supported are"),
    ({"quantization_config": {"quant_method": "awq"}}, {}, "quant_method 'awq'"),
    ({}, {"decode": {"dp": 2, "tp": 2}}, "decode node of dp=2 x tp=2: num_experts=9 does not divide by 4 ranks"),
    ({}, {"prefill": {"tp": 2}}, "prefill node of tp=2: num_experts=9 does not divide by 2 ranks"),
    ({}, {"max_model_len": 1025}, "max_model_len 1025 is beyond the model's 1024 positions"),
]


@pytest.mark.parametrize("check", [check_before_start, check_before_connecting])
@pytest.mark.parametrize(("changes", "asked", "said"), REFUSALS)
def test_what_config_json_can_tell_is_refused_before_anything_starts(
    checkpoint_dir: Path, check: Any, changes: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    (checkpoint_dir / "config.json").write_text(json.dumps({**TINY, **changes}))
    with pytest.raises(ConfigError, match=said):
        check(settings(checkpoint_dir, **asked))


def test_a_model_that_lies_on_other_machines_only_is_left_to_them(tmp_path: Path) -> None:
    assert check_before_connecting(config(tmp_path / "elsewhere")).model == str(tmp_path / "elsewhere")


def test_checking_needs_neither_torch_nor_ray() -> None:
    program = (
        "import sys, cluster.machine, cluster.kept, cluster.fingerprint\n"
        "assert not {'ray', 'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
