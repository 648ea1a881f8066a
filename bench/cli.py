"""`baton bench …`: what this floor adds to the `baton` command. Imports what a command needs when it runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_bench(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `bench` and its commands to the table of cluster/cli.py."""
    bench = commands.add_parser("bench", help="measure a running server")
    kinds = bench.add_subparsers(required=True, metavar="COMMAND")
    serve = kinds.add_parser("serve", parents=[shared], help="put load on an OpenAI-compatible server, or on Baton's gRPC, and time it")
    from bench.serve.options import add_options

    add_options(serve)
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    from bench.serve.command import bench_serve

    return bench_serve(options)
