"""Proof of pairs: a pair of nodes is used only after a tiny real request has run through exactly it; so is a decode group alone.

Knows when a pair needs a proof and how long to wait after a failed one; never gives a pair up (a fault must not become
permanent by its first occurrence). While one pair is under proof, others serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from baton.deadline import Deadline
from baton.errors import BatonError, InternalError
from baton.request import Sampling
from baton.telemetry import fields
from router.fleet import Fleet
from router.group import Pair
from router.life import SequenceLife
from router.relay import Relay

log = logging.getLogger(__name__)

PROOF_TIMEOUT_S = 60.0
PROOF_TOKENS = 2  # the first comes from prefill, the second needs a pull and a decode step
_FIRST_RETRY_S, _LAST_RETRY_S = 0.25, 10.0
_LOOK_EVERY_S = 30.0


class Prover:
    """State owner: the router's loop. One task per pair under proof; it ends when the pair is proven or not reachable."""

    def __init__(self, fleet: Fleet, prompt_ids: Sequence[int]) -> None:
        self._fleet = fleet
        self._prompt_ids = tuple(prompt_ids)
        self._proofs: dict[Pair, asyncio.Task[None]] = {}
        self._num_proofs = 0

    async def run(self) -> None:
        """Prove whatever needs it, until cancelled."""
        try:
            while True:
                self._start_proofs()
                await self._fleet.changed(_LOOK_EVERY_S)
        finally:
            for task in self._proofs.values():
                task.cancel()
            if self._proofs:
                await asyncio.wait(self._proofs.values())

    def _start_proofs(self) -> None:
        for pair in self._fleet.registry.pairs():
            if pair.reachable and not pair.proven and pair not in self._proofs:
                self._proofs[pair] = asyncio.create_task(self._prove(pair), name=f"proof of {pair.name}")

    async def _prove(self, pair: Pair) -> None:
        retry_s, lives = _FIRST_RETRY_S, pair.lives
        try:
            while pair.reachable and not pair.proven:
                if pair.lives != lives:  # what another life did wrong is none of this one's business
                    retry_s, lives = _FIRST_RETRY_S, pair.lives
                error = await self._try(pair)
                if error is not None and pair.lives == lives:
                    self._failed(pair, error)
                    await self._pause(pair, retry_s)
                    retry_s = min(2 * retry_s, _LAST_RETRY_S)
        finally:
            del self._proofs[pair]
            self._fleet.notify()

    def _failed(self, pair: Pair, error: BatonError) -> None:
        pair.last_error = error.message
        pair.lasting_failures = 0 if error.retryable else pair.lasting_failures + 1
        self._fleet.notify()
        log.warning("a pair failed its proof", extra=fields(pair=pair.name, cause=error.cause, why=error.message))

    async def _pause(self, pair: Pair, pause_s: float) -> None:
        """Wait before another try, but not for a pair that has begun a new life, or is gone."""
        lives, deadline = pair.lives, Deadline.after(pause_s)
        while pair.lives == lives and pair.reachable and await self._fleet.changed(deadline.left_s()):
            continue

    async def _try(self, pair: Pair) -> BatonError | None:
        """Run one request through the pair. It proves these two lives of the nodes, not those that may have come meanwhile."""
        self._num_proofs += 1
        sampling = Sampling(max_tokens=PROOF_TOKENS, temperature=0.0)
        # Nodes outlive routers: what one asked for must not be taken for what another does.
        life = SequenceLife(f"proof-{self._fleet.incarnation.hex()[:8]}-{self._num_proofs}", self._prompt_ids, sampling)
        lives = pair.lives
        try:
            await Relay(self._fleet, life, Deadline.after(PROOF_TIMEOUT_S), lambda delivery: None, only=pair).run()
        except BatonError as error:
            return error
        except Exception as error:
            log.exception("a proof failed for a reason of ours")
            return InternalError(f"the router failed: {error!r}", stage="router")
        if pair.lives == lives:
            pair.proven, pair.last_error, pair.lasting_failures = True, "", 0
            log.info("proved a pair", extra=fields(pair=pair.name))
        return None
