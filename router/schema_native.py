"""SGLang's native /generate: what clients may send, and what it means as GenerateRequests. Knows no HTTP and no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from baton.request import GenerateRequest
from router.schema import (
    MAX_LOGPROBS,
    MAX_RID_CHARS,
    Accepted,
    Count,
    Few,
    Limits,
    PromptList,
    Prompts,
    SamplingFields,
    Seed,
    as_prompt,
    check_counts,
    nothing,
    part_ids,
)


class NativeSampling(SamplingFields):
    """SGLang's sampling_params."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **nothing("presence_penalty", "frequency_penalty", "logit_bias", "json_schema", "regex", "ebnf", "structural_tag"),
        **nothing("stop_regex", "no_stop_trim", "custom_params", "stream_interval"),
        "repetition_penalty": (1.0,),
        "spaces_between_special_tokens": (True,),
    }

    max_new_tokens: Count | None = None
    min_new_tokens: int | None = Field(None, ge=0, lt=2**31)
    sampling_seed: Seed | None = None


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value


class NativeBody(Accepted):
    """POST /generate. Exactly one of text and input_ids; sampling_params is one object for all prompts, or one for each."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **nothing("image_data", "video_data", "audio_data", "modalities", "input_embeds", "lora_path", "lora_id", "session_params"),
        **nothing("session_id", "return_hidden_states", "token_ids_logprob", "custom_logit_processor", "priority", "extra_key"),
        **nothing("background", "require_reasoning", "return_routed_experts", "custom_labels"),
        "logprob_start_len": (-1,),
    }
    ignored = frozenset({"log_metrics", "no_logs", "model"})

    text: Prompts | None = None
    input_ids: Prompts | None = None
    sampling_params: Annotated[tuple[NativeSampling, ...], BeforeValidator(_as_list), Few] = (NativeSampling(),)
    stream: bool = False
    return_logprob: bool = False
    top_logprobs_num: int = Field(0, ge=0, le=MAX_LOGPROBS)
    return_text_in_logprobs: bool = False
    rid: str = Field("", max_length=MAX_RID_CHARS)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("give either text or input_ids")
        if self.text is not None and not self.text.is_text:
            raise ValueError("text must be text or a list of texts; token ids go in input_ids")
        if len(self.sampling_params) not in (1, len(self.prompts.items)):
            raise ValueError(f"sampling_params has {len(self.sampling_params)} entries for {len(self.prompts.items)} prompts")
        return self

    @property
    def prompts(self) -> PromptList:
        """Text or token ids, whichever was given."""
        given = self.text or self.input_ids
        assert given is not None
        return given

    @property
    def samplings(self) -> tuple[NativeSampling, ...]:
        """One for each prompt."""
        params, count = self.sampling_params, len(self.prompts.items)
        return params * count if len(params) == 1 else params

    def requests(self, request_id: str, timeout_s: float | None, limits: Limits) -> tuple[GenerateRequest, ...]:
        """One request per prompt; without a limit 128 tokens each."""
        prompts = self.prompts.items
        check_counts([sampling.n for sampling in self.samplings], limits)
        ids = part_ids(self.rid or request_id, len(prompts))
        return tuple(self._request(*part, timeout_s) for part in zip(prompts, self.samplings, ids, strict=True))

    def _request(
        self, prompt: str | tuple[int, ...], sampling: NativeSampling, request_id: str, timeout_s: float | None
    ) -> GenerateRequest:
        logprobs = self.top_logprobs_num if self.return_logprob else None
        return GenerateRequest(
            prompt=as_prompt(prompt),
            sampling=sampling.asked(sampling.max_new_tokens, sampling.min_new_tokens, sampling.sampling_seed, logprobs),
            request_id=request_id,
            n=sampling.n,
            stream=self.stream,
            default_max_tokens=128,
            timeout_s=timeout_s,
        )
