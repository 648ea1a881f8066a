"""Drives a Runner through uneven chunks, mixed batches and scattered blocks; alone, or over gloo in one thread or process per rank.

What comes out must not depend on any of it. Imports no transformers, which rank processes would pay for.
"""

import multiprocessing
import queue
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from baton.engine.batch import Batch, Row, SampleRow
from baton.engine.config_json import load_spec
from baton.engine.kv_cache import KVCache
from baton.engine.kv_shape import KVShape
from baton.engine.parallel import Groups, Rendezvous
from baton.engine.placement import Placement
from baton.engine.rank import Rank, set_threads
from baton.engine.runner import Runner

BLOCK_SIZE = 8
NUM_BLOCKS = 64
MAX_CHUNK = 11
TIMEOUT_S = 60.0

Tokens = list[tuple[int, float]]


@dataclass(frozen=True)
class Ask:
    """Continue `prompt` greedily by exactly num_tokens tokens."""

    prompt: tuple[int, ...]
    num_tokens: int


@dataclass
class Running:
    """An ask on its way. Blocks are its own, in any order."""

    ask: Ask
    block_ids: list[int]
    computed: int = 0
    output: Tokens = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [*self.ask.prompt, *(token for token, _ in self.output)]

    @property
    def done(self) -> bool:
        return len(self.output) == self.ask.num_tokens

    def row(self, num_tokens: int) -> Row:
        """The next num_tokens tokens; sampled if they are the last known ones."""
        stop = min(self.computed + num_tokens, len(self.ids))
        sample = SampleRow(0, len(self.output), 0.0, 0, 1.0, 0.0, 2) if stop == len(self.ids) else None
        return Row(self.ids[self.computed : stop], self.computed, self.block_ids, sample)


def asks(seed: int, prompt_lens: Sequence[int], num_tokens: int = 12, vocab: int = 512) -> list[Ask]:
    """Random prompts of these lengths."""
    draw = random.Random(seed)
    return [Ask(tuple(draw.randrange(3, vocab) for _ in range(length)), num_tokens) for length in prompt_lens]


def make_runner(model_dir: Path, placement: Placement, groups: Groups, dtype: str = "auto", quantization: str = "auto") -> Runner:
    """A loaded runner over a buffer full of rubbish."""
    return Runner(make_rank(model_dir, placement, groups, dtype, quantization), groups)


def make_rank(
    model_dir: Path,
    placement: Placement,
    groups: Groups,
    dtype: str = "auto",
    quantization: str = "auto",
    between_layers: Callable[[], None] = lambda: None,
) -> Rank:
    """Its rank."""
    spec = load_spec(model_dir, dtype, quantization)
    shape = KVShape.of(spec, placement, BLOCK_SIZE)
    buffer = bytearray(b"\x55" * (NUM_BLOCKS * shape.block_bytes))
    kv = KVCache(shape, NUM_BLOCKS, buffer, np.zeros(NUM_BLOCKS, np.uint64))
    rank = Rank(spec, placement, groups, model_dir, kv, between_layers=between_layers)
    rank.load()
    return rank


def lead(runner: Runner, wanted: Sequence[Ask], seed: int = 0) -> list[Tokens]:
    """Run the asks to their end, then empty steps until the whole domain sleeps. Tokens with their logprobs, ask by ask."""
    draw = random.Random(seed)
    free = draw.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    running = [Running(ask, [free.pop() for _ in range(-(-(len(ask.prompt) + ask.num_tokens) // BLOCK_SIZE))]) for ask in wanted]
    asleep = False
    while not asleep:
        waiting = [sequence for sequence in running if not sequence.done]
        chosen = draw.sample(waiting, draw.randint(1, len(waiting))) if waiting else []
        rows = [sequence.row(draw.randint(1, MAX_CHUNK)) for sequence in chosen]
        outcome = runner.step(Batch.build(rows))
        _take(chosen, rows, outcome.sampled.token_ids, outcome.sampled.logprobs)
        asleep = outcome.asleep
    return [sequence.output for sequence in running]


def _take(chosen: list[Running], rows: list[Row], token_ids: Any, logprobs: Any) -> None:
    drawn = iter(zip(token_ids.tolist(), logprobs.tolist(), strict=True))
    for sequence, row in zip(chosen, rows, strict=True):
        sequence.computed += len(row.token_ids)
        if row.sample:
            sequence.output.append(next(drawn))
    assert next(drawn, None) is None


def follow(runner: Runner) -> None:
    """Take part until the domain sleeps."""
    while not runner.step(None).asleep:
        pass


@dataclass(frozen=True)
class Job:
    """One model on a domain of ranks: asks[group] is what each tensor-parallel group runs."""

    model_dir: Path
    tp_size: int
    dp_size: int
    coupled: bool
    asks: tuple[tuple[Ask, ...], ...]
    split_experts: bool = False

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.dp_size


def run_in_threads(job: Job) -> list[list[Tokens]]:
    """Run a job with its ranks in threads of this process, which saves their start. results[group][ask]."""
    meeting = Rendezvous("127.0.0.1", TIMEOUT_S)
    with ThreadPoolExecutor(job.num_ranks) as threads:
        ranks = [threads.submit(_play, rank, job, meeting.port) for rank in range(job.num_ranks)]
        outputs = [rank.result(TIMEOUT_S) for rank in ranks]
    meeting.close()
    return [output for output in outputs if output is not None]


def run_in_processes(jobs: Sequence[Job]) -> list[list[list[Tokens]]]:
    """Run jobs of one size one after the other in that many processes. results[job][group][ask]."""
    (num_ranks,) = {job.num_ranks for job in jobs}
    meetings = [Rendezvous("127.0.0.1", TIMEOUT_S) for _ in jobs]
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    ports = [meeting.port for meeting in meetings]
    ranks = [spawn.Process(target=_be_rank, args=(rank, jobs, ports, answers), daemon=True) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    try:
        results: list[list[Any]] = [[None] * job.dp_size for job in jobs]
        for _ in range(sum(job.dp_size for job in jobs)):
            job, group, outputs = _next_answer(answers, ranks)
            results[job][group] = outputs
        for process in ranks:
            process.join(TIMEOUT_S)
        assert [process.exitcode for process in ranks] == [0] * num_ranks
    finally:
        for process in ranks:
            process.kill()
        for meeting in meetings:
            meeting.close()
    return results


def _next_answer(answers: Any, ranks: Sequence[Any]) -> Any:
    for _ in range(int(TIMEOUT_S)):
        try:
            return answers.get(timeout=1.0)
        except queue.Empty:
            assert all(process.exitcode in (None, 0) for process in ranks), "a rank died; its trace is above"
    raise AssertionError("no answer in time")


def _be_rank(rank: int, jobs: Sequence[Job], ports: Sequence[int], answers: Any) -> None:
    set_threads(1)
    for number, (job, port) in enumerate(zip(jobs, ports, strict=True)):
        outputs = _play(rank, job, port)
        if outputs is not None:
            answers.put((number, rank // job.tp_size, outputs))


def _play(rank: int, job: Job, port: int) -> list[Tokens] | None:
    """One rank's part in a job; what a leader's asks came to."""
    placement = Placement.of(rank, job.tp_size, job.dp_size, job.coupled, job.split_experts)
    groups = Groups.connect(placement, "127.0.0.1", port, TIMEOUT_S)
    runner = make_runner(job.model_dir, placement, groups)
    runner.warm_up()
    outputs = None
    if placement.leader:
        outputs = lead(runner, job.asks[placement.dp_rank], seed=rank)
    else:
        follow(runner)
    groups.close()
    return outputs
