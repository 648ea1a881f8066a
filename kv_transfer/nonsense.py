"""What a source is told that says what cannot be true, by mistake or on purpose. Knows no messages."""

from __future__ import annotations

from baton.errors import Incompatible


def nonsense(what: str, *, node: str = "") -> Incompatible:
    """Another attempt makes sense, elsewhere or once the two nodes have been proven again: so it is retryable."""
    return Incompatible(what, stage="pull", node=node, cause="nonsense", retryable=True)
