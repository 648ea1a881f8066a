"""Calls to actors, and what their failures mean.

Knows: Ray's errors and ours. Does not know: which actors there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from baton.errors import BatonError, ConfigError, InternalError, NodeLost

log = logging.getLogger(__name__)

STOP_S = 8.0
# After a first failure: how long to wait for the death that caused it, which peers of the dead often notice first.
_BLAME_S = 0.5

_EXIT = re.compile(r"Worker exit detail: (.*?)(?: Some common causes|$)")

T = TypeVar("T")


def create_actor(kind: type, name: str, arguments: tuple[object, ...], options: dict[str, Any], *, detached: bool) -> ActorHandle[Any]:
    """A new actor process; a detached one carries its name in the namespace of the connection and outlives it.

    Ray never restarts it: a rank that died has lost its KV blocks and its process groups, and so has its node.
    """
    named = {"name": name, "lifetime": "detached"} if detached else {}
    made: Any = ray.remote(kind)
    actor: ActorHandle[Any] = made.options(max_restarts=0, max_task_retries=0, **named, **options).remote(*arguments)
    return actor


async def end_actor(actor: ActorHandle[Any]) -> None:
    """Let an actor end by itself within STOP_S, then kill it. A dead one is fine; one that could not is told in the log.

    Ray forgets a killed actor at once; its process may live for some seconds, if it is stopped (measured on 2.60: 5 s).
    """
    try:
        with contextlib.suppress(RayActorError):
            async with asyncio.timeout(STOP_S):
                await actor.stop.remote()
    except TimeoutError:
        log.warning("%s has not ended within %g s and is killed", actor, STOP_S)
    except RayTaskError as error:
        log.warning("%s could not end by itself and is killed: %s", actor, error)
    ray.kill(actor, no_restart=True)


async def end_of(actor: ActorHandle[Any]) -> str:
    """Why an actor does not serve any more, once it does not: it died, it has failed, or its host cannot be reached."""
    try:
        return await actor.serving.remote() or "it was stopped by someone else"
    except RayError as error:
        return reason(error)


async def first_failure(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; or, once one failed, the failure to blame: a death before what its peers say about it."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            done |= (await asyncio.wait(pending, timeout=_BLAME_S))[0]
        errors = [error for task in tasks if task in done and (error := task.exception())]
        if errors:
            raise min(errors, key=lambda error: not isinstance(error, NodeLost))
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def result(name: str, what: str, reference: Any) -> Any:
    """The result of an actor call, its failure as ours: the actor's own BatonError, NodeLost if it died, else InternalError."""
    try:
        return await reference
    except ActorDiedError as error:
        raise NodeLost(f"{name} died when it should {what}: {reason(error)}", stage=what, node=name) from error
    except RayTaskError as error:
        raise _named(error.cause, name, what) from error
    except RayError as error:
        raise NodeLost(f"{name} cannot be reached to {what}: {reason(error)}", stage=what, node=name) from error


def _named(cause: BaseException, name: str, what: str) -> BatonError:
    if isinstance(cause, BatonError):
        return type(cause)(f"{name}: {cause.message}", stage=cause.stage or what, node=name, cause=cause.cause, retryable=cause.retryable)
    kind = ConfigError if isinstance(cause, ImportError) else InternalError
    return kind(f"{name} could not {what}: {type(cause).__name__}: {cause}", stage=what, node=name, cause=f"{what}_failed")


def reason(error: BaseException) -> str:
    """What happened, from Ray's many lines about it."""
    text = " ".join(str(error).split())
    if found := _EXIT.search(text):
        return f"its process died ({found[1].strip()})"
    return text[:300] or type(error).__name__
