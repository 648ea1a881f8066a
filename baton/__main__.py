"""The `baton` command as a whole: what a cluster's people need (cluster/cli.py) and what measures it (bench/cli.py).

It lives on the top floor, above both, so that neither has to know of the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.cli import add_bench
from cluster import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    return cli.main(argv, (add_bench,))


if __name__ == "__main__":
    sys.exit(main())
