"""When requests arrive. Pure."""

from __future__ import annotations

import math

import numpy as np


def arrivals(num_requests: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds after the start, in order. rate: requests/s, inf for all at once.

    Gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, less is burstier, inf is a metronome. As vLLM does it,
    the whole is stretched to last exactly num_requests / rate, so that seeds do not differ in the rate they offer.
    """
    if math.isinf(rate):
        return [0.0] * num_requests
    if math.isinf(burstiness):
        gaps = np.full(num_requests, 1.0 / rate)
    else:
        gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), num_requests)
    times = gaps.cumsum()
    return [float(time) for time in times * (num_requests / rate / times[-1])]
