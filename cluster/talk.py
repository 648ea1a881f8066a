"""`baton generate`, `baton chat`, `baton status --address`: a running cluster over gRPC.

Knows: the client and the terminal. Does not know: Ray; works against any cluster that listens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from baton.client import Options, SyncClient
from baton.errors import BatonError, Unavailable
from baton.request import Chunk, Usage


def generate(address: str, api_key: str | None, prompt: str, sampling: Options) -> int:
    """Stream one answer to standard output; usage goes to standard error when somebody watches."""
    with connected(address, api_key) as client:
        usage = _print_stream(client.generate(prompt, **sampling))
    print()
    if usage is not None and sys.stderr.isatty():
        print(_usage_line(usage), file=sys.stderr)
    return 0


def chat(address: str, api_key: str | None, system: str | None, sampling: Options) -> int:
    """Read lines, stream answers, keep the history; ends with Ctrl-D, Ctrl-C or /exit. /clear forgets."""
    opening = [{"role": "system", "content": system}] if system else []
    with connected(address, api_key) as client:
        _greet(client, address)
        messages = list(opening)
        for line in _lines():
            if line == "/clear":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            answer = _answer(client, messages, sampling)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    return 0


@contextlib.contextmanager
def connected(address: str, api_key: str | None) -> Iterator[SyncClient]:
    """A client of the cluster at address. What gRPC says where none answers becomes what to do about it."""
    with SyncClient(address, api_key=api_key) as client:
        try:
            yield client
        except Unavailable as error:
            if error.stage:  # a router's own word
                raise
            raise Unavailable(
                f"no cluster answers at {address}: is one running there? --address is HOST:PORT of its gRPC interface ({error.message})"
            ) from error


def _greet(client: SyncClient, address: str) -> None:
    names = ", ".join(model.name for model in client.models())
    if sys.stdin.isatty():
        print(f"{names} at {address}. Ctrl-D or /exit ends, /clear forgets.", file=sys.stderr)


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line:
            yield line


def _answer(client: SyncClient, messages: list[dict[str, str]], sampling: Options) -> str | None:
    """The answer's text, printed as it comes; None if there was none. Ctrl-C keeps what has come so far."""
    parts: list[str] = []
    stream = client.generate(messages, **sampling)
    try:
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(stream):
            for chunk in stream:
                parts.append(chunk.text)
                print(chunk.text, end="", flush=True)
    except BatonError as error:
        print(f"{error.message}", file=sys.stderr)
    print()
    return "".join(parts) or None


def _print_stream(chunks: Iterator[Chunk]) -> Usage | None:
    usage = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        usage = chunk.usage or usage
    return usage


def _usage_line(usage: Usage) -> str:
    return f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} generated"


def flush_cache(address: str, api_key: str | None, node: str) -> int:
    """Have a node ("": all) forget cached prefixes that no sequence uses, and print how many blocks that freed."""
    with connected(address, api_key) as client:
        blocks = client.flush_cache(node)
    print(f"{blocks} cached blocks are free now")
    return 0


def print_status(address: str, api_key: str | None) -> int:
    """Print what the router of a running cluster says about its groups and pairs."""
    with connected(address, api_key) as client:
        status = client.status()
    print(f"{status.model}: {'ready' if status.ready else 'not ready'}, {status.requests_running} running, {status.requests_total} so far")
    for group in status.groups:
        blocks = group.load.blocks
        print(
            f"  {group.role} {group.node}/{group.group}: {group.state}, pids {', '.join(str(rank.pid) for rank in group.ranks)}, "
            f"{group.load.running_sequences} running, {group.load.waiting_sequences} waiting, "
            f"blocks {blocks.free} free + {blocks.cached} cached + {blocks.held} held + {blocks.quarantined} quarantined = {blocks.total}"
        )
    for pair in status.pairs:
        way = f"{pair.prefill} -> {pair.decode}" if pair.prefill else f"{pair.decode} alone"
        print(f"  {way}: {pair.refusal or ('proven' if pair.proven else 'not proven yet')}")
    for node in status.nodes:
        print(f"  {node.node}: {node.stage}, life {node.lives}{f' (the last ended because {node.why})' if node.why else ''}")
    return 0
