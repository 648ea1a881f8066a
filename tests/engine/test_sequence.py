"""The line in which sequences wait: who starts, who is overtaken, and what it costs to look."""

from baton.engine.sequence import Answer, WaitingLine


class CountedLimit(int):
    """An age limit that counts how often somebody's age is compared with it."""

    num_asked = 0

    def __le__(self, age: int) -> bool:
        self.num_asked += 1
        return int(self) <= int(age)


def waiting(num_waiting: int, age_limit: int) -> WaitingLine[int]:
    line = WaitingLine[int](age_limit)
    for arrival in range(num_waiting):
        line.join(arrival, arrival)
    return line


def test_a_line_in_which_nobody_finds_room_is_looked_through_once():
    """It is looked through at every event of a node that is full: a hundred times the work would be the end of its event loop."""
    limit = CountedLimit(16)
    line = waiting(500, limit)
    asked: list[int] = []
    line.serve(lambda item: (asked.append(item), Answer.NO_ROOM)[1])
    assert asked == list(range(500))
    assert limit.num_asked <= 500


def test_one_that_was_overtaken_too_often_has_the_first_turn_and_holds_up_the_others():
    line = waiting(10, age_limit=3)
    asked: list[int] = []

    def start(item: int) -> Answer:
        asked.append(item)
        return Answer.NO_ROOM if item == 2 else Answer.STARTED

    line.serve(start)
    assert asked == [0, 1, 2, 3, 4, 5], "three have overtaken the third"
    assert list(line.first()) == [2] and list(line.items()) == [2, 6, 7, 8, 9]
    asked.clear()
    line.serve(start)
    assert asked == [2]
