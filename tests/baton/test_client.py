"""The blocking client against a real router over echo nodes, and how prompts and options become requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from baton.client import SyncClient, connect, gather, make_request
from baton.config import BatonConfig, RouterConfig
from baton.errors import InternalError, InvalidRequest, NotFound, Unavailable
from baton.request import Chunk, FinishReason, Usage
from router.server import RouterServer
from tests.router.echo_nodes import EchoNode
from tests.router.echo_tokenizer import save_tokenizer

PROMPT = "hello echo "


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A router in a thread of its own."""
    model_dir = save_tokenizer(tmp_path_factory.mktemp("echo"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    nodes = EchoNode("prefill", "prefill-0"), EchoNode("decode", "decode-0")
    settings = RouterConfig(http_port=0, grpc_port=0)

    async def start() -> tuple[RouterServer, str]:
        server = RouterServer(BatonConfig(model=str(model_dir), router=settings))
        addresses = await server.start()
        for node in nodes:
            server.dispatcher.add_group(node.role, await node.start())
        await server.wait_ready(20)
        return server, addresses["grpc"]

    async def stop(server: RouterServer) -> None:
        await server.stop()
        for node in nodes:
            await node.stop()

    server, where = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    yield where
    asyncio.run_coroutine_threadsafe(stop(server), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def client(address: str) -> Iterator[SyncClient]:
    with connect(address) as client:
        yield client


def test_streaming_and_whole_answers(client: SyncClient) -> None:
    chunks = list(client.generate(PROMPT, max_tokens=22, temperature=0.0))
    assert "".join(chunk.text for chunk in chunks) == PROMPT * 2
    (answer,) = client.complete(PROMPT, max_tokens=11, temperature=0.0, stop=["echo"])
    assert (answer.text, answer.finish_reason, answer.stopped_by) == ("hello ", FinishReason.STOP, "echo")
    assert answer.usage == Usage(prompt_tokens=11, completion_tokens=10, cached_tokens=0)


def test_leaving_early_and_asking_again(client: SyncClient) -> None:
    stream = client.generate(PROMPT, max_tokens=2000, request_id="again")
    next(stream)
    stream.close()
    (answer,) = client.complete(PROMPT, max_tokens=5, request_id="again", temperature=0.0)
    assert answer.text == "hello"


def test_errors_models_status_and_drain(client: SyncClient) -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        client.complete(PROMPT, min_tokens=5, max_tokens=2)
    assert client.models()[0].max_model_len == 4096
    assert client.status().ready
    assert client.flush_cache() == client.flush_cache("prefill-0") == 0
    for call in (lambda: client.drain("nobody", 0), lambda: client.restore("nobody"), lambda: client.flush_cache("nobody")):
        with pytest.raises(NotFound, match="prefill-0"):
            call()


@pytest.mark.parametrize("letter", ["x", "é", "→"])
@pytest.mark.parametrize("length", [5000, 50_000])
def test_an_error_with_much_to_say_stays_what_it_is(client: SyncClient, letter: str, length: int) -> None:
    """gRPC refuses metadata beyond a limit, at random shortly below it, and the client would see another error."""
    for _ in range(10):
        with pytest.raises(NotFound, match=f"there is no node '{letter}{{1000}}") as caught:
            client.flush_cache(letter * length)
        assert caught.value.message.endswith("…")


def test_nobody_there_is_unavailable() -> None:
    with connect("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.complete(PROMPT, timeout_s=5)


@pytest.mark.parametrize("prompt", [[1, "x"], [{"role": "user"}], [{"role": "user", "content": "x"}, 3]])
def test_a_prompt_is_text_ids_or_messages(prompt) -> None:
    with pytest.raises(InvalidRequest, match="a prompt is"):
        make_request(prompt, {})


def test_options_that_were_not_given_stay_open() -> None:
    request = make_request([1, 2], {})
    assert request.prompt.token_ids == (1, 2)
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (None, None, None)


def test_a_stream_that_ends_too_early_is_a_bug_of_ours() -> None:
    with pytest.raises(InternalError, match="without usage"):
        gather([Chunk("r", 0, "x")])
    with pytest.raises(InternalError, match="no finish reason"):
        gather([Chunk("r", 0, "x", usage=Usage())])
