"""The relay as one Python object: answers in order, two at once in one process, errors as errors, nothing left, whatever dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from baton.errors import ConfigError, InternalError, InvalidRequest
from cluster.offline import Engine
from tests.cluster.footprint import Footprint

pytestmark = [pytest.mark.relay, pytest.mark.timeout(240)]

SETTINGS = {"kv_memory": "8MiB", "max_model_len": 256, "dtype": "float32"}
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


def test_two_engines_in_one_process_agree_and_leave_nothing(tiny_model: Path, tmp: Path) -> None:
    environ_before = dict(os.environ)
    footprint = Footprint(tmp)
    with Engine(str(tiny_model), SETTINGS) as one, Engine(str(tiny_model), SETTINGS, **{"prefill.tp": 2}) as two:
        footprint.see(os.getpid())
        prompts = ["def main():", [5, 6, 7, 8], [{"role": "user", "content": "hello"}]]
        answers = one.generate(prompts, GREEDY)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in two.generate(prompts, [GREEDY] * 3)]
        assert answers[0].text == one.generate("def main():", GREEDY)[0].text
        assert len(one.generate("x", {**GREEDY, "n": 3})) == 3
        with pytest.raises(InvalidRequest, match="list of their own"):
            one.generate([1, 2, 3], GREEDY)  # type: ignore[list-item]
        with pytest.raises(InvalidRequest):
            one.generate("x", {"max_tokens": 10_000})
        assert one.status()["pairs"]
        assert all(rank.idle() for engine in (one, two) for rank in engine.wait_idle())
        assert len(two.counts()) == 3
    assert dict(os.environ) == environ_before
    gone(footprint)


def test_ray_does_not_come_into_the_callers_process(tiny_model: Path) -> None:
    """In a process of its own: tests of this one import Ray."""
    asks = f"Engine({str(tiny_model)!r}, {SETTINGS!r}).close()"
    code = f"import sys\nfrom cluster.offline import Engine\nif __name__ == '__main__':\n    {asks}\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "cluster.offline" in done.stdout.split()
    assert "ray" not in done.stdout.split()


def test_what_the_machine_cannot_run_is_refused_before_anything_starts(tiny_model: Path, tmp: Path) -> None:
    with pytest.raises(ConfigError, match="memory available"):
        Engine(str(tiny_model), {"kv_memory": 2**50})
    with pytest.raises(ConfigError, match="did you mean"):
        Engine(str(tiny_model), {"prefil": {"tp": 2}})
    assert not list(tmp.iterdir())


def test_a_killed_keeper_is_an_error_and_leaves_nothing(tiny_model: Path, tmp: Path) -> None:
    footprint = Footprint(tmp)
    engine = Engine(str(tiny_model), SETTINGS)
    try:
        footprint.see(os.getpid())
        (keeper,) = [child for child in psutil.Process().children() if "cluster.keeper" in child.cmdline()]
        keeper.kill()
        with pytest.raises(InternalError):
            engine.counts()
    finally:
        engine.close()
    engine.close()
    gone(footprint)


def gone(footprint: Footprint) -> None:
    """Everything below this process, which itself lives on."""
    footprint.forget(os.getpid())
    footprint.assert_gone()
