"""What an operator may write, and how a mistake is named."""

import math
from pathlib import Path

import pytest

from baton.config import BatonConfig, RankPlan, is_loopback, load_config, parse_bytes
from baton.errors import ConfigError


@pytest.mark.parametrize(("size", "num_bytes"), [(7, 7), ("7", 7), ("512MiB", 2**29), ("1.5 GB", 1_500_000_000), ("2 kib", 2048)])
def test_sizes(size, num_bytes):
    assert parse_bytes(size) == num_bytes


@pytest.mark.parametrize("size", ["", "lots", "1 PB", "-1MiB", "1MiB2", None, 1.5, [1], "\u0661MiB", "9" * 5000])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modle": "x"}, "modle: unknown setting; did you mean model?"),
        ({"router.htp_port": 1}, "router.htp_port: unknown setting; did you mean http_port?"),
        ({"decode.zzz": 1}, "decode.zzz: unknown setting; known here: nodes, dp"),
        ({"kv_memory": "lots"}, "kv_memory: .*'lots' is not a size"),
        ({"kv_memory": 0}, "kv_memory: .*greater than 0 .given: 0."),
        ({"kv_memory": None}, "kv_memory: .*None is not a size"),
        ({"router.timeout_s": math.inf}, "router.timeout_s: .*finite number"),
        ({"router.host": ["x" * 9999] * 9999}, "router.host: .*valid string .given: .'xxxxxxxxxxxx\\.\\.\\."),
        ({"router.api_keys": [1] * 99}, "router.api_keys.19: .*\n  and 79 more$"),
        ({"router.host": "0.0.0.0"}, "router.host 0.0.0.0 is not loopback"),
        ({"router.api_keys": ("good", "")}, "router.api_keys.1: .*at least 1 character"),
        ({"prefill": 3, "prefill.tp": 2}, "prefill must be a mapping of settings, not 3"),
    ],
)
def test_mistakes_are_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        load_config(None, {"model": "m"} | settings)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
        ("\udcff", "is not valid YAML"),
        ("a: 0000-00-00", "is not valid YAML: year 0"),
        ("a: " + "[" * 2000, "is nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str, said: str):
    path = tmp_path / "cluster.yaml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=f"cluster.yaml {said}"):
        load_config(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_file_and_what_is_laid_over_it(tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text("model: a\nprefill: {tp: 2}\nrouter: {insecure: true, host: 0.0.0.0}\n", encoding="utf-8")
    config = load_config(path, {"prefill.nodes": 3, "decode.dp": 2})
    assert (config.name, config.prefill.tp, config.prefill.nodes, config.num_ranks) == ("a", 2, 3, 8)
    (tmp_path / "empty.yaml").write_text("", encoding="utf-8")
    assert load_config(tmp_path / "empty.yaml", {"model": "m"}) == BatonConfig(model="m")


@pytest.mark.parametrize(("host", "here"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("node", False)])
def test_what_only_this_machine_can_reach(host, here):
    assert is_loopback(host) is here


def test_a_rank_knows_its_place():
    config = load_config(None, {"model": "m", "decode.dp": 2, "decode.tp": 3})
    plans = [RankPlan(config=config, role="decode", node="decode-0", rank=rank, threads=1) for rank in range(6)]
    assert [(plan.group, plan.tp_rank) for plan in plans] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert plans[0].num_ranks == 6


def test_limits_of_membership_are_in_order() -> None:
    with pytest.raises(ConfigError, match="suspect_beats 6 must be fewer than dead_beats 6"):
        load_config(None, {"model": "m", "membership.suspect_beats": 6})
    with pytest.raises(ConfigError, match="router_gone_s 1 must be at least two beats of 1 s"):
        load_config(None, {"model": "m", "membership.router_gone_s": 1.0})
    limits = load_config(None, {"model": "m", "membership.beat_s": 0.5}).membership
    assert (limits.suspect_s, limits.dead_s) == (1.5, 3.0)
