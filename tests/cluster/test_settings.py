"""`baton config` prints a file that reads back as the defaults, and explains every setting."""

from __future__ import annotations

from pathlib import Path

from baton.config import BatonConfig, load_config
from cluster.settings import description, documented_defaults


def test_the_printed_defaults_read_back(tmp_path: Path) -> None:
    (tmp_path / "baton.yaml").write_text(documented_defaults(), encoding="utf-8")
    assert load_config(tmp_path / "baton.yaml") == BatonConfig(model="path/to/checkpoint")


def test_every_setting_is_explained() -> None:
    lines = documented_defaults().splitlines()
    for number, line in enumerate(lines):
        if ":" in line and not line.lstrip().startswith("#"):
            beside = lines[number + 1] if line.endswith(":") else lines[number - 1]
            assert beside.lstrip().startswith("# "), line


def test_a_description_is_found_by_dotted_name() -> None:
    assert "HTTP" in description("router.http_port")
    assert "checkpoint" in description("model")
