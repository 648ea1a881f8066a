"""Flushing prefix caches: every group concerned is told, and all answers are awaited. Knows no messages and no registry."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from baton.errors import DeadlineExceeded, NodeLost


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a flush came to: groups that answered, and blocks that were cached there and are free now."""

    groups: int
    blocks: int


class Flushable(Protocol):
    """A way to one group (see router.nodes.NodeLink)."""

    def flush_cache(self, number: int) -> None:
        """Tell the group. Raises NodeLost if there is no stream to it."""


@dataclass(frozen=True, slots=True)
class _Asked:
    name: str
    link: Flushable
    answer: asyncio.Future[int]


class Flushes:
    """Commands that were sent and not answered yet. State owner: the router's loop.

    An entry is made when the command is sent. It ends by the group's answer; by the loss of the group's stream, at once, with
    its error; with the router; or by the deadline of whoever waits. An answer after that finds no entry and is dropped.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    def __len__(self) -> int:
        return len(self._asked)

    async def run(self, groups: Iterable[tuple[str, Flushable]], timeout_s: float) -> Flushed:
        """Flush groups, given by name and link; a name may be there twice, while a node takes another's place.

        Raises NodeLost or DeadlineExceeded if one has not answered; the others may have been flushed then.
        """
        mine: dict[int, _Asked] = {}
        try:
            for name, link in groups:
                number = next(self._numbers)
                link.flush_cache(number)
                mine[number] = self._asked[number] = _Asked(name, link, asyncio.get_running_loop().create_future())
            async with asyncio.timeout(timeout_s):
                return Flushed(len(mine), sum(await asyncio.gather(*(asked.answer for asked in mine.values()))))
        except TimeoutError:
            silent = ", ".join(asked.name for number, asked in mine.items() if number in self._asked)
            raise DeadlineExceeded(f"no word of a flushed cache within {timeout_s:g} s from {silent}", stage="router") from None
        finally:
            for number in mine:
                self._asked.pop(number, None)

    def answered(self, number: int, blocks: int) -> None:
        """A group has flushed its cache."""
        asked = self._asked.pop(number, None)
        if asked is not None and not asked.answer.done():
            asked.answer.set_result(blocks)

    def lost(self, link: Flushable, error: NodeLost) -> None:
        """A group's stream is gone, and its answers with it."""
        self._fail([number for number, asked in self._asked.items() if asked.link is link], error)

    def abandon(self, error: Exception) -> None:
        """The router goes."""
        self._fail(list(self._asked), error)

    def _fail(self, numbers: Iterable[int], error: Exception) -> None:
        for number in numbers:
            answer = self._asked.pop(number).answer
            if not answer.done():
                answer.set_exception(error)
