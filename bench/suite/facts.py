"""What a result is worth nothing without: machine, versions, commit. Knows git and the peer's environment."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.machine import Machine

_ASK_S = 60.0
_ROOT = Path(__file__).resolve().parents[2]


def facts(peer: Path | None) -> dict[str, Any]:
    """As JSON can carry them. commit: of the working tree, with `dirty` where it holds more than that."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": asdict(Machine.this()),
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
        "dirty": bool(_said("git", "status", "--porcelain", "--", ".", ":!bench/results", ":!docs")),
        "peer": peer_version(peer),
    }


def peer_version(peer: Path | None) -> str:
    """Of vLLM, without importing it: that takes long."""
    if peer is None:
        return ""
    program = "import importlib.metadata as m; print(m.version('vllm'))"
    return f"vLLM {_said(str(peer / 'bin' / 'python'), '-c', program)}"


def _said(*words: str) -> str:
    done = subprocess.run(words, cwd=_ROOT, capture_output=True, text=True, timeout=_ASK_S, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def write(path: Path, found: dict[str, Any]) -> None:
    """One result, readable and in a form that diffs well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
