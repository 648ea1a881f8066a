"""What the fleet tells whoever carries one sequence. Knows neither nodes nor how a sequence is carried (see router/relay.py)."""

from __future__ import annotations

from typing import Protocol

from baton.errors import BatonError, NodeLost
from baton.request import TokenEvent
from router.group import Group


class Carrier(Protocol):
    """Who carries one sequence. Called on the loop; must not block or raise."""

    def on_tokens(self, group: Group, event: TokenEvent) -> None:
        """A node made tokens."""

    def on_drawn(self, group: Group, attempt: int, output_index: int, token_id: int) -> None:
        """A node made one token, with nothing to be said beside it."""

    def on_accepted(self, group: Group, attempt: int) -> None:
        """A decode group has reserved room."""

    def on_failed(self, group: Group, attempt: int, error: BatonError) -> None:
        """A node ended an attempt without a finish."""

    def on_known(self, group: Group, attempt: int, next_index: int) -> None:
        """A node that was asked (NodeLink.check) still has an attempt; all tokens before next_index have been sent."""

    def on_lost(self, group: Group, error: NodeLost) -> None:
        """A node is gone, with all that was on it."""

    def look(self, now_s: float) -> None:
        """A beat has passed: see to whatever has been quiet for too long."""

    def hand_over(self, group: Group) -> bool:
        """Leave that group and go on elsewhere, as a new attempt; whether anything was there."""

    def abandon(self, error: BatonError) -> None:
        """The router goes: end with `error` at once."""
