"""The committed stubs in baton/v1 are what `make proto` writes from proto/ today, byte for byte."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = ROOT / ".venv-proto" / "bin" / "python"


def stubs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "baton" / "v1").glob("*_pb2*.py*")}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    if not GENERATOR.exists():
        assert os.environ.get("CI") != "true", "CI needs .venv-proto; make check makes it"
        pytest.skip("no .venv-proto here; make check makes it")
    protos = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [str(GENERATOR), "-m", "grpc_tools.protoc", "-Iproto", *outputs, *protos]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert stubs(tmp_path), "the generator wrote nothing"
    stale = {name for name, _ in stubs(tmp_path).items() ^ stubs(ROOT).items()}
    assert not stale, f"run make proto: {sorted(stale)}"
