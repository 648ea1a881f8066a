"""Golden: every architecture gives token for token what transformers gives, however its work is cut up and wherever its blocks lie."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.engine.parallel import Groups
from baton.engine.placement import Placement
from tests.engine.driving import NUM_BLOCKS, asks, lead, make_runner
from tests.engine.golden import assert_equal, expected
from tests.tiny_models import ARCHITECTURES, make_tiny

Tiny = Callable[[str], Path]
ASKS = asks(1, (1, 3, 8, 17, 41, 66))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chunks_and_mixed_batches_equal_transformers(arch: str, tiny: Tiny) -> None:
    runner = make_runner(tiny(arch), Placement(), Groups.alone())
    assert_equal(lead(runner, ASKS), expected(tiny(arch), ASKS))


def test_half_precision_checkpoint_equals_transformers(tmp_path: Path) -> None:
    """A checkpoint stored in bfloat16, run in float32: the same tokens as transformers does."""
    model_dir = make_tiny("qwen2", tmp_path, dtype="bfloat16")
    runner = make_runner(model_dir, Placement(), Groups.alone(), "float32")
    assert_equal(lead(runner, ASKS[:2]), expected(model_dir, ASKS[:2], torch.float32))


def test_order_of_work_changes_nothing(tiny: Tiny) -> None:
    runner = make_runner(tiny("qwen3"), Placement(), Groups.alone())
    first = lead(runner, ASKS, seed=1)
    assert_equal(lead(runner, ASKS, seed=2), first)
    assert sum(len(ask.prompt) + ask.num_tokens for ask in ASKS) < NUM_BLOCKS * 8
