"""The README tells the truth: its settings are settings, its commands exist, its Python example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from baton.config import BatonConfig
from cluster.cli import parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_settings_shown_are_settings() -> None:
    for block in blocks("yaml"):
        BatonConfig.model_validate(yaml.safe_load(block))


def test_the_files_linked_are_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", re.findall(r"`?\.?(?:\.venv/bin/)?baton (serve|generate|chat|status|config|up|down)\b", README))
def test_the_commands_shown_exist(command: str) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args([command, "--help"])
    assert end.value.code == 0


@pytest.mark.relay
def test_the_python_example_runs() -> None:
    (example,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "Usage(prompt_tokens=" in done.stdout
