"""A difference means nothing only where noise of the size of rounding gives both tokens."""

import numpy as np
import torch

from baton.engine.batch import SampleRow
from baton.engine.sampler import uniform
from bench.chaos.asks import Ask, Door
from bench.chaos.judge import Doubt
from bench.chaos.ties import NOISE, drawn, undecided
from bench.solo import Solo

GREEDY = SampleRow(0, 0, 0.0, 0, 1.0, 0.0)


def test_greedy():
    assert drawn(torch.tensor([1.0, 5.0, 5.0 + NOISE / 10, 2.0]), GREEDY) == {1, 2}
    assert drawn(torch.tensor([1.0, 5.0, 5.001, 2.0]), GREEDY) == {2}


def test_a_draw_at_the_border_of_two_tokens():
    seed = 7
    border = float(uniform(np.array([seed], np.uint64), np.array([3], np.int64))[0])
    seeded = SampleRow(seed, 3, 1.0, 0, 1.0, 0.0)
    assert drawn(torch.tensor([border, 1 - border]).log(), seeded) == {0, 1}
    assert drawn(torch.tensor([border + 0.01, 0.99 - border]).log(), seeded) == {0}


def test_a_cut_that_may_go_either_way():
    """Which tokens top_p keeps decides, too: with the third one the draw is stretched over more."""
    border = float(uniform(np.array([7], np.uint64), np.array([3], np.int64))[0])
    logits = torch.tensor([0.3, 0.3, 0.3, 0.1]).log()
    assert len(drawn(logits, SampleRow(7, 3, 1.0, 0, 0.6, 0.0))) > 1, border
    assert len(drawn(logits, SampleRow(7, 3, 1.0, 0, 0.7, 0.0))) == 1


def test_a_model_is_asked_where_two_runs_differ(tiny_moe):
    prompt = tuple(range(5, 25))
    solo = Solo(tiny_moe, "float32", "none", 1, 64)
    tokens = [int(token) for token in solo.answers(np.array([prompt]), 3, 1, lambda number: None)[0]]
    ask = Ask(0, Door.GRPC, prompt, 3)
    wrong = Doubt(ask, tuple(tokens[:2]), tokens[2], (tokens[2] + 1) % 50)
    same = Doubt(ask, tuple(tokens[:2]), tokens[2], tokens[2])
    assert undecided(tiny_moe, [wrong, same]) == {same}
