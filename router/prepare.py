"""From what a client asked to what nodes are asked: limits checked, the prompt tokenised, every number resolved. Knows no nodes."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from baton.config import BatonConfig
from baton.deadline import Deadline
from baton.errors import DeadlineExceeded, NotFound
from baton.request import SEED_BITS, GenerateRequest
from baton.tokenizer import Tokenizer
from router.admission import Limits, check_prompt, check_request, resolve, sequence_seed
from router.choices import Prepared

_NUM_TOKENIZER_THREADS = 2
_SHORT_CHARS = 512  # tokenised in the time that handing it to a thread and back would take


class Preparer:
    """State owner: itself; its threads end with `close`. chance: where seeds come from that clients did not choose."""

    def __init__(self, config: BatonConfig, tokenizer: Tokenizer, chance: random.Random) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._chance = chance
        self._threads = ThreadPoolExecutor(_NUM_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Tokenise no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self, request: GenerateRequest) -> None:
        """Refuse at once what can be refused without its prompt's tokens. Raises InvalidRequest, or NotFound for another model."""
        check_request(request, self._limits(max_model_len=self._config.max_model_len))
        if request.model not in ("", self._config.name):
            raise NotFound(
                f"there is no model {request.model!r}; this cluster serves {self._config.name!r}",
                stage="router",
                cause="model_not_found",
                param="model",
            )

    async def tokenised(self, request: GenerateRequest, deadline: Deadline) -> tuple[tuple[int, ...], str]:
        """The prompt's ids, and its text if it is to be repeated, "" otherwise. Raises InvalidRequest, DeadlineExceeded."""
        prompt = request.prompt
        if not request.echo and (prompt.token_ids is not None or (prompt.text is not None and len(prompt.text) <= _SHORT_CHARS)):
            return self._tokenise(request)
        try:
            async with asyncio.timeout(deadline.left_s()):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._tokenise, request)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the prompt was tokenised", stage="admission") from None

    def prepared(self, request: GenerateRequest, prompt_ids: tuple[int, ...], echo_text: str, max_model_len: int) -> Prepared:
        """The request as its relays need it. max_model_len: of the cluster, tokens. Raises InvalidRequest."""
        check_prompt(prompt_ids, self._limits(max_model_len))
        sampling = resolve(
            request.sampling,
            self._tokenizer.sampling_defaults,
            self._tokenizer.eos_ids,
            prompt_len=len(prompt_ids),
            max_model_len=max_model_len,
            default_max_tokens=request.default_max_tokens,
            drawn_seed=self._chance.getrandbits(SEED_BITS),
        )
        return Prepared(
            request_id=request.request_id,
            prompt_ids=prompt_ids,
            samplings=tuple(replace(sampling, seed=sequence_seed(sampling.seed, i)) for i in range(request.n)),
            stop=request.sampling.stop,
            skip_special_tokens=request.sampling.skip_special_tokens,
            echo_text=echo_text,
        )

    def _limits(self, max_model_len: int) -> Limits:
        router = self._config.router
        return Limits(
            max_model_len,
            self._tokenizer.vocab_size,
            max_n=router.max_n,
            max_timeout_s=router.max_timeout_s,
            max_stop_strings=router.max_stop_strings,
            max_stop_chars=router.max_stop_chars,
        )

    def _tokenise(self, request: GenerateRequest) -> tuple[tuple[int, ...], str]:
        """Runs in a thread unless it is quick; the tokenizer is safe to share."""
        prompt = request.prompt
        if prompt.messages is not None:
            ids = self._tokenizer.render_chat(prompt.messages, prompt.add_generation_prompt, prompt.template_values)
        elif prompt.text is not None:
            ids = self._tokenizer.encode(prompt.text)
        else:
            ids = prompt.token_ids or ()
        if not request.echo:
            return ids, ""
        return ids, self._tokenizer.decode(ids) if prompt.text is None else prompt.text
