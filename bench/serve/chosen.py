"""The requests and arrival times that the options ask for. Knows options, data sets and where tokenizers are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from baton.errors import ConfigError
from baton.tokenizer import Tokenizer
from bench.serve.arrivals import arrivals
from bench.serve.asks import Ask
from bench.serve.datasets import Lengths, prefix_asks, random_asks
from bench.serve.options import dataset
from bench.serve.recorded import TraceScale, mooncake_asks, sharegpt_asks
from bench.serve.vocabulary import Vocabulary


def make_asks(options: argparse.Namespace, model: str) -> list[Ask]:
    """The data set. Raises ConfigError."""
    name = dataset(options)
    tokenizer = Tokenizer.load(tokenizer_dir(options.tokenizer or options.model or model))
    rng = np.random.default_rng(options.seed)
    if name == "sharegpt":
        return sharegpt_asks(options.dataset_path, tokenizer, options.num_prompts, options.sharegpt_output_len, rng)
    vocabulary = Vocabulary(tokenizer)
    if name == "mooncake":
        scale = TraceScale(options.mooncake_slowdown_factor, options.mooncake_length_scale, options.mooncake_block_size)
        return mooncake_asks(options.dataset_path, vocabulary, options.num_prompts, scale, options.seed)
    if name == "prefix":
        lengths = (options.prefix_repetition_prefix_len, options.prefix_repetition_suffix_len, options.prefix_repetition_output_len)
        num_prefixes = options.prefix_repetition_num_prefixes
        return prefix_asks(vocabulary, options.num_prompts, num_prefixes, lengths, rng, as_ids=options.tokenize_prompt)
    wanted = Lengths(options.random_input_len, options.random_output_len, *options.random_range_ratio)
    return random_asks(vocabulary, options.num_prompts, wanted, options.random_prefix_len, rng, as_ids=options.tokenize_prompt)


def tokenizer_dir(name: str) -> str:
    """A checkpoint directory, or a hub's name, of which only the tokenizer's files are fetched. Raises ConfigError."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=["*token*.json", "config.json", "generation_config.json", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"{name} is no checkpoint directory and cannot be fetched; say where one is: --tokenizer DIR") from error


def arrival_s(options: argparse.Namespace, asks: Sequence[Ask]) -> list[float]:
    """Seconds after the start, ascending: as the trace has them, unless --no-self-timed; else by rate and burstiness."""
    recorded = [ask.at_s for ask in asks if ask.at_s is not None]
    if options.self_timed and len(recorded) == len(asks):
        return recorded
    return arrivals(len(asks), options.request_rate, options.burstiness, np.random.default_rng([options.seed, 1]))
