"""docs/lifecycles.md says what the code does, and every table is sound."""

from pathlib import Path

import pytest

from baton.errors import InternalError
from baton.lifecycle import Lifecycle
from cluster.lifecycles import LIVES, Described, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "lifecycles.md"


def test_the_page_is_drawn_from_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make lifecycles`"


@pytest.mark.parametrize("described", LIVES, ids=lambda described: described.life.name)
def test_every_state_can_be_reached_and_has_an_end_or_a_way_on(described: Described) -> None:
    life = described.life
    reached = {life.start}
    while more := {after for (before, _), after in life.table.items() if before in reached} - reached:
        reached |= more
    assert reached == set(type(life.start)), "a state that cannot be reached, or is missing in the table"


@pytest.mark.parametrize("described", LIVES, ids=lambda described: described.life.name)
def test_an_end_can_be_reached_from_everywhere(described: Described) -> None:
    life = described.life
    ending = {state for state in type(life.start) if life.ends(state)}
    assert ending
    while more := {before for (before, _), after in life.table.items() if after in ending} - ending:
        ending |= more
    assert ending == set(type(life.start)), "a state with no way to an end"


@pytest.mark.parametrize("described", LIVES, ids=lambda described: described.life.name)
def test_what_the_table_does_not_have_cannot_happen(described: Described) -> None:
    life: Lifecycle = described.life  # type: ignore[type-arg]
    events = {event for _, event in life.table}
    impossible = [(state, event) for state in type(life.start) for event in events if not life.allows(state, event)]
    assert impossible
    for state, event in impossible:
        with pytest.raises(InternalError, match="impossible"):
            life.after(state, event)


@pytest.mark.parametrize("described", LIVES, ids=lambda described: described.life.name)
def test_each_is_found_where_the_page_says(described: Described) -> None:
    assert (PAGE.parents[1] / described.file).is_file()
