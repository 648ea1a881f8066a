"""The whole relay as one Python object, for scripts, notebooks and tests.

    with Engine("demo/model", {"prefill": {"tp": 2}}) as engine:
        print(engine.generate("def main():", {"max_tokens": 32})[0].text)

It starts the same processes as `baton serve` and talks to them over the same gRPC. Knows: the client and the keeper. Does not know: Ray.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

from baton.client import Answer, Client, Options, PromptLike
from baton.config import BatonConfig, load_config
from baton.errors import InvalidRequest
from cluster.kept import KeptCluster, Watch
from cluster.messages import ClusterInfo, News, Progress, Stage
from ranks.facts import RankCounts

_IDLE_POLL_S = 0.1
_CLOSE_S = 10.0

Prompts = str | Sequence[PromptLike]
T = TypeVar("T")


class Engine:
    """A cluster of its own, with its own Ray unless ray.address says otherwise. Ends with `close` or the `with` block.

    model: checkpoint directory. config: a BatonConfig, or settings as in a YAML file. overrides: settings by dotted name, say
    **{"prefill.tp": 2}; they win. Ports are any free ones unless set. Blocks until the cluster serves; raises what the launch failed with.
    """

    def __init__(
        self, model: str, config: BatonConfig | Mapping[str, object] | None = None, watch: Watch | None = None, **overrides: object
    ) -> None:
        self._config = _config(model, config, overrides)
        self._cluster = KeptCluster(self._config)
        self.info: ClusterInfo = self._cluster.start(watch or _unwatched)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()
        self._client = self._run(_open(self.info.grpc, self._config.router.api_keys))

    def generate(self, prompts: Prompts, sampling_params: Options | Sequence[Options] | None = None) -> list[Answer]:
        """Answers in the order of the prompts (n of them per prompt where n > 1), all prompts running at the same time.

        prompts: one text, or a list whose items are texts, lists of token ids or lists of chat messages.
        sampling_params: fields of baton.client.Options for all prompts, or one such mapping per prompt. Raises the first BatonError.
        """
        listed = _listed(prompts)
        options = _one_each(sampling_params, len(listed))
        answers = self._run(self._all(listed, options))
        return [answer for choices in answers for answer in choices]

    async def _all(self, prompts: Sequence[PromptLike], options: Sequence[Options]) -> list[list[Answer]]:
        # More at once would only wait in the router, against the requests' deadlines.
        slots = asyncio.Semaphore(self._config.router.max_running)

        async def one(prompt: PromptLike, asked: Options) -> list[Answer]:
            async with slots:
                return await self._client.complete(prompt, **asked)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt, asked)) for prompt, asked in zip(prompts, options, strict=True)]
        return [task.result() for task in tasks]

    def processes(self) -> ClusterInfo:
        """The processes of this moment: nodes that lost one are built again. `info` is how they were when the engine was new."""
        return self._cluster.processes()

    def wait_news(self, timeout_s: float) -> News | None:
        """What next happens to the cluster by itself (a process lost, a node being rebuilt, back); None after `timeout_s`."""
        return self._cluster.wait_news(timeout_s)

    def status(self) -> dict[str, Any]:
        """Groups and pairs as the router sees them."""
        return self._cluster.status()

    def flush_cache(self, node: str = "") -> int:
        """Forget cached prefixes that no sequence uses, on a node ("prefill-0") or ("") on all; blocks that are free now and were not."""
        return self._run(self._client.flush_cache(node))

    def counts(self) -> list[RankCounts]:
        """What every living rank holds now."""
        return self._cluster.counts()

    def wait_idle(self, timeout_s: float = 10.0) -> list[RankCounts]:
        """The counts once every rank is idle, or after `timeout_s`: an answer may arrive before its last block is given back."""
        end_s = time.monotonic() + timeout_s
        while True:
            counts = self.counts()
            if all(rank.idle() for rank in counts) or time.monotonic() >= end_s:
                return counts
            time.sleep(_IDLE_POLL_S)

    def close(self) -> None:
        """End every process of the cluster. Safe to call twice."""
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
            self._loop.close()
        self._cluster.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            future.cancel()  # a Ctrl-C while waiting: the requests end, too


async def _open(address: str, api_keys: Sequence[str]) -> Client:
    return Client(address, api_keys[0] if api_keys else None)


def _config(model: str, config: BatonConfig | Mapping[str, object] | None, overrides: Mapping[str, object]) -> BatonConfig:
    given = config.model_dump() if isinstance(config, BatonConfig) else dict(config or {})
    ports: dict[str, object] = {} if isinstance(config, BatonConfig) else {"router.http_port": 0, "router.grpc_port": 0}
    return load_config(None, {**ports, **_flat(given), **overrides, "model": model})


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name. Label mappings of ray.* stay whole."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and not name.endswith("_label"):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _listed(prompts: Prompts) -> Sequence[PromptLike]:
    if isinstance(prompts, str):
        return [prompts]
    if any(isinstance(item, int | Mapping) for item in prompts):
        raise InvalidRequest("prompts is a list of prompts; put the token ids or messages of one prompt into a list of their own")
    return prompts


def _one_each(params: Options | Sequence[Options] | None, num_prompts: int) -> Sequence[Options]:
    if params is None or isinstance(params, Mapping):
        return [cast(Options, dict(params or {})) for _ in range(num_prompts)]
    if len(params) != num_prompts:
        raise InvalidRequest(f"{len(params)} sampling_params for {num_prompts} prompts; give one for all, or one each")
    return [cast(Options, dict(item)) for item in params]


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _unwatched(event: Stage | Progress) -> None:
    """Nobody wants to see the launch."""
