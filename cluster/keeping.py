"""One cluster's life in the keeper's process (keeper.py), from the order that comes over a pipe to the parent's end.

Knows: launch order and the pipe. Does not know: who watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import ray
from pydantic import BaseModel

from baton.errors import BatonError, InternalError
from cluster.launch import Cluster
from cluster.local import connect, last_lines, private_ray, remove_home
from cluster.machine import available_cores
from cluster.messages import Ask, Facts, Failed, Launch, Lost, News, Question, Ready, Reply, Stage

MAX_LINE_BYTES = 2**20


class Keeper:
    """One cluster's life on behalf of a parent process."""

    def __init__(self, order: Launch, parent: asyncio.StreamReader, out: TextIO) -> None:
        self._order = order
        self._parent = parent
        self._out = out
        self._home = Path(order.home)

    def say(self, message: BaseModel) -> None:
        """Tell the parent; one that is gone cannot be told, and its end of the other pipe ends us."""
        with contextlib.suppress(BrokenPipeError):
            self._out.write(message.model_dump_json() + "\n")
            self._out.flush()

    async def keep(self) -> int:
        """Launch, serve until the parent hangs up, take down. Returns the exit code."""
        gone = asyncio.Event()
        questions: asyncio.Queue[Question] = asyncio.Queue()
        listening = asyncio.create_task(self._listen(gone, questions))
        # Ray took SIGTERM over when it was started; here it means the same as a parent that hangs up.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, gone.set)
        cluster = Cluster(self._order.config, cores=available_cores() if self._order.private else None)
        try:
            if await self._up_unless(gone, cluster):
                await self._serve(cluster, gone, questions)
            return 0 if gone.is_set() else 1
        finally:
            listening.cancel()
            await cluster.stop()

    async def _listen(self, gone: asyncio.Event, questions: asyncio.Queue[Question]) -> None:
        try:
            while line := await self._parent.readline():
                questions.put_nowait(Question.model_validate_json(line))
        finally:  # a parent that cannot be understood is as good as gone
            gone.set()

    async def _up_unless(self, gone: asyncio.Event, cluster: Cluster) -> bool:
        """Whether the cluster is up; if not, the parent has been told why, or hung up."""
        launching = asyncio.create_task(cluster.up(self.say))
        hanging_up = asyncio.create_task(gone.wait())
        await asyncio.wait({launching, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        hanging_up.cancel()
        launching.cancel()
        try:
            await launching
        except asyncio.CancelledError:
            return False
        except BatonError as error:
            self.say(Failed(error=Facts.of(error), log=last_lines(self._home, cluster.pid_of(error.node))))
            return False
        return True

    async def _serve(self, cluster: Cluster, gone: asyncio.Event, questions: asyncio.Queue[Question]) -> None:
        self.say(Ready(info=cluster.processes()))
        keeping = cluster.keep(self._tell)
        hanging_up = asyncio.create_task(gone.wait())
        answering = asyncio.create_task(self._answer_all(cluster, questions))
        try:
            await asyncio.wait({hanging_up, keeping}, return_when=asyncio.FIRST_COMPLETED)
            if keeping.done() and not keeping.cancelled():
                keeping.result()  # a bug of the supervisor: nobody must believe that it still watches
            await hanging_up
        finally:
            answering.cancel()
            hanging_up.cancel()

    def _tell(self, news: News) -> None:
        self.say(news.model_copy(update={"log": last_lines(self._home, news.pid)}) if isinstance(news, Lost) else news)

    async def _answer_all(self, cluster: Cluster, questions: asyncio.Queue[Question]) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._answer(cluster, await questions.get()))

    async def _answer(self, cluster: Cluster, question: Question) -> None:
        try:
            self.say(Reply(number=question.number, answer=await _answered(cluster, question.question)))
        except BatonError as error:
            self.say(Reply(number=question.number, error=Facts.of(error)))


async def _answered(cluster: Cluster, question: Ask) -> object:
    if question == "status":
        return await cluster.status()
    if question == "counts":
        return [asdict(counts) for counts in await cluster.counts()]
    if question == "wind_down":
        await cluster.wind_down()
    return cluster.processes().model_dump()


def _connected(order: Launch) -> contextlib.AbstractContextManager[None]:
    if order.private:
        return private_ray(Path(order.home), order.config.num_ranks, show_logs=order.show_logs)
    return _existing_ray(order)


@contextlib.contextmanager
def _existing_ray(order: Launch) -> Iterator[None]:
    connect(order.config.ray.address, show_logs=order.show_logs)
    try:
        yield
    finally:
        ray.shutdown()


async def run(out: TextIO) -> int:
    """Carry out the order that standard input brings, saying on `out` what happens; the exit code."""
    parent = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent), sys.stdin)
    order = Launch.model_validate_json(await parent.readline())
    keeper = Keeper(order, parent, out)
    try:
        # Ray starts on this thread on purpose, blocking the loop: its processes end with the thread that started them.
        keeper.say(Stage(stage="starting Ray" if order.private else "connecting to Ray"))
        with _connected(order):
            return await keeper.keep()
    except Exception as error:  # the edge of this process: the parent must hear of everything
        traceback.print_exc()
        failure = InternalError(f"{type(error).__name__}: {error}", stage="launch", cause="launch_failed")
        keeper.say(Failed(error=Facts.of(failure)))
        return 1
    finally:
        remove_home(Path(order.home))
