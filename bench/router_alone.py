"""What the router costs by itself: production router, nodes that compute nothing, real sockets, one process each.

    python -m bench.router_alone                       HTTP, 1 to 1,000 streams, 50 tokens each
    python -m bench.router_alone --front grpc --streams 128 --step-ms 50

Processor time of the router's process is what is counted (all its threads), so that a busy machine does not change the answer much;
the time to the first token (the least and the median) is wall time, and does change. A *step* is one decode step: one token for every
stream. Of several rounds the one with the least processor time per token counts: neighbours and cold caches only ever add to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import psutil

from baton.client import Client

STREAMS = (1, 16, 128, 1000)
PROMPT_LEN = 50
FIRST_PROMPT_ID = 2000
_DONE, _END = b"data: [DONE]", b"0\r\n\r\n"  # of the stream, and of a chunked body


@dataclass(slots=True)
class Counted:
    """What clients saw: answers, tokens (events), seconds to each first one, and what went wrong."""

    num_answers: int = 0
    num_tokens: int = 0
    first_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. cpu_s: of the router's process, seconds."""

    streams: int
    counted: Counted
    wall_s: float
    cpu_s: float

    def row(self, request_cpu_s: float) -> str:
        """One line of the table; request_cpu_s: what a request costs beside its tokens."""
        counted = self.counted
        per_token = 1e6 * self.cpu_s / counted.num_tokens
        further = 1e6 * (self.cpu_s - request_cpu_s * counted.num_answers) / max(1, counted.num_tokens - counted.num_answers)
        first_ms = sorted(1000 * seconds for seconds in counted.first_s)
        least, median = first_ms[0], first_ms[len(first_ms) // 2]
        return (
            f"{self.streams:>7} {counted.num_answers / self.wall_s:>9.1f} {counted.num_tokens / self.wall_s:>9.0f} {per_token:>9.1f} "
            f"{further:>9.1f} {least:>9.2f} {median:>9.2f} {100 * self.cpu_s / self.wall_s:>6.0f}%"
        )


HEAD = f"{'streams':>7} {'answers/s':>9} {'tokens/s':>9} {'us/token':>9} {'us/next':>9} {'ttft ms':>9} {'median':>9} {'busy':>7}"


class HttpStream(asyncio.Protocol):
    """One keep-alive connection that asks again and again, and counts events as they come. Ended by whoever made it."""

    def __init__(self, counted: Counted, request: bytes) -> None:
        self._counted = counted
        self._request = request
        self._asked_s = 0.0
        self._is_first = False
        self._tail = b""
        self._transport: asyncio.Transport | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self) -> None:
        """One request and its whole answer."""
        assert self._transport is not None
        self._over, self._tail, self._is_first = asyncio.get_running_loop().create_future(), b"", True
        self._asked_s = time.perf_counter()
        self._transport.write(self._request)
        await self._over

    def data_received(self, data: bytes) -> None:
        """Count what came. TCP may cut anywhere: a line that is cut is looked at when it is whole."""
        lines, newline, rest = (self._tail + data).rpartition(b"\n")
        data, self._tail = lines + newline, rest
        count = data.count(b"data: ") - data.count(_DONE)
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self._fail(data)
        if count and self._is_first:
            self._is_first = False
            self._counted.first_s.append(time.perf_counter() - self._asked_s)
        self._counted.num_tokens += count
        if data.endswith(_END):
            self._counted.num_answers += 1
            self._over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The router hung up."""
        if not self._over.done():
            self._over.set_exception(ConnectionError("the router closed a connection"))

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def _fail(self, data: bytes) -> None:
        if not self._over.done():
            self._over.set_exception(ConnectionError(f"the router answers {data[:200]!r}"))


@dataclass(frozen=True, slots=True)
class Load:
    """What to ask for. deadline_s: on this process's clock; streams begin no other request after it."""

    front: str
    streams: int
    max_tokens: int
    seconds: float


