"""The production router in a process of its own, over nodes that run already: what bench/router_alone.py measures.

    python -m bench.router_process --model DIR --prefill HOST:PORT --decode HOST:PORT

Prints {"http": …, "grpc": …} once a request can be served; SIGTERM ends it. --profile says where its processor time went.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import signal
from pathlib import Path

from baton.config import BatonConfig, RouterConfig
from baton.telemetry import configure_logging
from bench.sampling import Sampler
from router.server import RouterServer

READY_S = 30.0


async def _serve(model: str, prefill: str, decode: str, log_level: str) -> None:
    configure_logging(log_level)
    router = RouterConfig(http_port=0, grpc_port=0, max_running=4096)
    server = RouterServer(BatonConfig(model=model, served_model_name="alone", router=router))
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    addresses = await server.start()
    server.dispatcher.add_group("prefill", prefill)
    server.dispatcher.add_group("decode", decode)
    await server.wait_ready(READY_S)
    gc.collect()
    gc.freeze()  # as the router's actor does
    print(json.dumps(addresses), flush=True)
    await over.wait()
    await server.stop()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True, help="directory with a tokenizer")
    parser.add_argument("--prefill", required=True)
    parser.add_argument("--decode", required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--profile", default="", help="where to write what its processor time went into")
    arguments = parser.parse_args()
    sampler = Sampler()
    if arguments.profile:
        sampler.start()
    asyncio.run(_serve(arguments.model, arguments.prefill, arguments.decode, arguments.log_level))
    if arguments.profile:
        sampler.stop()
        Path(arguments.profile).write_text(sampler.report(), encoding="utf-8")


if __name__ == "__main__":
    main()
