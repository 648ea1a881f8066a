"""Command line: collect, tokenize, train, export, write the card."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from .card import Facts, card
from .corpus import Corpus, collect
from .data import stream, texts
from .export import export
from .loop import Plan, Progress, Trainer
from .model import TINY, DemoModel, Shape
from .tokenizer import train_tokenizer

TINY_FILES = 20


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, rewritten at every check")
    parser.add_argument("--steps", type=int, default=1080)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a toy shape and a sliver of the corpus, to try the path")
    parser.add_argument("--compile", action="store_true", help="fuse with torch.compile; needs a C++ compiler")
    parser.add_argument("--checkpoint", type=Path, help="resumed from if it exists, rewritten at every check")
    return parser.parse_args()


def plan_for(options: argparse.Namespace) -> Plan:
    """The plan of the real run, or one small enough to be a test."""
    if options.tiny:
        return Plan(options.steps, options.seed, tokens_per_step=128, micro_tokens=64, early_length=32, late_length=32)
    return Plan(options.steps, options.seed)


def command(options: argparse.Namespace) -> str:
    """The command that repeats this run from the start."""
    flags = " --tiny" * options.tiny + " --compile" * options.compile
    return f"python -m demo.train --out demo/model --steps {options.steps} --seed {options.seed}{flags}"


def run(options: argparse.Namespace, shape: Shape, plan: Plan, corpus: Corpus) -> None:
    """Trains from the corpus to the exported model."""
    plain, chats = texts(corpus, held_out=False, seed=plan.seed)
    tokenizer = train_tokenizer(plain, shape.vocab, shape.context)
    train = stream(tokenizer, plain, chats, plan.seed)
    held_out = stream(tokenizer, *texts(corpus, held_out=True, seed=plan.seed), plan.seed)
    model = DemoModel(shape)
    trainer = Trainer(model, plan, train, held_out)
    if options.checkpoint and options.checkpoint.exists():
        trainer.resume(options.checkpoint)
    if options.compile:
        model.compile()

    def on_check(progress: Progress) -> None:
        final = trainer.held_out_loss(len(held_out)) if progress.step == plan.steps else None
        facts = Facts(command(options), corpus, len(train), len(held_out), plan, progress, final)
        export(model, tokenizer, options.out, partial(card, facts, model))
        if options.checkpoint:
            trainer.save(options.checkpoint)

    if trainer.progress.step == plan.steps:
        on_check(trainer.progress)  # the checkpoint is of a finished run: only export it again
    trainer.run(on_check)


def main() -> None:
    """Reads the command line and the standard library, then trains."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    corpus = collect(limit=TINY_FILES if options.tiny else None)
    run(options, TINY if options.tiny else Shape(), plan_for(options), corpus)


if __name__ == "__main__":
    main()
