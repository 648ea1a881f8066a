"""The committed model is what its card says, and transformers can speak with it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).parents[2] / "demo" / "model"
SIZE_LIMIT = 15_000_000


@pytest.fixture(scope="module")
def card() -> dict[str, str]:
    """The rows of the card's two-column tables."""
    text = (MODEL / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def _size() -> int:
    return sum(file.stat().st_size for file in MODEL.iterdir())


def test_files_fit_the_repository(card):
    assert _size() <= SIZE_LIMIT
    assert float(card["Size on disk"].removesuffix(" MB")) == pytest.approx(_size() / 1e6, abs=0.1)


def test_card_identifies_the_corpus(card):
    assert re.fullmatch(r"`[0-9a-f]{64}`", card["Corpus SHA-256"])
    assert re.fullmatch(r"CPython 3\.\d+\.\d+", card["Python"])
    assert card["Split"].startswith("by file")


def test_card_states_a_finished_run(card):
    done, planned = card["Steps"].split(" of ")
    assert done == planned
    assert 0 < float(card["Training loss"].split()[0]) < float(card["Held-out loss, whole"].split()[0]) < 4


def test_card_counts_the_parameters(card):
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        tensors = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118 - not a mapping
        assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}
        count = sum(torch.Size(tensor.get_shape()).numel() for tensor in tensors)
    assert int(card["Parameters"].replace(",", "")) == count


def test_either_end_token_ends_a_generation(tokenizer):
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == ["<|im_end|>", "<|endoftext|>"]


def test_chat_template_is_chatml(tokenizer):
    chat = [{"role": "user", "content": "Explain str.split."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nExplain str.split.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(rendered)) == rendered


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "naïve — “日本語” 🐍\t\r\n", ""])
def test_tokenizer_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@torch.no_grad()
def test_transformers_continues_a_definition(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompt = torch.tensor([tokenizer.encode("    def __init__(self")])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, prompt.shape[1] :])
    assert "):\n" in text and "self." in text
