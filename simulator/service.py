"""The gRPC faces that a simulated world needs beside its nodes': the router's, and clients that check what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from baton.request import GenerateRequest, Prompt, Sampling, SamplingAsked
from baton.rpc import to_error
from baton.v1 import inference_pb2_grpc
from baton.wire import chunk_from_message, generate_request_to_message
from router.admission import sequence_seed
from router.dispatch import Dispatcher
from router.service import InferenceService, Keys
from simulator.invariants import ChoiceRecord, Record
from simulator.loop import Process
from simulator.model import EOS_ID, answer
from simulator.network import Network
from simulator.schedule import Ask, Schedule
from simulator.stream import SimCall

STALL_S = 8.0  # longer than a router is patient with it


def serve(server: grpc.aio.Server, dispatcher: Dispatcher, slow_client_s: float) -> None:
    """Have a router's server answer clients."""
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(dispatcher, Keys(()), slow_client_s), server)


class Client:
    """One client process. State owner: the world. records: of all its requests, in the order they began.

    absent: whether there is no router that could answer now.
    """

    def __init__(self, network: Network, process: Process, address: str, absent: Callable[[], bool], plan: Schedule) -> None:
        self.process = process
        self.records: list[Record] = []
        self._loop = network.loop
        self._absent = absent
        self._plan = plan
        self._stub = inference_pb2_grpc.InferenceStub(network.opener(process)(address))

    async def ask(self, ask: Ask) -> Record:
        """Make one request and see it to its end. Raises Violation."""
        name, prompt_len = f"request {len(self.records)}", len(ask.prompt_ids)
        record = Record(
            name,
            self._loop.now_s,
            ask.timeout_s,
            _choices(ask),
            prompt_len,
            roomy=self._plan.roomy,
            sure=not self._plan.lossy_pulls,
            tokenless=self._plan.tokenless,
            excused=self._absent(),
        )
        self.records.append(record)
        call: SimCall = self._stub.Generate(generate_request_to_message(_request(ask, record)), timeout=ask.timeout_s)
        try:
            await self._listen(ask, record, call)
        except grpc.aio.AioRpcError as error:
            record.end(self._loop.now_s, to_error(error), gave_up=call.gave_up)
        return record

    async def _listen(self, ask: Ask, record: Record, call: SimCall) -> None:
        num_chunks = 0
        while True:
            if num_chunks == ask.leaves_after:
                call.cancel()
                record.outcome = "left"
                return
            if num_chunks == ask.stalls_after:
                record.stalled = True
                await asyncio.sleep(STALL_S)
            try:
                record.take(chunk_from_message(await anext(call)))
            except StopAsyncIteration:
                record.end(self._loop.now_s, None, gave_up=False)
                return
            num_chunks += 1


def _choices(ask: Ask) -> list[ChoiceRecord]:
    stop = _stop(ask)
    expected = [answer(ask.prompt_ids, _sampling(ask, index), stop) for index in range(ask.n)]
    return [ChoiceRecord(answer, ask.num_logprobs is not None) for answer in expected]


def _sampling(ask: Ask, index: int) -> Sampling:
    return Sampling(
        max_tokens=ask.max_tokens,
        min_tokens=ask.min_tokens,
        temperature=0.0 if ask.greedy else 1.0,
        seed=sequence_seed(ask.seed, index),
        stop_token_ids=() if ask.ignore_eos else (EOS_ID,),
    )


def _stop(ask: Ask) -> str:
    """A piece of the first choice's undisturbed text, to be found again."""
    if ask.stop_at is None:
        return ""
    text = answer(ask.prompt_ids, _sampling(ask, 0)).text
    at = int(ask.stop_at * len(text))
    return text[at : at + 2]


def _request(ask: Ask, record: Record) -> GenerateRequest:
    stop = _stop(ask)
    asked = SamplingAsked(
        max_tokens=ask.max_tokens,
        min_tokens=ask.min_tokens,
        temperature=0.0 if ask.greedy else 1.0,
        seed=ask.seed,
        stop=(stop,) if stop else (),
        ignore_eos=ask.ignore_eos,
        logprobs=ask.num_logprobs,
    )
    prompt = Prompt(token_ids=ask.prompt_ids)
    return GenerateRequest(prompt, asked, request_id=record.name.replace(" ", "-"), n=ask.n, stream=ask.stream)
