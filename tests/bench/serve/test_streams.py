"""The experiment with streams and prompts, against a real router over echo nodes: what it measures is there and fits together."""

from __future__ import annotations

import asyncio

from bench.suite.streams import Scene, Streams


async def test_streams_under_prompts(running, model_dir):
    scene = Scene(num_streams=4, stream_len=160, prompt_len=40, share=0.5, most_prompts=100)
    async with running(step_s=0.005) as (_, http):
        streams = Streams(f"http://{http}", model_dir, scene, seed=1, served_as="echo")
        found = await asyncio.to_thread(streams.measured)
    assert found["prompts_possible_per_s"] > 0
    assert found["prompts_offered_per_s"] == found["prompts_possible_per_s"] / 2
    assert 1 <= found["num_prompts"] <= 100
    assert 4 * 50 < found["undisturbed_num_gaps"] <= 4 * 160
    for which in ("undisturbed", "disturbed"):
        assert 0 < found[f"{which}_median_itl_ms"] <= found[f"{which}_p99_itl_ms"] <= found[f"{which}_max_itl_ms"]
