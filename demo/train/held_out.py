"""Writes the side of the corpus that the demo model has not read: `python -m demo.train.held_out`.

It is the very stream that the card's held-out loss is measured on, as text: the end-of-text token between texts is spelled out, so
that encoding the file gives the stream's tokens again. Measurements outside `demo/` take the file and need no training code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer

from .corpus import collect
from .data import stream, texts


def main() -> int:
    """Collect, compare with the card, write."""
    parser = argparse.ArgumentParser(prog="python -m demo.train.held_out", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="whose card and tokenizer to go by")
    parser.add_argument("--out", type=Path, default=Path("demo/held_out.txt"))
    parser.add_argument("--seed", type=int, default=0, help="of the training run")
    options = parser.parse_args()
    corpus = collect()
    if f"`{corpus.sha256}`" not in (options.model / "README.md").read_text(encoding="utf-8"):
        print(f"this interpreter's library is not the one {options.model} was trained on: see its card", file=sys.stderr)
        return 1
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = stream(tokenizer, *texts(corpus, held_out=True, seed=options.seed), options.seed)
    text = str(tokenizer.decode(tokens.tolist()))
    if tokenizer(text, verbose=False).input_ids != tokens.tolist():
        print("the tokenizer does not give back the stream from its text", file=sys.stderr)
        return 1
    options.out.write_bytes(text.encode())
    print(f"{options.out}: {len(tokens):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
