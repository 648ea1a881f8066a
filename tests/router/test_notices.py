"""Notices: one per kind and node, taken once, in order; nobody waits longer than asked, and nothing grows without end."""

from __future__ import annotations

import asyncio

from router.notices import MAX_NOTICES, Notice, Notices


def condemn(node: str, address: str = "h:1") -> Notice:
    return Notice("condemn", node, address, "silent")


async def test_what_was_put_is_taken_once_in_order() -> None:
    notices = Notices()
    notices.put(condemn("a"))
    notices.put(condemn("b"))
    notices.put(Notice("retire", "a", "h:1", "drained"))
    notices.put(condemn("a", "h:2"))
    assert [(notice.kind, notice.node, notice.address) for notice in await notices.take(20)] == [
        ("condemn", "b", "h:1"),
        ("retire", "a", "h:1"),
        ("condemn", "a", "h:2"),
    ]
    assert await notices.take(0.01) == ()


async def test_whoever_waits_gets_the_next_one() -> None:
    notices = Notices()
    waiting = asyncio.create_task(notices.take(20))
    await asyncio.sleep(0)
    notices.put(condemn("a"))
    assert await waiting == (condemn("a"),)


async def test_a_notice_that_was_taken_back_is_not_taken() -> None:
    notices = Notices()
    notices.put(condemn("a"))
    notices.withdraw("condemn", "a")
    notices.withdraw("retire", "a")
    assert await notices.take(0.01) == ()


async def test_without_a_supervisor_the_newest_stay() -> None:
    notices = Notices()
    for number in range(MAX_NOTICES + 10):
        notices.put(condemn(f"node-{number}"))
    assert len(notices) == MAX_NOTICES
    assert (await notices.take(20))[0].node == "node-10"
