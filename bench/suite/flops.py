"""`python -m bench.suite.flops MODEL`: how many tokens a second this machine could generate if it did nothing but matrix products.

The FLOPs of a token are counted from the checkpoint's tensors, the peak is measured on all cores in this very run: the best of torch's
products of bf16 matrices, plain and with weights packed once. Attention, norms, sampling and everything else count nothing, so the
bound is beyond reach by design. gemm_s is what the products of a whole load take on one core, as the engine does them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from bench.micro.gemm import gemm_only
from bench.timing import alternated

# Prompts that arrive one by one are computed a few at a time.
_PREFILL_TOKENS = 512
_SIZES = ((128, 512, 3072), (128, 1536, 512), (512, 512, 3072), (2048, 512, 3072), (1024, 2048, 2048))


@dataclass(frozen=True, slots=True)
class Bound:
    """mflop_per_output: of one output token with its share of the prompt. peak_gflops: all cores together. tokens_per_s: their quotient."""

    mflop_per_output: float
    peak_gflops: float
    tokens_per_s: float
    threads: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print the bound as one line of JSON; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.suite.flops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--input-len", type=int, default=50, metavar="N", help="tokens of a prompt (50)")
    parser.add_argument("--output-len", type=int, default=50, metavar="N", help="tokens of an answer (50)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="sequences of a decode step (128)")
    parser.add_argument(
        "--num-prompts", type=int, default=256, metavar="N", help="requests in all, of whose products gemm_s is the time (256)"
    )
    options = parser.parse_args(argv)
    found = bound(options.model, options.input_len, options.output_len)
    gemm_s = products_s(options.model, options.num_prompts, options.input_len, options.output_len, options.batch)
    print(json.dumps({**asdict(found), "gemm_s": gemm_s}))
    return 0


def bound(model: Path, input_len: int, output_len: int) -> Bound:
    """Count, measure, divide."""
    layers, head = multiplied(_shapes(model), _active_share(model))
    flop = 2.0 * (layers * (1 + input_len / output_len) + head)
    peak = peak_flops()
    return Bound(flop / 1e6, peak / 1e9, peak / flop, torch.get_num_threads())


def products_s(model: Path, num_prompts: int, input_len: int, output_len: int, batch: int) -> float:
    """Core seconds of a load's matrix products, as the engine does them and nothing between them: one thread, full batches."""
    torch.set_num_threads(1)
    at_once = max(1, _PREFILL_TOKENS // input_len)
    prefill_s, decode_s = gemm_only(model, "bfloat16", [(at_once, input_len), (batch, 1)])
    return num_prompts / at_once * prefill_s + num_prompts * (output_len - 1) / batch * decode_s


def multiplied(shapes: Mapping[str, Sequence[int]], active_share: float) -> tuple[float, float]:
    """Numbers a token is multiplied by: (in all layers, in the head). active_share: of the routed experts, those a token goes through.

    The head's matrix is the embedding's where there is no other; it is applied to output tokens, and once per prompt, which is left out.
    """
    matrices = {name: shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2}
    head = matrices.pop("lm_head.weight", 0)
    embedding = matrices.pop("model.embed_tokens.weight", 0)
    layers = sum(size * (active_share if ".experts." in name else 1.0) for name, size in matrices.items())
    return layers, float(head or embedding)


def peak_flops() -> float:
    """FLOP/s of the fastest product of bf16 matrices on all threads that torch has."""
    best = 0.0
    for rows, width, columns in _SIZES:
        x, w = torch.randn(rows, width).bfloat16(), torch.randn(columns, width).bfloat16()
        seconds = min(alternated(list(_products(x, w))))
        best = max(best, 2.0 * rows * width * columns / seconds)
    return best


def _products(x: torch.Tensor, w: torch.Tensor) -> Iterator[Callable[[int], object]]:
    yield lambda _: F.linear(x, w)
    packed = torch.ops.mkldnn._reorder_linear_weight(w)
    yield lambda _: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _shapes(model: Path) -> dict[str, Sequence[int]]:
    found: dict[str, Sequence[int]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


def _active_share(model: Path) -> float:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    num_experts = config.get("num_experts") or config.get("n_routed_experts")
    return config["num_experts_per_tok"] / num_experts if num_experts else 1.0


if __name__ == "__main__":
    raise SystemExit(main())
