"""A life cycle as one table: which event leads from which state to which. Knows no clock and nothing that lives.

Every life in Baton (request, sequences, lease, pull, group, node) is one `Lifecycle`, stepped by whoever owns the state. What the
table does not have cannot happen: an event that finds no row is a bug, and raises. docs/lifecycles.md is drawn from these tables.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Generic, TypeVar

from baton.errors import InternalError

State = TypeVar("State", bound=enum.Enum)
Event = TypeVar("Event", bound=enum.Enum)


class Lifecycle(Generic[State, Event]):
    """An immutable table of transitions. name: what lives, for messages and drawings. start: the state it is made in."""

    def __init__(self, name: str, start: State, table: Mapping[tuple[State, Event], State]) -> None:
        self.name = name
        self.start = start
        self.table = dict(table)

    def after(self, state: State, event: Event) -> State:
        """The state that follows. Raises InternalError for an event that cannot happen in this state."""
        following = self.table.get((state, event))
        if following is None:
            raise InternalError(f"{self.name}: {event.value} is impossible while {state.value}", cause="lifecycle")
        return following

    def allows(self, state: State, event: Event) -> bool:
        """Whether the event can happen in this state."""
        return (state, event) in self.table

    def ends(self, state: State) -> bool:
        """Whether nothing can happen any more."""
        return all(before is not state for before, _ in self.table)

    def drawing(self) -> str:
        """The table as a Mermaid state diagram, one line per pair of states, events joined by commas."""
        events: dict[tuple[State, State], list[str]] = {}
        for (before, event), after in self.table.items():
            events.setdefault((before, after), []).append(event.value)
        arrows = [f"    {_id(before)} --> {_id(after)}: {', '.join(names)}" for (before, after), names in events.items()]
        ends = [f"    {_id(state)} --> [*]" for state in dict.fromkeys(self.table.values()) if self.ends(state)]
        return "\n".join(["stateDiagram-v2", f"    [*] --> {_id(self.start)}", *arrows, *ends])


def _id(state: enum.Enum) -> str:
    return str(state.value).replace(" ", "_").replace("-", "_")
