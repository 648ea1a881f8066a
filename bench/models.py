"""`python -m bench.models OUT [NAME ...]`: the seeded checkpoints that speed is measured on.

Shapes follow public model families; the weights are random, so text is meaningless and speed is not.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.errors import ConfigError

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMALL = {"vocab_size": 32000, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
_EXPERTS = {"moe_intermediate_size": 384, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
# model_type of transformers, and what differs from its defaults.
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3-60m": ("qwen3", {**_SMALL, "num_hidden_layers": 12, "intermediate_size": 1536}),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
        },
    ),
    "qwen3moe-200m": ("qwen3_moe", {**_SMALL, "num_hidden_layers": 8, "intermediate_size": 1536, **_EXPERTS}),
}
_MAX_TOKENS = 16000
_NUM_TEXTS = 150


def made(name: str, folder: Path) -> Path:
    """folder/name, made unless it is there: the same everywhere with the same versions of Python, torch and transformers.

    Raises ConfigError for a name of no shape here.
    """
    if name not in SHAPES:
        raise ConfigError(f"{name} is no model of the benchmark; known are {', '.join(SHAPES)}")
    out = folder / name
    if not (out / "model.safetensors").is_file():
        out.mkdir(parents=True, exist_ok=True)
        _save_tokenizer(min(SHAPES[name][1]["vocab_size"], _MAX_TOKENS), out)
        _save_model(name, out)
    return out


def _save_tokenizer(vocab_size: int, out: Path) -> None:
    """A byte-level BPE of the standard library's sources."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    texts = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:_NUM_TEXTS]
    tokenizer.train([str(path) for path in texts], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(out)


def _save_model(name: str, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape = SHAPES[name]
    torch.manual_seed(0)
    ids = {"eos_token_id": 2, "bos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, max_position_embeddings=131072, rope_theta=1e6, tie_word_embeddings=True, **ids, **shape)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Make them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the checkpoints")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)} (all)")
    options = parser.parse_args(argv)
    try:
        for name in options.names or SHAPES:
            print(made(name, options.out))
    except ConfigError as error:
        print(f"bench.models: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
