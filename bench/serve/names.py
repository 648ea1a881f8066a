"""The latencies by the names that options and results have for them. Imports nothing, so that help is instant."""

from __future__ import annotations

# What percentiles can be asked for, by the name in options and results; and what goals can be set for.
SERIES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
}
GOALS = ("ttft", "tpot", "e2el")
