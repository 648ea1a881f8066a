"""A table of transitions: what follows, what cannot happen, and how it is drawn."""

import enum

import pytest

from baton.errors import InternalError
from baton.lifecycle import Lifecycle


class Light(enum.Enum):
    GREEN = "green"
    RED = "red"
    DARK = "all dark"


class Event(enum.Enum):
    SWITCH = "switch"
    CUT = "power cut"
    FAULT = "fault"


LIFE = Lifecycle(
    "light",
    Light.GREEN,
    {
        (Light.GREEN, Event.SWITCH): Light.RED,
        (Light.RED, Event.SWITCH): Light.GREEN,
        (Light.RED, Event.CUT): Light.DARK,
        (Light.RED, Event.FAULT): Light.DARK,
    },
)


def test_an_event_leads_on() -> None:
    assert LIFE.after(Light.GREEN, Event.SWITCH) is Light.RED
    assert LIFE.allows(Light.RED, Event.CUT)


def test_what_is_not_in_the_table_is_a_bug_and_says_so() -> None:
    assert not LIFE.allows(Light.DARK, Event.SWITCH)
    with pytest.raises(InternalError, match="light: switch is impossible while all dark"):
        LIFE.after(Light.DARK, Event.SWITCH)


def test_only_a_state_without_a_way_on_is_an_end() -> None:
    assert [state for state in Light if LIFE.ends(state)] == [Light.DARK]


def test_the_drawing_joins_events_of_one_arrow_and_marks_start_and_end() -> None:
    assert LIFE.drawing().splitlines() == [
        "stateDiagram-v2",
        "    [*] --> green",
        "    green --> red: switch",
        "    red --> green: switch",
        "    red --> all_dark: power cut, fault",
        "    all_dark --> [*]",
    ]
