"""The model card: what was read, how long it was trained, what came of it. Every number is taken from the run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from .corpus import HELD_OUT_PERCENT, Corpus
from .loop import Plan, Progress
from .model import DemoModel

PLAIN_PROMPTS = ("def read_header(", "class Queue", '    """Return the number of', "The import statement")
CHAT_PROMPTS = (
    "What does os.path.join do?",
    "Explain str.split.",
    "How do I use json.dumps?",
    "Show me the source of textwrap.dedent.",
)
_SAMPLING = {"max_new_tokens": 120, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the card states besides the samples and the sizes of the files."""

    command: str
    corpus: Corpus
    train_tokens: int
    held_out_tokens: int
    plan: Plan
    progress: Progress
    final_held_out: float | None  # over the whole held-out side; measured at the last step


def card(facts: Facts, model: DemoModel, folder: Path) -> str:
    """The whole README of the model exported to `folder`."""
    return "\n".join(
        [
            *_introduction(facts),
            *_table("Data", _data(facts)),
            *_table("Network", _network(model, folder)),
            *_table("Training", _training(facts)),
            *_losses(facts.progress),
            *_samples(folder),
            *_limits(),
        ]
    )


def _introduction(facts: Facts) -> Iterator[str]:
    yield from ("---", "language: en", "library_name: transformers", "pipeline_tag: text-generation", "---", "")
    yield from ("# Baton demo model", "")
    yield "A few-million-parameter Qwen3-MoE that has read the Python standard library: its sources, its docstrings"
    yield "and the pydoc topics. It exists so that a serving cluster can be tried, tested and shown without a download."
    yield from ("", "This card is written by the training run:", "", "```sh", facts.command, "```", "")


def _table(title: str, rows: dict[str, str]) -> Iterator[str]:
    yield from (f"## {title}", "", "| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in rows.items())
    yield ""


def _data(facts: Facts) -> dict[str, str]:
    train, held_out = facts.corpus.side(held_out=False), facts.corpus.side(held_out=True)
    files = sorted({document.file for document in held_out})
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Corpus SHA-256": f"`{facts.corpus.sha256}`",
        "Split": f"by file, {HELD_OUT_PERCENT} % of files by the hash of their name",
        "Training": f"{len(train)} documents and their conversations, {facts.train_tokens:,} tokens",
        "Held out": f"{len(held_out)} documents and their conversations, {facts.held_out_tokens:,} tokens",
        "Held-out files": ", ".join(f"`{file}`" for file in files),
    }


def _network(model: DemoModel, folder: Path) -> dict[str, str]:
    shape = model.shape
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "Architecture": "`Qwen3MoeForCausalLM`, bfloat16, tied embeddings",
        "Parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
        "Layers": f"{shape.layers} of width {shape.hidden}",
        "Attention": f"{shape.heads} heads of {shape.head}, {shape.kv_heads} key/value heads",
        "Experts": f"{shape.experts} of width {shape.expert_width}, {shape.chosen} per token",
        "Vocabulary": f"{shape.vocab} byte-level BPE tokens, ChatML template",
        "Context": f"{shape.context} positions",
        "Size on disk": f"{size / 1e6:.1f} MB",
    }


def _training(facts: Facts) -> dict[str, str]:
    plan, progress = facts.plan, facts.progress
    tokens = progress.step * plan.tokens_per_step
    last = progress.checks[-1]
    rows = {
        "Steps": f"{progress.step} of {plan.steps}",
        "Tokens": f"{tokens:,} ({tokens / facts.train_tokens:.1f} epochs)",
        "Windows": f"{plan.early_length} tokens, {plan.late_length} from step {plan.fall_start}",
        "Optimizer": f"Muon {plan.muon_lr} for matrices, AdamW {plan.adam_lr} for the rest; warm-up, constant, cosine fall",
        "Seed": str(plan.seed),
        "Time": f"{progress.seconds / 60:.0f} min on {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}",
        "Training loss": f"{last.train_loss:.4f} nats per token, since the previous check",
        "Held-out loss": f"{last.held_out_loss:.4f} nats per token, on a fixed sample",
    }
    if facts.final_held_out is not None:
        rows["Held-out loss, whole"] = f"{facts.final_held_out:.4f} nats per token"
    return rows


def _losses(progress: Progress) -> Iterator[str]:
    yield from ("Losses on the way (held out: a fixed 40-window sample):", "")
    yield from ("| step | training | held out |", "|--:|--:|--:|")
    yield from (f"| {check.step} | {check.train_loss:.4f} | {check.held_out_loss:.4f} |" for check in progress.checks)
    yield ""


def _samples(folder: Path) -> Iterator[str]:
    """Seeded completions by the exported files, through transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    yield from ("## Samples", "", "At temperature 0.6 and top-p 0.9, first draw of seed 0; the prompt ends at `⟫`.", "")
    for prompt in PLAIN_PROMPTS:
        yield from _fenced(prompt + "⟫" + complete(model, tokenizer, tokenizer.encode(prompt)))
    for question in CHAT_PROMPTS:
        chat = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        yield from (f"**{question}**", "")
        yield from _fenced(complete(model, tokenizer, tokenizer.encode(rendered)))


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int]) -> str:
    """Continues as the card says."""
    torch.manual_seed(0)
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    out = model.generate(tokens, attention_mask=mask, **_SAMPLING)
    return str(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))


def _fenced(text: str) -> tuple[str, ...]:
    return "````text", text, "````", ""


def _limits() -> Iterator[str]:
    yield from ("## Limits", "")
    yield "It speaks in the manner of the Python documentation and is not to be believed. It was trained on windows of at"
    yield "most a few hundred tokens; longer contexts run but drift. The corpus is covered by the Python Software"
    yield from ("Foundation License, and so is what the model repeats of it.", "")
