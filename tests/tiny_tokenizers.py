"""Tiny tokenizer directories as checkpoints have them, without torch: byte-level like Qwen's, and with byte fallback like Llama 2's."""

import json
import pydoc_data.topics
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% for message in messages %}\n"
    "    {% if message['role'] == 'assistant' %}\n"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "    {% else %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + eos_token }}\n"
    "    {% endif %}\n"
    "    {% if loop.index > 50 %}{% break %}{% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BYTE_LEVEL_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FALLBACK_SPECIAL = ("<unk>", "<s>", "</s>")


def make_byte_level(out: Path) -> Path:
    """Byte-level BPE, 500 tokens, no BOS; eos <|im_end|> (2), a chat template, sampling defaults and two eos ids."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(byte_level_json(), encoding="utf-8")
    _write(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    _write(out / "generation_config.json", eos_token_id=[2, 0], do_sample=True, temperature=0.7, top_k=20, top_p=0.8)
    _write(out / "config.json", eos_token_id=0)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return out


def make_byte_fallback(out: Path) -> Path:
    """BPE over characters with <0x..> tokens for the rest, a BOS and spaces written as ▁; no chat template."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(byte_fallback_json(), encoding="utf-8")
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    _write(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token=eos)
    _write(out / "config.json", eos_token_id=2)
    return out


@cache
def byte_level_json() -> str:
    """The tokenizer.json of make_byte_level."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(BYTE_LEVEL_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer.to_str()


@cache
def byte_fallback_json() -> str:
    """The tokenizer.json of make_byte_fallback."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*FALLBACK_SPECIAL, *spelled], show_progress=False)
    tokenizer.train_from_iterator([line for text in _corpus() for line in text.splitlines()], trainer)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"][3:]:  # byte tokens belong to the vocabulary only
        assert token["content"] in spelled
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


def _corpus() -> list[str]:
    return list(pydoc_data.topics.topics.values())[:6]


def _write(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