async def run_http(address: str, load: Load) -> Counted:
    """So many connections at once, each with one request after the other."""
    counted, (host, port) = Counted(), address.rsplit(":", 1)
    prompt = list(range(FIRST_PROMPT_ID, FIRST_PROMPT_ID + PROMPT_LEN))
    body = json.dumps({"model": "alone", "prompt": prompt, "max_tokens": load.max_tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    loop, end_s = asyncio.get_running_loop(), time.perf_counter() + load.seconds

    async def one() -> None:
        _, stream = await loop.create_connection(lambda: HttpStream(counted, head.encode() + body), host, int(port))
        await stream.ask()
        while time.perf_counter() < end_s:
            await stream.ask()
        stream.close()

    await asyncio.gather(*(one() for _ in range(load.streams)))
    return counted


async def run_grpc(address: str, load: Load) -> Counted:
    """So many calls at once on one channel, each followed by another."""
    counted, end_s = Counted(), time.perf_counter() + load.seconds
    prompt = range(FIRST_PROMPT_ID, FIRST_PROMPT_ID + PROMPT_LEN)

    async def one(client: Client) -> None:
        while True:
            asked_s, is_first = time.perf_counter(), True
            async for _ in client.generate(prompt, max_tokens=load.max_tokens, ignore_eos=True):
                if is_first:
                    counted.first_s.append(time.perf_counter() - asked_s)
                    is_first = False
                counted.num_tokens += 1
            counted.num_answers += 1
            if time.perf_counter() >= end_s:
                return

    async with Client(address) as client:
        await asyncio.gather(*(one(client) for _ in range(load.streams)))
    return counted


async def measured(router: psutil.Process, addresses: dict[str, str], load: Load) -> Figures:
    """One run, after a short one that does not count."""
    run = run_http if load.front == "http" else run_grpc
    await run(addresses[load.front], Load(load.front, load.streams, load.max_tokens, 0.0))
    began_s, before = time.perf_counter(), router.cpu_times()
    counted = await run(addresses[load.front], load)
    wall_s, after = time.perf_counter() - began_s, router.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return Figures(load.streams, counted, wall_s, cpu_s)


async def best(router: psutil.Process, addresses: dict[str, str], load: Load, rounds: int) -> Figures:
    """The run of several that cost the router least."""
    runs = [await measured(router, addresses, load) for _ in range(rounds)]
    return min(runs, key=lambda run: run.cpu_s / run.counted.num_tokens)


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of this package and the first line it says; it is ended with the block."""
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{arguments[0]} did not start")
        yield process, line
    finally:
        process.terminate()
        process.wait(20)


@asynccontextmanager
async def a_router(arguments: argparse.Namespace) -> AsyncIterator[tuple[psutil.Process, dict[str, str]]]:
    """Nodes and a router, each in its own process."""
    with started("bench.instant_nodes", "--step-ms", str(arguments.step_ms)) as (_, line):
        prefill, decode = line.split()
        more = ("--profile", arguments.profile) if arguments.profile else ()
        nodes = ("--prefill", prefill, "--decode", decode)
        with started("bench.router_process", "--model", arguments.model, *nodes, "--log-level", arguments.log_level, *more) as (
            router,
            line,
        ):
            yield psutil.Process(router.pid), json.loads(line)


async def report(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    async with a_router(arguments) as (router, addresses):
        one = await best(router, addresses, Load(arguments.front, 16, 1, arguments.seconds / 2), arguments.rounds)
        request_cpu_s = one.cpu_s / one.counted.num_answers
        print(f"{arguments.front}, {arguments.tokens} tokens an answer, a step every {arguments.step_ms:g} ms; one process per part")
        print(f"a request of one token costs {1e6 * request_cpu_s:.0f} us of the router's processor time")
        print("us/token: processor time over tokens; us/next: of it, what every token after the first costs\n" + HEAD)
        for streams in arguments.streams or STREAMS:
            load = Load(arguments.front, streams, arguments.tokens, arguments.seconds)
            figures = await best(router, addresses, load, arguments.rounds)
            print(figures.row(request_cpu_s), flush=True)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo/model", help="directory with a tokenizer")
    parser.add_argument("--front", choices=("http", "grpc"), default="http")
    parser.add_argument("--streams", type=int, nargs="*")
    parser.add_argument("--tokens", type=int, default=50, help="of each answer")
    parser.add_argument("--step-ms", type=float, default=0.0, help="least time between two decode steps; 0: as fast as the router reads")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--profile", default="", help="where the router writes what its processor time went into")
    asyncio.run(report(parser.parse_args()))


if __name__ == "__main__":
    main()
