"""Arguments reach the configuration; what cannot work ends with one clear message and code 2 before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from baton.engine.fingerprint import fingerprint
from baton.errors import ConfigError
from cluster.cli import config_from, main, parser

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("serve", "up", "status", "down", "drain", "restore", "generate", "flush-cache", "chat", "fingerprint", "config")


@pytest.mark.parametrize("arguments", [[], *[[command] for command in COMMANDS]])
def test_help_is_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    assert "usage: baton" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from cluster.cli import parser; parser()\n"
        "assert not {'ray', 'torch', 'grpc', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: a\nprefill: {tp: 4, max_waiting: 9}\nkv_memory: 1GiB\n")
    arguments = parser().parse_args(
        ["serve", "--config", str(tmp_path / "c.yaml"), "--prefill-tp", "2", "--http-port", "0", "--kv-memory", "64MiB", "--api-key", "k"]
    )
    config = config_from(arguments)
    assert (config.model, config.prefill.tp, config.prefill.max_waiting) == ("a", 2, 9)
    assert (config.router.http_port, config.kv_memory, config.router.api_keys) == (0, 64 * 2**20, ("k",))


def test_every_flag_of_the_issue_is_known() -> None:
    flags = "--model m --host 127.0.0.1 --http-port 1 --grpc-port 2 --dtype float32 --max-model-len 7 --kv-memory 9MiB"
    arguments = parser().parse_args(["serve", *flags.split(), "--served-model-name", "n", "--api-key", "x", "--decode-dp", "2"])
    config = config_from(arguments)
    assert (config.name, config.dtype, config.max_model_len, config.decode.dp) == ("n", "float32", 7, 2)


def test_serve_needs_a_model() -> None:
    with pytest.raises(ConfigError, match="--model DIR"):
        config_from(parser().parse_args(["serve"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--model", "/nowhere/at/all"], "/nowhere/at/all is not a directory"),
        (["serve", "--model", "m", "--dtype", "int3"], "dtype"),
        (["serve", "--model", "m", "--prefill-tp", "0"], "prefill.tp"),
        (["serve", "--model", "m", "--host", "0.0.0.0"], "insecure"),
        (["serve", "--model", "m", "--kv-memory", "lots"], "lots"),
        (["serve", "--config", "/nowhere.yaml"], "cannot read the configuration file /nowhere.yaml"),
        (["up", "/nowhere.yaml"], "cannot read the configuration file /nowhere.yaml"),
    ],
)
def test_what_cannot_work_ends_with_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_layout_that_does_not_divide_ends_with_code_2_before_ray(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {ROOT / 'demo' / 'model'}\ndecode: {{dp: 3}}\nray: {{address: '127.0.0.1:1'}}\n")
    assert main([command, *(["--config"] if command == "serve" else []), str(tmp_path / "c.yaml")]) == 2
    assert "decode node of dp=3 x tp=1: num_experts=" in capsys.readouterr().err


def test_config_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert "kv_memory: 512MiB" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "chat", "flush-cache", "drain", "restore"])
def test_nobody_at_the_address_ends_with_code_1(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["hello"] if command in ("generate", "drain", "restore") else []
    assert main([command, "--address", "127.0.0.1:1", *prompt]) == 1
    assert capsys.readouterr().err.startswith("baton: no cluster answers at 127.0.0.1:1")


def test_fingerprint_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    printed = []
    for arguments in (["fingerprint", str(tmp_path)], ["fingerprint", str(tmp_path), "--full"]):
        assert main(arguments) == 0
        said = capsys.readouterr()
        assert len(said.out.strip()) == 64 and not said.err
        printed.append(said.out.strip())
    assert printed == [fingerprint(tmp_path), fingerprint(tmp_path, full=True)]
    assert main(["fingerprint", str(tmp_path / "nowhere")]) == 2
    assert "config.json is missing" in capsys.readouterr().err
