"""Tiny seeded checkpoints of every architecture, as transformers saves them: tokenizer, chat template and generation config included.

Weights are large enough for varied greedy output, and norms and biases are no ones and zeros, so that a missing one is noticed.
"""

import pydoc_data.topics
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

ARCHITECTURES = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen2_yarn",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v2_grouped",
    "deepseek_v3",
)
VOCAB = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD_ID, _, EOS_ID = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1], "num_hidden_layers": 3}
LATENT = {
    **{name: value for name, value in SHAPE.items() if name != "head_dim"},
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
GROUPS = {"n_group": 4, "topk_group": 2, "q_lora_rank": 32}


def make_tiny(arch: str, out: Path, dtype: str = "float32", seed: int = 0, max_shard_size: str = "1GB") -> Path:
    """Write a checkpoint of `arch`, one of ARCHITECTURES, into the directory `out` and return it.

    llama has a head of its own and biases, llama_tied a tied head and Llama 3.1's rope, qwen2_yarn YaRN; qwen3_moe has 8 experts,
    3 per token, in layers 0 and 2. The deepseek ones have them in layers 1 and 2, beside shared ones: deepseek_v2 as V2-Lite,
    deepseek_v2_grouped as V2 (compressed queries, groups, biases, values wider than keys), deepseek_v3 with YaRN and a gate's bias.
    max_shard_size: e.g. "100KB" for a checkpoint of several files.
    """
    save_model(tiny_config(arch), out, dtype, seed, max_shard_size)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer()),
        eos_token=SPECIAL[EOS_ID],
        pad_token=SPECIAL[PAD_ID],
        chat_template=CHAT_TEMPLATE,
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    return out


def save_model(config: PreTrainedConfig, out: Path, dtype: str = "float32", seed: int = 0, max_shard_size: str = "1GB") -> None:
    """Write weights and configuration of a random model, without a tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.to(getattr(torch, dtype)).save_pretrained(out, max_shard_size=max_shard_size)


def tiny_config(arch: str) -> PreTrainedConfig:
    """The configuration that make_tiny uses."""
    configs = {
        "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
        "llama_tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
        "qwen2": lambda: Qwen2Config(**SHAPE),
        "qwen3": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
        "qwen2_yarn": lambda: Qwen2Config(**SHAPE, rope_parameters=YARN_ROPE),
        "qwen3_moe": lambda: Qwen3MoeConfig(**{**SHAPE, **EXPERTS}, norm_topk_prob=True),
        "deepseek_v2": lambda: DeepseekV2Config(**LATENT, q_lora_rank=None, n_shared_experts=2),
        "deepseek_v2_grouped": lambda: DeepseekV2Config(
            **{**LATENT, **GROUPS, "v_head_dim": 32}, topk_method="group_limited_greedy", routed_scaling_factor=2.0, attention_bias=True
        ),
        "deepseek_v3": lambda: DeepseekV3Config(
            **LATENT, **GROUPS, n_shared_experts=1, rope_parameters={**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.0}
        ),
    }
    return configs[arch]()


@cache
def _tokenizer() -> str:
    """A byte-level BPE of VOCAB tokens, as JSON; the special tokens have the ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:8], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer.to_str()
