"""The process that holds one cluster for another process: `python -m cluster.keeper [HOME]`, started by kept.py, spoken to over its pipes.

It ends, and takes every process of the cluster along, when its standard input closes: so also when whoever asked for the cluster is killed.
HOME: of a private Ray. Its nursery is started before anything else, Ray included, is imported here: both take long, and nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from cluster.nursery import nursery


def main() -> int:
    """Read the order and questions from standard input, write events to standard output; logs go to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that Ray or a library prints may end up between our lines
    with nursery(Path(sys.argv[1])) if len(sys.argv) > 1 else contextlib.nullcontext():
        from cluster.keeping import run

        return asyncio.run(run(out))


if __name__ == "__main__":
    sys.exit(main())
